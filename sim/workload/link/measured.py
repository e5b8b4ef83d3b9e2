"""The measured timeline: what a trace says happened when, in the form in which a replay's prediction is told."""

from __future__ import annotations

from dataclasses import dataclass

from sim.ops import Lane
from sim.timeline import CollectiveInfo, MemorySample, RankInfo, Span, SpanKind, Step, Timeline, Track
from sim.workload.kineto import DeviceEvent
from sim.workload.link.meeting import Meeting
from sim.workload.link.nodes import Node, RankLines
from sim.workload.link.steps import StepSpan


@dataclass(frozen=True)
class MeasuredRank:
    """One linked rank: its operations in program order."""

    lines: RankLines
    lanes: list[Lane]
    nodes: list[Node]
    steps: list[StepSpan]
    device: RankInfo


def measured_timeline(name: str, measured: list[MeasuredRank], warnings: tuple[str, ...]) -> Timeline:
    """All ranks on one clock, whose zero is the first event of any."""
    tracks: list[Track] = []
    spans: list[Span] = []
    steps: list[Step] = []
    memory: list[MemorySample] = []
    for rank in measured:
        origin, number = rank.lines.origin, rank.lines.rank
        spans.extend(_spans(rank, origin, len(tracks), len(spans)))
        tracks.extend(Track(number, lane.kind, lane.id, lane.name) for lane in rank.lanes)
        steps.extend(Step(number, s.step, s.name, s.start_ns - origin, s.end_ns - origin) for s in rank.steps)
        memory.extend(
            MemorySample(number, m.time_ns - origin, m.allocated, m.reserved)
            for m in rank.lines.trace.memory
            if m.allocated is not None and m.reserved is not None
        )
    return Timeline(
        name=name,
        origin="measured",
        ranks=tuple(rank.device for rank in measured),
        tracks=tuple(tracks),
        spans=tuple(spans),
        steps=tuple(steps),
        memory=tuple(memory),
        warnings=warnings,
    )


def _spans(rank: MeasuredRank, origin: int, track: int, first: int) -> list[Span]:
    """Calls and device operations; ``launch`` is the span of the launching call, which comes earlier."""
    spans: list[Span] = []
    places: dict[int, int] = {}
    for node in rank.nodes:
        kind = _kind(node)
        if kind is None:
            continue
        places[node.index] = first + len(spans)
        launch = places.get(node.launch.index, -1) if node.launch is not None else -1
        start, duration = max(0, node.start - origin), node.end - node.start
        if isinstance(node.detail, Meeting):
            spans.append(
                Span(track + node.lane, node.index, node.name, kind, start, duration, "measured", launch, node.own,
                     _collective(node.detail))
            )  # fmt: skip
        else:
            spans.append(Span(track + node.lane, node.index, node.name, kind, start, duration, "measured", launch))
    return spans


def _kind(node: Node) -> SpanKind | None:
    if node.kind == "call":
        return "host" if node.work is None else "compute"
    if node.kind == "kernel":
        return "compute"
    if node.kind == "collective":
        return "communication"
    if node.kind == "copy":
        return "memset" if isinstance(node.detail, DeviceEvent) and node.detail.kind == "memset" else "memcpy"
    return None


def _collective(meeting: Meeting) -> CollectiveInfo:
    return CollectiveInfo(
        meeting.kind, meeting.bytes, len(meeting.members), "as captured", "as captured", meeting.group, meeting.seq
    )
