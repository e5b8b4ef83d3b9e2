"""Repetitions of a replay in one pass: the replay itself where nothing varies, and by hand where something does."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sim
from sim.ops import Collective, HostCall, Kernel, Mark, Op
from sim.place.captured import place_as_captured
from sim.place.placement import NONE, Placement, RankDoubt
from sim.replay.draws import PPM, Drawn, Wanted, repeat
from sim.replay.engine import RankReplay, run
from tests.programs import COMM, MAIN, STREAM, graph_of
from tests.replay.test_engine import programs
from tests.whatif.layers import layered


def repeated(
    placement: Placement, doubt: RankDoubt, *factors: list[float]
) -> tuple[Sequence[RankReplay], dict[int, Drawn]]:
    """A replay and its repetitions, with every operation's end asked for."""
    replayed = run(placement)
    ppm = np.array([[round(f * PPM) for f in row] for row in factors or [[1.0]]], dtype=np.int64)
    wanted = {}
    for rank in replayed.ranks:
        marks = frozenset(i for i, op in enumerate(rank.ops) if isinstance(op, Mark))
        device = frozenset(i for i, op in enumerate(rank.ops) if isinstance(op, Kernel | Collective))
        wanted[rank.placed.rank] = Wanted(marks, device)
    doubts = dict.fromkeys(wanted, doubt)
    return replayed.ranks, repeat(replayed, doubts, ppm, wanted)


def check_same(replays: Sequence[RankReplay], drawn: dict[int, Drawn]) -> None:
    for replayed in replays:
        rank, moments = drawn[replayed.placed.rank], replayed.moments
        assert {i: int(ends[0]) for i, ends in rank.ends.items()} == {i: moments.end[i] for i in rank.ends}
        device = [i for i, op in enumerate(replayed.ops) if isinstance(op, Kernel | Collective)]
        assert int(rank.device[0]) == sum(moments.end[i] - moments.start[i] for i in device)


@given(programs())
def test_with_nothing_varied_it_is_the_replay(ops: list[Op]) -> None:
    placement = place_as_captured(graph_of([*ops, Mark(lane=MAIN, step=0, edge="end")]))
    check_same(*repeated(placement, RankDoubt((), NONE, NONE)))


@pytest.mark.parametrize("machine", ["a5000x8", "a5000x8-nvlink-pairs"])
def test_with_nothing_varied_it_is_the_replay_of_ranks_that_share_links_and_sms(machine: str) -> None:
    placement = sim.place(layered(4), sim.load_topology(machine))
    check_same(*repeated(placement, RankDoubt((), NONE, NONE)))


FACTORS = (0.3, 1.0, 1.7, 4.0)


@given(programs(), st.data())
def test_every_repetition_is_the_event_loops_own_replay_of_durations_so_scaled(
    ops: list[Op], data: st.DataObject
) -> None:
    """The vector pass has its own words for the rules of waiting: each column must be what the event loop says."""
    drawn_factors = st.lists(st.sampled_from(FACTORS), min_size=3, max_size=3)
    rows = np.array([[round(f * PPM) for f in data.draw(drawn_factors)] for _ in range(4)], dtype=np.int64)
    kinds = (*(data.draw(st.sampled_from((NONE, 0, 1))) for _ in ops), NONE)
    doubt = RankDoubt(kinds, host=2, launch=3)
    placement = place_as_captured(graph_of([*ops, Mark(lane=MAIN, step=0, edge="end")]))
    (replay,), drawn = repeated(placement, doubt, *(rows / PPM).tolist())
    for column in range(3):
        (single,) = run(_scaled(placement, doubt, [int(row[column]) for row in rows])).ranks
        device = [i for i, op in enumerate(replay.ops) if isinstance(op, Kernel | Collective)]
        assert {i: int(ends[column]) for i, ends in drawn[0].ends.items()} == {
            i: single.moments.end[i] for i in drawn[0].ends
        }
        assert int(drawn[0].device[column]) == sum(single.moments.end[i] - single.moments.start[i] for i in device)


