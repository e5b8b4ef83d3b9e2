"""``replay``: a placement becomes a predicted timeline."""

from __future__ import annotations

from typing import NamedTuple

from msgspec.structs import replace

from sim.graph import Program
from sim.ops import Alloc, Collective, Copy, Free, Kernel, Mark, Op
from sim.place.placement import Placement
from sim.replay.allocator.config import AllocatorConfig
from sim.replay.engine import RankReplay, Replayed, run
from sim.replay.memory import step_memory
from sim.timeline import (
    MemoryPeak,
    MemorySample,
    OutOfMemory,
    Part,
    RankInfo,
    RankSamples,
    RankSpans,
    Span,
    SpanKind,
    Step,
    Timeline,
    Track,
)


def replay(
    placement: Placement,
    *,
    contention: bool = True,
    allocator: AllocatorConfig | None = None,
    folding: bool = True,
) -> Timeline:
    """Replay a placed graph and tell what happened when, in integer nanoseconds from the beginning.

    ``contention`` lets transfers share links and kernels their device; ``allocator`` is what PYTORCH_CUDA_ALLOC_CONF
    says; ``folding`` replays ranks that are alike once, which changes nothing but the time it takes.  A job that does
    not fit is no error: the timeline says so (``out_of_memory``).  DeadlockError where ranks wait for each other in
    different collectives, UserError where they disagree about one.
    """
    return timeline_of(run(placement, contention=contention, folding=folding), allocator)


class _Told(NamedTuple):
    """What a replayed rank did, for all that it stands for: spans that count tracks and launches from its own first."""

    spans: tuple[Span, ...]
    steps: tuple[Step, ...]
    samples: tuple[MemorySample, ...]
    peak: MemoryPeak | None
    out_of_memory: OutOfMemory | None


def timeline_of(replayed: Replayed, allocator: AllocatorConfig | None = None) -> Timeline:
    """Tell what happened when in a replay that was run."""
    placement, graph = replayed.placement, replayed.placement.graph
    told = {each.placed.rank: _tell(graph.programs[each.placed.program], each, allocator) for each in replayed.ranks}
    by_rank = {placed.rank: told[replayed.folded.leader_of[placed.rank]] for placed in placement.ranks}
    tracks: list[Track] = []
    first_track: dict[int, int] = {}
    for placed in placement.ranks:
        first_track[placed.rank] = len(tracks)
        lanes = graph.programs[placed.program].lanes
        tracks.extend(Track(placed.rank, lane.kind, lane.id, lane.name) for lane in lanes)
    return Timeline(
        name=graph.name,
        origin="predicted",
        ranks=tuple(RankInfo(r.rank, r.device, r.device_name, r.memory_bytes, r.outside) for r in placement.ranks),
        tracks=tuple(tracks),
        spans=RankSpans(Part(rank, each.spans, first_track[rank]) for rank, each in by_rank.items()),
        steps=tuple(replace(step, rank=rank) for rank, each in by_rank.items() for step in each.steps),
        memory=RankSamples(Part(rank, each.samples) for rank, each in by_rank.items()),
        peaks=tuple(replace(each.peak, rank=rank) for rank, each in by_rank.items() if each.peak is not None),
        out_of_memory=tuple(
            replace(each.out_of_memory, rank=rank) for rank, each in by_rank.items() if each.out_of_memory is not None
        ),
        warnings=graph.warnings + placement.warnings,
    )


def _tell(program: Program, replayed: RankReplay, allocator: AllocatorConfig | None) -> _Told:
    placed = replayed.placed
    start, end, costs = replayed.moments.start, replayed.moments.end, placed.costs
    spans: list[Span] = []
    steps: list[Step] = []
    span_of: dict[int, int] = {}
    begun: dict[int, Mark] = {}
    begun_at: dict[int, int] = {}
    for i, op in enumerate(program.ops):
        if isinstance(op, Alloc | Free):
            continue
        if isinstance(op, Mark):
            if op.edge == "begin":
                begun[op.step], begun_at[op.step] = op, start[i]
            elif op.step in begun:
                steps.append(Step(placed.rank, op.step, begun[op.step].name, begun_at[op.step], end[i]))
            continue
        span_of[i] = len(spans)
        launch = getattr(op, "launch", None)
        spans.append(
            Span(
                track=op.lane,
                op=i,
                name=op.name,
                kind=_kind(op),
                start_ns=start[i],
                duration_ns=end[i] - start[i],
                source=costs.source[i],
                launch=-1 if launch is None else span_of.get(launch, -1),
                transfer_ns=replayed.transfer_ns.get(i, 0),
                collective=costs.collectives.get(i),
                module=getattr(op, "module", ""),
            )
        )
    memory = step_memory(placed, program.ops, start, end, allocator)
    return _Told(tuple(spans), tuple(steps), tuple(memory.samples), memory.peak(), memory.out_of_memory)


def _kind(op: Op) -> SpanKind:
    if isinstance(op, Kernel):
        return "compute"
    if isinstance(op, Collective):
        return "communication"
    if isinstance(op, Copy):
        return "memset" if op.kind == "memset" else "memcpy"
    return "host" if getattr(op, "work", None) is None else "compute"
