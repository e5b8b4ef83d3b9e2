"""One device shared by compute kernels and NCCL's: laws, worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from sim.ops import Collective, HostCall, Kernel, Op
from sim.place.captured import place_as_captured
from sim.place.placement import Held, Placement
from sim.replay.critical import CriticalPaths
from sim.replay.engine import RankReplay, run
from sim.replay.sharing import Sharing
from tests.programs import COMM, MAIN, STREAM, graph_of

QUARTER = Held(sms_ppm=250_000, memory_ppm=500_000)


def call(before: int = 0) -> HostCall:
    return HostCall(lane=MAIN, name="launch", measured_ns=0, before_ns=before)


def kernel(ns: int, launch: int, lane: int = STREAM, after: tuple[int, ...] = ()) -> Kernel:
    return Kernel(lane=lane, name="k", measured_ns=ns, launch=launch, lag_ns=0, gap_ns=0, after=after)


def all_reduce(ns: int, launch: int, seq: int = 0) -> Collective:
    return Collective(lane=COMM, name="nccl", measured_ns=ns, launch=launch, group="dp", seq=seq, bytes=64)


def placed(*programs: Sequence[Op], held: Held = QUARTER, bound: str = "compute") -> Placement:
    """Every collective holds a part of its device; every kernel is bound alike."""
    placement = place_as_captured(graph_of(*programs, groups={"dp": (tuple(range(len(programs))),)}))
    ranks = []
    for rank, ops in zip(placement.ranks, programs, strict=True):
        costs = msgspec.structs.replace(
            rank.costs,
            held={i: held for i, op in enumerate(ops) if isinstance(op, Collective)},
            bounds={} if bound == "compute" else {i: bound for i, op in enumerate(ops) if isinstance(op, Kernel)},
        )
        ranks.append(msgspec.structs.replace(rank, costs=costs))
    return msgspec.structs.replace(placement, ranks=tuple(ranks))


def ends(placement: Placement, *, contention: bool = True) -> list[list[int]]:
    return [replayed.moments.end for replayed in run(placement, contention=contention).ranks]


def test_a_kernel_beside_a_collective_takes_longer_by_what_that_holds() -> None:
    # 3000 ns of work at three quarters: 4000.
    ops = [call(), all_reduce(10_000, 0), kernel(3000, 0)]
    assert ends(placed(ops))[0][2] == 4000


def test_without_contention_and_alone_nothing_changes() -> None:
    beside = [call(), all_reduce(10_000, 0), kernel(3000, 0)]
    assert ends(placed(beside), contention=False)[0][2] == 3000
    # The kernel is over before the collective comes, or comes when the collective is gone.
    apart = [call(), kernel(3000, 0), call(before=3000), all_reduce(1000, 2), call(before=1000), kernel(500, 4)]
    assert ends(placed(apart)) == ends(placed(apart), contention=False)


def test_a_collective_that_comes_and_goes_costs_only_its_own_time() -> None:
    # The kernel alone for 1000; beside the collective, [1000, 3000), it does 1500; 1500 of its 4000 are left: 4500.
    ops = [call(), kernel(4000, 0), call(before=1000), all_reduce(2000, 2)]
    assert ends(placed(ops))[0][1] == 4500


def test_who_waits_for_the_kernel_waits_longer() -> None:
    ops = [
        call(), all_reduce(10_000, 0), kernel(3000, 0),
        HostCall(lane=MAIN, name="sync", measured_ns=5, waits=(2,)),
    ]  # fmt: skip
    assert ends(placed(ops))[0][3] == 4005


def test_waiting_for_a_peer_holds_sms_but_no_memory() -> None:
    # Rank 0's collective is there from 0, rank 1's from 4000, and transfers until 6000.  A kernel of 3000 on rank 0,
    # bound by compute, runs at three quarters all the time: 4000.  Bound by memory it is alone until it is done: 3000.
    early = [call(), all_reduce(2000, 0), kernel(3000, 0)]
    late = [call(before=4000), all_reduce(2000, 0)]
    assert ends(placed(early, late))[0][2] == 4000
    assert ends(placed(early, late, bound="memory"))[0][2] == 3000
    # A longer one: 4000 alone, then half speed for the 2000 of the transfer; of 6000 the last 1000 alone again: 7000.
    longer = [call(), all_reduce(2000, 0), kernel(6000, 0)]
    assert ends(placed(longer, late, bound="memory"))[0][2] == 7000


def test_a_kernel_that_nothing_bounds_but_its_launch_is_not_slowed() -> None:
    ops = [call(), all_reduce(10_000, 0), kernel(1500, 0)]
    assert ends(placed(ops, bound="floor"))[0][2] == 1500


def test_two_collectives_at_once_take_both_their_parts() -> None:
    # Two quarters leave half: of 1000 ns 500 are done at 1000, 750 at 1500, all at 2000.
    costs = placed([call(), all_reduce(1, 0), all_reduce(1, 0, 1)]).ranks[0].costs
    sharing = Sharing(costs)
    for op in (1, 2):
        sharing.hold(op, 0, _Going())
    sharing.begin(STREAM, 0, now=0)
    assert [sharing.left_ns(9, 0, 1000, now) for now in (1000, 1500, 2000)] == [500, 250, 0]


class _Going:
    """A collective that waits for its peers."""

    end = -1
    complete = False
    last_arrival = -1


def test_a_device_that_is_all_taken_keeps_a_tenth() -> None:
    # 100 ns of work at a tenth of the speed: 1000, and not for ever.
    ops = [call(), all_reduce(10_000, 0), kernel(100, 0)]
    assert ends(placed(ops, held=Held(1_000_000, 1_000_000)))[0][2] == 1000


# Laws ---------------------------------------------------------------------------------------------------------------


@st.composite
def jobs(draw: st.DrawFn) -> list[list[Op]]:
    """Two ranks with kernels at random and three collectives beside them."""
    times = st.integers(0, 3000)
    ranks: list[list[Op]] = []
    transfers = [draw(times) for _ in range(3)]
    for _ in range(2):
        ops: list[Op] = []
        for seq, transfer in enumerate(transfers):
            for _ in range(draw(st.integers(0, 3))):
                ops += [call(draw(times)), kernel(draw(times), len(ops))]
            ops += [call(draw(times)), all_reduce(transfer, len(ops), seq)]
        ranks.append(ops)
    return ranks


helds = st.builds(Held, st.integers(0, 1_000_000), st.integers(0, 1_000_000))
bounds = st.sampled_from(["compute", "memory", "floor"])


@given(jobs(), helds, bounds)
def test_sharing_never_shortens_and_never_beyond_the_whole(job: list[list[Op]], held: Held, bound: str) -> None:
    placement = placed(*job, held=held, bound=bound)
    alike = zip(run(placement).ranks, run(placement, contention=False).ranks, strict=True)
    for shared, alone in alike:
        assert all(a >= b for a, b in zip(shared.moments.end, alone.moments.end, strict=True))
        for i, op in enumerate(shared.ops):
            if isinstance(op, Kernel):
                took = shared.moments.end[i] - shared.moments.start[i]
                assert (op.measured_ns or 0) <= took <= 10 * (op.measured_ns or 0)


@given(jobs(), helds, bounds)
def test_kernels_do_their_work_exactly(job: list[list[Op]], held: Held, bound: str) -> None:
    """The integral of a kernel's speed over its time is its work, to the nanosecond."""
    placement = placed(*job, held=held, bound=bound)
    if max(held.sms_ppm, held.memory_ppm) > 900_000 or bound == "floor":
        return  # the tenth that a kernel keeps is another law
    replays = run(placement).ranks
    for replayed in replays:
        for i, op in enumerate(replayed.ops):
            if isinstance(op, Kernel) and op.measured_ns:
                assert op.measured_ns <= _work(replays, replayed, i, held, bound) < op.measured_ns + 1