def _scaled(placement: Placement, doubt: RankDoubt, ppm: list[int]) -> Placement:
    """The placement of one rank with every duration multiplied, as its kind of doubt says."""

    def times(ns: int, kind: int) -> int:
        return ns if kind == NONE else (ns * ppm[kind] + PPM // 2) // PPM

    (program,), (placed,) = placement.graph.programs, placement.ranks
    costs, ops = placed.costs, program.ops
    lags = []
    for i, op in enumerate(ops):
        launch = getattr(op, "launch", None)
        called = 0 if launch is None else min(costs.lag_ns[i], costs.duration_ns[launch])
        lags.append(times(called, doubt.host) + times(costs.lag_ns[i] - called, doubt.launch))
    host = [isinstance(op, HostCall | Mark) for op in ops]
    longer = msgspec.structs.replace(
        costs,
        duration_ns=tuple(
            times(costs.duration_ns[i], doubt.host if host[i] else doubt.kind[i]) for i in range(len(ops))
        ),
        gap_ns=tuple(times(ns, doubt.launch) for ns in costs.gap_ns),
        lag_ns=tuple(lags),
    )
    slower = tuple(
        msgspec.structs.replace(op, before_ns=times(op.before_ns, doubt.host)) if on_host else op
        for op, on_host in zip(ops, host, strict=True)
    )
    graph = msgspec.structs.replace(placement.graph, programs=(msgspec.structs.replace(program, ops=slower),))
    return msgspec.structs.replace(placement, graph=graph, ranks=(msgspec.structs.replace(placed, costs=longer),))


def test_a_step_with_longer_kernels_by_hand() -> None:
    # Launches of 10 at 0 and 10; kernel a from 0 (lag 0) takes 100 x f, kernel b follows it and takes 50 x f; the
    # synchronizing call begins at 20 and ends 4 x h after both. f = 1, h = 1: 154.  f = 2, h = 1: 304.  f = 0.1, h = 1:
    # b is launched at 10 and ends at 15, the call at 20 + 4.  f = 0.1, h = 3: b starts at 30, call at 60, ends at 72.
    ops = [
        HostCall(lane=MAIN, measured_ns=10), Kernel(lane=STREAM, launch=0, measured_ns=100, lag_ns=0),
        HostCall(lane=MAIN, measured_ns=10), Kernel(lane=STREAM, launch=2, measured_ns=50, lag_ns=0),
        HostCall(lane=MAIN, measured_ns=4, waits=(1, 3)), Mark(lane=MAIN, step=0, edge="end"),
    ]  # fmt: skip
    doubt = RankDoubt((NONE, 0, NONE, 0, NONE, NONE), 1, NONE)
    _, drawn = repeated(place_as_captured(graph_of(ops)), doubt, [1.0, 2.0, 0.1, 0.1], [1.0, 1.0, 1.0, 3.0])
    assert drawn[0].ends[5].tolist() == [154, 304, 24, 72]
    assert drawn[0].device.tolist() == [150, 300, 15, 15]


def test_a_collective_waits_for_the_rank_whose_kernel_became_longer() -> None:
    # Rank 0's kernel takes 100, rank 1's 60; then an all-reduce of 30 on both: ends at 130.  With rank 1's alone twice
    # as long: 120 + 30.
    def rank(ns: int) -> list[Op]:
        return [
            HostCall(lane=MAIN, measured_ns=0), Kernel(lane=STREAM, launch=0, measured_ns=ns, lag_ns=0),
            Collective(lane=COMM, launch=0, lag_ns=0, after=(1,), measured_ns=30, group="dp", bytes=4),
            HostCall(lane=MAIN, measured_ns=0, waits=(2,)), Mark(lane=MAIN, step=0, edge="end"),
        ]  # fmt: skip

    placement = place_as_captured(graph_of(rank(100), rank(60), groups={"dp": ((0, 1),)}))
    replayed = run(placement)
    wanted = {r: Wanted(frozenset((4,)), frozenset()) for r in (0, 1)}
    doubts = {0: RankDoubt((), NONE, NONE), 1: RankDoubt((NONE, 0, NONE, NONE, NONE), NONE, NONE)}
    drawn = repeat(replayed, doubts, np.array([[PPM, 2 * PPM]]), wanted)
    assert drawn[0].ends[4].tolist() == drawn[1].ends[4].tolist() == [130, 150]


def test_hours_do_not_overflow() -> None:
    # 10 hours = 3.6e13 ns, times 1.5e6 parts per million, would leave 64 bits.
    hours = 36_000_000_000_000
    ops = [HostCall(lane=MAIN, measured_ns=hours), Mark(lane=MAIN, step=0, edge="end")]
    _, drawn = repeated(place_as_captured(graph_of(ops)), RankDoubt((NONE, NONE), 0, NONE), [1.5])
    assert drawn[0].ends[1].tolist() == [hours * 3 // 2]
