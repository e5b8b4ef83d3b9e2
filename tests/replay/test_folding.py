"""Ranks that are alike, replayed once: the same timeline to the last field, and how many ranks stand for all."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.errors import DeadlockError, UserError
from sim.graph import OpGraph, Program, RankProgram
from sim.ops import Alloc, Collective, Copy, Free, HostCall, Kernel, Mark, Op
from sim.place.captured import place_as_captured
from sim.place.place import place
from sim.place.placement import Flow, Held, Placement, share_of
from sim.replay.critical import CriticalPaths
from sim.replay.engine import run
from sim.replay.folding import fold
from sim.replay.replay import replay
from sim.report.chrome import encode_trace
from sim.report.summarize import summarize
from sim.report.summary import encode
from sim.timeline import Timeline
from sim.topology.load import load_topology
from tests.programs import COMM, LANES, MAIN, STREAM
from tests.whatif.layers import DEVICE, layered, ring_machine

Groups = dict[str, tuple[tuple[int, ...], ...]]
Loads = dict[tuple[str, tuple[int, ...]], dict[str, float]]  # of an instance of a group: parts by lane


def mesh(*sizes: int) -> tuple[int, Groups]:
    """Ranks of a mesh, and per axis the groups of ranks that differ in that axis alone."""
    places = list(product(*(range(size) for size in sizes)))
    number = {place: rank for rank, place in enumerate(places)}
    groups: Groups = {}
    for axis in range(len(sizes)):
        rows: dict[tuple[int, ...], list[int]] = {}
        for where in places:
            rows.setdefault((*where[:axis], *where[axis + 1 :]), []).append(number[where])
        groups[f"axis{axis}"] = tuple(tuple(row) for row in rows.values())
    return len(places), groups


def job(ranks: int, groups: Groups, programs: Sequence[Sequence[Op]], runs: Sequence[int]) -> OpGraph:
    graph = OpGraph(
        name="job",
        programs=tuple(Program(LANES, tuple(ops)) for ops in programs),
        ranks=tuple(RankProgram(rank, runs[rank], DEVICE) for rank in range(ranks)),
        groups=groups,
    )
    graph.check()
    return graph


def loaded(graph: OpGraph, loads: Loads, host: Sequence[str]) -> Placement:
    """As captured, but an instance of a group loads lanes with its collectives, and a rank one with its copies."""
    placement = place_as_captured(graph)
    ranks = []
    for placed in placement.ranks:
        flows = {}
        for i, op in enumerate(graph.programs[placed.program].ops):
            ns = placed.costs.duration_ns[i]
            if isinstance(op, Collective):
                shares = loads[op.group, graph.group_of(op.group, placed.rank)]
                flows[i] = Flow(ns // 4, ns - ns // 4, tuple(sorted((k, share_of(v)) for k, v in shares.items())))
            elif isinstance(op, Copy):
                flows[i] = Flow(ns // 3, ns - ns // 3, ((host[placed.rank], 1.0),))
        held = {i: Held(250_000, 125_000) for i in placed.costs.collectives}
        costs = msgspec.structs.replace(placed.costs, flows=flows, held=held)
        ranks.append(msgspec.structs.replace(placed, costs=costs))
    return msgspec.structs.replace(placement, ranks=tuple(ranks))


def both(placement: Placement, *, contention: bool = True) -> tuple[Timeline, Timeline]:
    return (
        replay(placement, contention=contention),
        replay(placement, contention=contention, folding=False),
    )  # fmt: skip


def is_same(folded: Timeline, whole: Timeline) -> bool:
    """Every span, sample, step and peak; what is told of them, and the file that is written."""
    summary, other = summarize(folded), summarize(whole)
    other = msgspec.structs.replace(other, ranks_replayed=summary.ranks_replayed)
    return folded == whole and encode(summary) == encode(other) and encode_trace(folded) == encode_trace(whole)


def standing(placement: Placement) -> int:
    """How many ranks are replayed."""
    return len(fold(placement).placement.ranks)


# The law ------------------------------------------------------------------------------------------------------------


@st.composite
def operations(draw: st.DrawFn, shared: Sequence[Op], groups: Sequence[str]) -> list[Op]:
    """One program around ``shared``: the collectives that all programs have, in their order."""
    times = st.integers(0, 400)
    ops: list[Op] = [Mark(lane=MAIN, name="ProfilerStep#0", step=0, edge="begin")]
    live: list[int] = []
    for collective in (*shared, None):
        for _ in range(draw(st.integers(0, 3))):
            ops.append(HostCall(lane=MAIN, name="call", measured_ns=draw(times), before_ns=draw(times)))
            launch, ns = len(ops) - 1, draw(times)
            kind = draw(st.sampled_from(["kernel", "copy", "alloc", "free"]))
            if kind == "kernel":
                ops.append(Kernel(lane=STREAM, name="k", measured_ns=ns, launch=launch, lag_ns=3, gap_ns=1))
            elif kind == "copy":
                ops.append(Copy(lane=STREAM, name="c", kind="h2d", bytes=8, measured_ns=ns, launch=launch))
            elif kind == "alloc" or not live:
                live.append(len(ops))
                ops.append(Alloc(lane=MAIN, block=len(ops), bytes=ns << 12, name="a"))
            else:
                ops.append(Free(lane=MAIN, block=live.pop()))
        if collective is not None:
            ops.append(HostCall(lane=MAIN, name="call", measured_ns=draw(times), before_ns=draw(times)))
            ops.append(msgspec.structs.replace(collective, launch=len(ops) - 1))
    waits = (len(ops) - 1,) if isinstance(ops[-1], Kernel | Copy | Collective) else ()
    ops.append(HostCall(lane=MAIN, name="sync", measured_ns=1, waits=waits))
    ops.append(Mark(lane=MAIN, name="ProfilerStep#0", step=0, edge="end"))
    return ops


@st.composite
def jobs(draw: st.DrawFn) -> Placement:
    """A mesh of ranks that run one or two programs; lanes by rank, by pair and of all, loaded alike or not quite."""
    ranks, groups = mesh(*draw(st.sampled_from([(2, 2), (4,), (2, 3), (2, 2, 2), (4, 2), (3, 3)])))
    names = sorted(groups)
    seqs = dict.fromkeys(names, 0)
    shared = []
    for _ in range(draw(st.integers(1, 4))):
        group = draw(st.sampled_from(names))
        ns = draw(st.integers(0, 2000))
        shared.append(Collective(lane=COMM, name="nccl", measured_ns=ns, group=group, seq=seqs[group], bytes=64))
        seqs[group] += 1
    programs = [draw(operations(shared, names)) for _ in range(draw(st.integers(1, 2)))]
    by = draw(st.sampled_from([lambda r: 0, lambda r: r % len(programs), lambda r: r * len(programs) // ranks]))
    graph = job(ranks, groups, programs, [by(rank) for rank in range(ranks)])
    parts = st.sampled_from([0.1, 0.25, 1 / 3, 0.7, 1.0])
    loads: Loads = {}
    for group in names:
        own, pair, everyone = draw(parts), draw(parts), draw(parts)
        kinds = draw(st.sets(st.sampled_from(["own", "pair", "all"])))
        for instance in groups[group]:
            shares: dict[str, float] = {}
            for rank in instance:
                shares |= {f"own:{rank}": own} if "own" in kinds else {}
                shares |= {f"pair:{rank // 2}": pair} if "pair" in kinds else {}
            loads[group, instance] = shares | ({"all:0": everyone} if "all" in kinds else {})
    if draw(st.booleans()):  # one that is not like the others
        odd = draw(st.sampled_from(sorted(loads)))
        loads[odd] = {**loads[odd], draw(st.sampled_from(["own:0", "pair:0", "all:0", "own:1"])): draw(parts)}
    host = draw(st.sampled_from(["host:{r}", "host:{p}", "pair:{p}", "own:{r}"]))
    return loaded(graph, loads, [host.format(r=rank, p=rank // 2) for rank in range(ranks)])


@given(jobs(), st.booleans())
def test_a_folded_replay_is_the_whole_one(placement: Placement, contention: bool) -> None:
    assert is_same(*both(placement, contention=contention))


@given(jobs())
def test_the_critical_path_of_a_folded_replay_tiles_it_too(placement: Placement) -> None:
    replayed = run(placement)
    paths = CriticalPaths(replayed)
    for placed in placement.ranks:
        leader = replayed.folded.leader_of[placed.rank]
        end = max(next(each for each in replayed.ranks if each.placed.rank == leader).moments.end)
        assert sum(segment.duration_ns for segment in paths.path(placed.rank, 0, end)) == end


@pytest.mark.parametrize("machine", ["a5000x8", "a5000x8-nvlink-pairs", "a5000x8-one-switch", "dgx-a100", "dgx-h100"])
@pytest.mark.parametrize("sizes", [(8,), (4, 2), (2, 4), (2, 2, 2)])
def test_on_shipped_machines(machine: str, sizes: tuple[int, ...]) -> None:
    """Collectives of every axis beside each other, and copies from the host that cross the same links."""
    ranks, groups = mesh(*sizes)
    ops: list[Op] = []
    for turn in range(2):
        for lane, group in zip((COMM, STREAM, COMM), groups, strict=False):
            ops.append(HostCall(lane=MAIN, name="launch", measured_ns=2000))
            launch = len(ops) - 1
            ops.append(Copy(lane=STREAM, name="h2d", kind="h2d", bytes=3 << 20, launch=launch))
            ops.append(
                Collective(lane=lane, name="nccl", launch=launch, group=group, seq=turn, bytes=(5 << 20) + 4 * turn)
            )
            ops.append(Kernel(lane=STREAM, name="k", measured_ns=300_000, launch=launch, lag_ns=0, gap_ns=0))
    graph = job(ranks, groups, [ops], [0] * ranks)
    placement = place(graph, load_topology(machine))
    assert is_same(*both(placement))
    assert standing(placement) < ranks


def test_every_rank_copies_over_its_own_links() -> None:
    """And so eight copies at once, each over its own lanes, take as long as one."""
    ops: list[Op] = [
        HostCall(lane=MAIN, name="launch", measured_ns=2000),
        Copy(lane=STREAM, name="h2d", kind="h2d", bytes=3 << 20, launch=0, lag_ns=0, gap_ns=0),
    ]
    placement = place(job(8, {}, [ops], [0] * 8), load_topology("a5000x8"))
    lanes = [{lane for lane, _ in placed.costs.flows[1].shares} for placed in placement.ranks]
    assert all(f"gpu{rank}" in lane for rank, own in enumerate(lanes) for lane in own)
    # The copy's own time alone: latency and 3 MiB at 24 GB/s.
    alone = placement.ranks[0].costs.duration_ns[1]
    assert {span.duration_ns for span in replay(placement).spans if span.kind == "memcpy"} == {alone}


@pytest.mark.parametrize("order", [(7, 6, 5, 4, 3, 2, 1, 0), (1, 0, 3, 2, 5, 4, 7, 6), (4, 2, 7, 0, 1, 6, 3, 5)])
def test_the_order_of_ranks_in_the_file_does_not_matter(order: Sequence[int]) -> None:
    """Two programs on a machine that is not the same from all its GPUs: ranks go onto GPUs by their numbers."""
    ranks, groups = mesh(2, 4)
    late = [HostCall(lane=MAIN, name="late", measured_ns=5000)]
    meet = [
        Collective(lane=COMM, name="nccl", group=group, bytes=5 << 20, lag_ns=0, gap_ns=0) for group in sorted(groups)
    ]
    graph = job(ranks, groups, [meet, [*late, *meet]], [0, 1] * 4)
    shuffled = msgspec.structs.replace(
        graph,
        ranks=tuple(graph.ranks[i] for i in order),
        groups={name: instances[::-1] for name, instances in reversed(groups.items())},
    )
    machine = load_topology("a5000x8-nvlink-pairs")
    assert replay(place(shuffled, machine)) == replay(place(graph, machine))


def test_eight_ranks_of_a_ring_end_together(tmp_path: Path) -> None:
    """Each of them replayed for itself."""
    ran = run(place(layered(8), load_topology(str(ring_machine(tmp_path, 8)))), folding=False)
    assert len(ran.ranks) == 8
    assert len({tuple(rank.moments.end) for rank in ran.ranks}) == 1


# How far it folds ---------------------------------------------------------------------------------------------------


def one_collective(ns: int = 1000) -> list[Op]:
    return [
        HostCall(lane=MAIN, name="launch", measured_ns=10),
        Collective(lane=COMM, name="nccl", measured_ns=ns, launch=0, group="axis0", bytes=64),
    ]


def test_ranks_of_one_ring_are_one(tmp_path: Path) -> None:
    placement = place(layered(8), load_topology(str(ring_machine(tmp_path, 8))))
    assert standing(placement) == 1
    assert summarize(replay(placement)).ranks_replayed == 1
    assert [rank.rank for rank in summarize(replay(placement)).ranks] == list(range(8))


def test_instances_in_step_on_one_lane_share_it() -> None:
    # Axis 0 of a mesh of 2 x 3: three pairs, each all-reduce of 750 ns after 250 of latency needs half of the same
    # lane: 3 halves on it, so each runs at two thirds.  10 + ... the call begins at 0: 250 + 750 x 3/2 = 1375.
    ranks, groups = mesh(2, 3)
    graph = job(ranks, groups, [one_collective()], [0] * ranks)
    placement = loaded(graph, {("axis0", pair): {"all:0": 0.5} for pair in groups["axis0"]}, [""] * ranks)
    assert standing(placement) == 1
    assert {span.end_ns for span in replay(placement).spans if span.kind == "communication"} == {1375}


def test_a_pair_with_a_lane_of_its_own_is_told_apart() -> None:
    # The first pair has its lane to itself (250 + 750 = 1000), the two others share one: 2 x 0.75 on it, 250 + 1125.
    ranks, groups = mesh(2, 3)
    graph = job(ranks, groups, [one_collective()], [0] * ranks)
    first, *others = groups["axis0"]
    loads = {("axis0", first): {"a:0": 0.75}, **{("axis0", pair): {"b:0": 0.75} for pair in others}}
    placement = loaded(graph, loads, [""] * ranks)
    assert standing(placement) == 2
    ends = {s.track // len(LANES): s.end_ns for s in replay(placement).spans if s.kind == "communication"}
    assert ends == {0: 1000, 3: 1000, 1: 1375, 4: 1375, 2: 1375, 5: 1375}


def test_who_meets_another_program_is_told_apart() -> None:
    # Four ranks in two pairs; rank 3 computes longer, so rank 2 waits for it, and ranks 0 and 1 do not.
    late = HostCall(lane=MAIN, name="launch", measured_ns=10, before_ns=500)
    graph = job(4, {"axis0": ((0, 1), (2, 3))}, [one_collective(), [late, *one_collective()[1:]]], [0, 0, 0, 1])
    placement = place_as_captured(graph)
    folded = fold(placement)
    assert folded.leader_of == {0: 0, 1: 0, 2: 2, 3: 3}
    assert is_same(*both(placement))


def test_ranks_that_disagree_about_their_flow_are_all_replayed() -> None:
    graph = job(2, {"axis0": ((0, 1),)}, [one_collective(), one_collective()], [0, 1])
    placement = loaded(graph, {("axis0", (0, 1)): {"a:0": 1.0}}, [""] * 2)
    slow = msgspec.structs.replace(placement.ranks[1].costs, flows={1: Flow(0, 5000, (("a:0", 1.0),))})
    placement = msgspec.structs.replace(
        placement, ranks=(placement.ranks[0], msgspec.structs.replace(placement.ranks[1], costs=slow))
    )
    assert standing(placement) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"duration_ns": (10, 2000)}, {"lag_ns": (0, 1)}, {"gap_ns": (0, 1)}, {"source": ("measured", "profile")},
        {"workspaces": {0: 1}}, {"held": {1: Held(1, 1)}}, {"bounds": {0: "memory"}}, {"losses": {1: {0: 1}}},
        {"device_name": "another"}, {"memory_bytes": 1}, {"compute_capability": "9.0"}, {"outside": {"context": 1}},
    ],
)  # fmt: skip
def test_whatever_a_rank_has_of_its_own_tells_it_apart(change: dict[str, object]) -> None:
    # Two pairs; rank 3 differs, and so does rank 2, which meets it.
    placement = place_as_captured(job(4, {"axis0": ((0, 1), (2, 3))}, [one_collective()], [0] * 4))
    assert standing(placement) == 1
    last = placement.ranks[3]
    costs = {name: value for name, value in change.items() if name in last.costs.__struct_fields__}
    others = {name: value for name, value in change.items() if name not in costs}
    last = msgspec.structs.replace(last, costs=msgspec.structs.replace(last.costs, **costs), **others)
    other = msgspec.structs.replace(placement, ranks=(*placement.ranks[:3], last))
    assert fold(other).leader_of == {0: 0, 1: 0, 2: 2, 3: 3}
    assert is_same(*both(other))


def test_a_deadlock_of_ranks_alike_names_them_all() -> None:
    # All even ranks wait in axis 0's collective, all odd ones in axis 1's: each waits for the other half.
    ranks, groups = mesh(2, 2)
    first = Collective(lane=COMM, name="first", measured_ns=1, group="axis0", bytes=64)
    second = Collective(lane=COMM, name="second", measured_ns=1, group="axis1", bytes=64)
    graph = job(ranks, groups, [[first, second], [second, first]], [0, 1, 1, 0])
    with pytest.raises(DeadlockError) as error:
        run(place_as_captured(graph))
    assert str(error.value).count(" wait in ") == 4


def test_a_rank_without_a_group_is_an_error_as_before() -> None:
    graph = job(4, {"axis0": ((0, 1),)}, [one_collective()], [0] * 4)
    placement = msgspec.structs.replace(
        place_as_captured(job(4, {"axis0": ((0, 1, 2, 3),)}, [one_collective()], [0] * 4)), graph=graph
    )
    with pytest.raises(UserError, match="rank 2 is in no instance"):
        run(placement)


def test_many_ranks_take_the_room_of_one(tmp_path: Path) -> None:
    timeline = replay(place(layered(64), load_topology(str(ring_machine(tmp_path, 64)))))
    assert len(timeline.spans) == 64 * len(timeline.own_spans()[0].spans)
    assert len({id(own.spans) for own in timeline.own_spans().values()}) == 1
    # The last span of all is the last rank's, on its own track, launched by its own call.
    last = timeline.spans[-1]
    assert timeline.tracks[last.track].rank == 63
    assert timeline.tracks[timeline.spans[timeline.spans[-2].launch].track].rank == 63
    assert timeline.spans[-3:] == tuple(timeline.spans)[-3:]
    with pytest.raises(IndexError):
        timeline.spans[len(timeline.spans)]