def _work(replays: Sequence[RankReplay], replayed: RankReplay, i: int, held: Held, bound: str) -> float:
    begin, end = replayed.moments.start[i], replayed.moments.end[i]
    work = (end - begin) * 1_000_000
    for j, op in enumerate(replayed.ops):
        if isinstance(op, Collective):
            since = replayed.moments.start[j]
            if bound == "memory":
                since = replayed.moments.end[j] - replayed.transfer_ns[j]
            overlap = max(0, min(end, replayed.moments.end[j]) - max(begin, since))
            work -= overlap * (held.memory_ppm if bound == "memory" else held.sms_ppm)
    return work / 1_000_000


@given(jobs(), helds, bounds)
def test_the_critical_path_tiles_a_shared_device_too(job: list[list[Op]], held: Held, bound: str) -> None:
    placement = placed(*job, held=held, bound=bound)
    replayed = run(placement)
    end = max(replayed.ranks[0].moments.end)
    path = CriticalPaths(replayed).path(0, 0, end)
    assert sum(segment.duration_ns for segment in path) == end
    assert all(a.end_ns == b.start_ns for a, b in pairwise(path))


def test_the_path_tells_the_shared_part_apart() -> None:
    ops = [call(), all_reduce(3500, 0), kernel(3000, 0), HostCall(lane=MAIN, name="s", measured_ns=0, waits=(2,))]
    placement = placed(ops)
    replayed = run(placement)
    # 3500 beside the collective do 2625; the last 375 alone: 3875, of which 875 are the sharing's.
    path = CriticalPaths(replayed).path(0, 0, 3875)
    assert [(s.part, s.duration_ns) for s in path] == [("compute", 3000), ("contention", 875)]
