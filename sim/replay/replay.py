"""``replay``: a placement becomes a predicted timeline."""

from __future__ import annotations

from collections.abc import Sequence

from sim.ops import Alloc, Collective, Copy, Free, Kernel, Mark, Op
from sim.place.placement import Placement
from sim.replay.allocator.config import AllocatorConfig
from sim.replay.engine import RankReplay, run
from sim.timeline import RankInfo, Span, SpanKind, Step, Timeline, Track


def replay(placement: Placement, *, contention: bool = True, allocator: AllocatorConfig | None = None) -> Timeline:
    """Replay a placed graph and tell what happened when; ``contention`` lets transfers share links,
    ``allocator`` is what PYTORCH_CUDA_ALLOC_CONF says.

    Raises DeadlockError and UserError as :func:`run` does.
    """
    return timeline_of(placement, run(placement, contention=contention, allocator=allocator))


def timeline_of(placement: Placement, replays: Sequence[RankReplay]) -> Timeline:
    """Tell what happened when in a replay that was run."""
    tracks: list[Track] = []
    spans: list[Span] = []
    steps: list[Step] = []
    for rank_replay in replays:
        _tell(placement, rank_replay, tracks, spans, steps)
    return Timeline(
        name=placement.graph.name,
        origin="predicted",
        ranks=tuple(RankInfo(r.rank, r.device, r.device_name, r.memory_bytes, r.outside) for r in placement.ranks),
        tracks=tuple(tracks),
        spans=tuple(spans),
        steps=tuple(steps),
        memory=tuple(sample for r in replays for sample in r.memory.samples),
        peaks=tuple(peak for r in replays if (peak := r.memory.peak()) is not None),
        out_of_memory=tuple(r.memory.out_of_memory for r in replays if r.memory.out_of_memory is not None),
        warnings=placement.graph.warnings + placement.warnings,
    )


def _tell(
    placement: Placement, replayed: RankReplay, tracks: list[Track], spans: list[Span], steps: list[Step]
) -> None:
    placed = replayed.placed
    program = placement.graph.programs[placed.program]
    first_track = len(tracks)
    tracks.extend(Track(placed.rank, lane.kind, lane.id, lane.name) for lane in program.lanes)
    start, end, costs = replayed.moments.start, replayed.moments.end, placed.costs
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
                track=first_track + op.lane,
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


def _kind(op: Op) -> SpanKind:
    if isinstance(op, Kernel):
        return "compute"
    if isinstance(op, Collective):
        return "communication"
    if isinstance(op, Copy):
        return "memset" if op.kind == "memset" else "memcpy"
    return "host" if getattr(op, "work", None) is None else "compute"
