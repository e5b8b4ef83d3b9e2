"""The critical path: worked out by hand, and its laws on random programs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.ops import Collective, HostCall, Kernel, Mark, Op
from sim.place.captured import place_as_captured
from sim.replay.critical import CriticalPaths, Segment
from sim.replay.engine import run
from tests.programs import COMM, MAIN, STREAM, graph_of

TOLD = ("rank", "op", "part", "start_ns", "end_ns")


def call(name: str, ns: int, *, before: int = 0, waits: tuple[int, ...] = ()) -> HostCall:
    return HostCall(lane=MAIN, name=name, measured_ns=ns, before_ns=before, waits=waits)


def kernel(ns: int, launch: int, *, lag: int = 0, gap: int = 0, after: tuple[int, ...] = ()) -> Kernel:
    return Kernel(lane=STREAM, name="k", measured_ns=ns, launch=launch, lag_ns=lag, gap_ns=gap, after=after)


def all_reduce(ns: int, launch: int, *, after: tuple[int, ...] = (), seq: int = 0) -> Collective:
    return Collective(
        lane=COMM, name="all_reduce", measured_ns=ns, launch=launch, after=after, group="dp", seq=seq, bytes=64
    )


def paths_of(*programs: Sequence[Op]) -> tuple[CriticalPaths, list[int]]:
    """The paths of a replay, and when each rank was done."""
    everyone = {"dp": (tuple(range(len(programs))),)}
    placement = place_as_captured(graph_of(*programs, groups=everyone))
    replayed = run(placement)
    return CriticalPaths(replayed), [max(rank.moments.end) for rank in replayed.ranks]


def told(path: Sequence[Segment]) -> list[tuple[object, ...]]:
    return [tuple(getattr(segment, name) for name in TOLD) for segment in path]


def test_the_device_decides_where_the_host_waits_for_it() -> None:
    # The launch begins at 0 and takes 10; the kernel starts 15 after that begin, runs to 115; sync returns 4 later.
    # Back from the end: the call's own 4, the kernel, 5 of latency behind the call, the call.
    paths, (end,) = paths_of([call("launch", 10), kernel(100, 0, lag=15), call("sync", 4, waits=(1,))])
    assert told(paths.path(0, 0, end)) == [
        (0, 0, "host", 0, 10),
        (0, 1, "launch", 10, 15),
        (0, 1, "compute", 15, 115),
        (0, 2, "host", 115, 119),
    ]


def test_the_host_decides_where_the_device_is_faster() -> None:
    # The kernel is done at 15; the thread works on until 10 + 50, then calls for 4 and finds the device idle.
    paths, (end,) = paths_of([call("launch", 10), kernel(5, 0, lag=10), call("sync", 4, before=50, waits=(1,))])
    assert told(paths.path(0, 0, end)) == [(0, 0, "host", 0, 10), (0, 2, "host", 10, 60), (0, 2, "host", 60, 64)]


def test_a_stream_turns_around_behind_its_last_kernel() -> None:
    # a: [0, 100). b needs 3 to turn around: [103, 113).
    paths, (end,) = paths_of([call("la", 0), kernel(100, 0), call("lb", 0), kernel(10, 2, gap=3)])
    assert told(paths.path(0, 0, end)) == [
        (0, 1, "compute", 0, 100),
        (0, 3, "gap", 100, 103),
        (0, 3, "compute", 103, 113),
    ]


def test_the_last_rank_to_arrive_decides() -> None:
    # Rank 0 arrives at 10, rank 1 at 300, where its kernel ends; the transfer takes 40.  Rank 0 ends at 340 because
    # of rank 1's kernel.
    early = [call("l", 10), kernel(10, 0), call("lc", 0), all_reduce(40, 2, after=(1,))]
    late = [call("l", 10), kernel(300, 0), call("lc", 0), all_reduce(40, 2, after=(1,))]
    paths, ends = paths_of(early, late)
    assert ends == [340, 340]
    assert told(paths.path(0, 0, 340)) == [(1, 1, "compute", 0, 300), (0, 3, "communication", 300, 340)]


def test_a_path_is_cut_where_its_stretch_begins() -> None:
    paths, (end,) = paths_of([call("launch", 0), kernel(100, 0), call("sync", 4, waits=(1,))])
    assert told(paths.path(0, 60, end)) == [(0, 1, "compute", 60, 100), (0, 2, "host", 100, 104)]


def test_a_step_ends_with_its_mark() -> None:
    # The mark and the sync end at the same moment; the mark is the step's end and passes on to the sync.
    ops = [
        Mark(lane=MAIN, name="ProfilerStep#0", step=0, edge="begin"),
        call("l", 10), kernel(100, 1), call("sync", 0, waits=(2,)),
        Mark(lane=MAIN, name="ProfilerStep#0", step=0, edge="end"),
    ]  # fmt: skip
    paths, _ = paths_of(ops)
    assert told(paths.path(0, 0, 100)) == [(0, 2, "compute", 0, 100)]


# Laws on random programs ----------------------------------------------------------------------------------------

TIMES = st.integers(0, 1000)


@st.composite
def jobs(draw: st.DrawFn) -> list[list[Op]]:
    """Ranks with host calls, kernels and the same collectives in the same order, else at random."""
    ranks = draw(st.integers(1, 4))
    meetings = draw(st.integers(0, 4))
    transfers = [draw(TIMES) for _ in range(meetings)]
    return [_rank(draw, transfers) for _ in range(ranks)]


def _rank(draw: st.DrawFn, transfers: Sequence[int]) -> list[Op]:
    ops: list[Op] = []
    for seq, transfer in enumerate([*transfers, None]):
        for _ in range(draw(st.integers(1, 6))):
            ops.append(_work(draw, ops))
        if transfer is not None:
            hosts = [j for j, op in enumerate(ops) if isinstance(op, HostCall)]
            ops.append(all_reduce(transfer, draw(st.sampled_from(hosts)), after=_earlier(draw, ops), seq=seq))
    return ops


def _work(draw: st.DrawFn, ops: Sequence[Op]) -> Op:
    hosts = [j for j, op in enumerate(ops) if isinstance(op, HostCall)]
    if hosts and draw(st.booleans()):
        launch = draw(st.sampled_from(hosts))
        return kernel(draw(TIMES), launch, lag=draw(TIMES), gap=draw(TIMES), after=_earlier(draw, ops))
    return call("h", draw(TIMES), before=draw(TIMES), waits=_earlier(draw, ops))


def _earlier(draw: st.DrawFn, ops: Sequence[Op]) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.integers(0, len(ops) - 1), max_size=2, unique=True))) if ops else ()


@given(jobs(), st.floats(0, 1))
def test_the_segments_tile_the_stretch_exactly(job: list[list[Op]], share: float) -> None:
    paths, ends = paths_of(*job)
    for rank, end in enumerate(ends):
        begin = int(end * share)
        path = paths.path(rank, begin, end)
        if begin == end:
            assert path == ()
            continue
        assert (path[0].start_ns, path[-1].end_ns) == (begin, end)
        assert all(a.end_ns == b.start_ns for a, b in pairwise(path))


@given(jobs())
def test_what_is_not_on_the_path_may_be_free_without_changing_the_end(job: list[list[Op]]) -> None:
    """A kernel that the path does not name can take no time at all, and its rank ends no later and no sooner."""
    paths, ends = paths_of(*job)
    named = {(segment.rank, segment.op) for segment in paths.path(0, 0, ends[0])}
    freed: list[list[Op]] = [
        [
            kernel(0, op.launch or 0, lag=op.lag_ns or 0, gap=op.gap_ns or 0, after=op.after)
            if isinstance(op, Kernel) and (rank, i) not in named
            else op
            for i, op in enumerate(ops)
        ]
        for rank, ops in enumerate(job)
    ]
    _, after = paths_of(*freed)
    assert after[0] == ends[0]


def test_every_rank_of_a_symmetric_job_has_a_path_of_its_own() -> None:
    rank = [call("l", 10), kernel(100, 0), call("lc", 0), all_reduce(40, 2, after=(1,))]
    paths, ends = paths_of(rank, rank, rank)
    for r in range(3):
        assert {segment.rank for segment in paths.path(r, 0, ends[r])} == {r}


def test_nothing_ends_at_that_moment() -> None:
    paths, (end,) = paths_of([call("l", 10)])
    with pytest.raises(AssertionError, match="ended at 11 ns"):
        paths.path(0, 0, end + 1)
