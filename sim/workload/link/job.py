"""A job's traces as a whole: from files to the operation graph and the measured timeline."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from sim.errors import UserError
from sim.graph import OpGraph, Program, RankProgram
from sim.ops import Lane
from sim.timeline import RankInfo, Timeline
from sim.workload.kineto import KinetoTrace
from sim.workload.link import cpu, device, handoff, host, memory, program, ranks, steps, streamwaits, waiting
from sim.workload.link.collectives import find_collectives
from sim.workload.link.measured import MeasuredRank, measured_timeline
from sim.workload.link.nodes import Call, Node, RankLines, ThreadLine
from sim.workload.link.steps import StepSpan
from sim.workload.link.works import Works


@dataclass(frozen=True)
class Linked:
    """The same run twice: as what has to be done in which order, and as what was measured."""

    graph: OpGraph
    measured: Timeline


def graph_from_traces(traces: list[KinetoTrace]) -> OpGraph:
    """The operations of a job with all that a replay needs; UserError where the traces cannot belong together."""
    return link_traces(traces).graph


def timeline_from_traces(traces: list[KinetoTrace]) -> Timeline:
    """What the traces measured; ``op`` of each span is its operation in ``graph_from_traces``."""
    return link_traces(traces).measured


def link_traces(traces: list[KinetoTrace]) -> Linked:
    """Graph and measured timeline of one job's traces."""
    if not traces:
        raise UserError("no traces; give a torch.profiler trace, or a folder with one per rank")
    numbers, warnings = ranks.assign_ranks(traces)
    jobs = sorted((_Rank(trace, rank) for trace, rank in zip(traces, numbers, strict=True)), key=lambda j: j.lines.rank)
    groups = _meet(jobs)
    for job in jobs:
        job.settle()
    works = Works()
    programs = tuple(job.program(works) for job in jobs)
    lines = [job.lines for job in jobs]
    name = Path(traces[0].path).parent.name if len(traces) > 1 else Path(traces[0].path).name
    missing = ranks.missing_ranks(lines, groups)
    if missing:
        warnings.append(
            f"{len(missing)} ranks are not among the traces ({_some(missing)}): their part in collectives is taken"
            f" from the ranks that are there"
        )
    warnings += ranks.missing_steps(lines, [job.steps for job in jobs])
    warnings += _told(lines)
    graph = OpGraph(
        name=name,
        programs=programs,
        ranks=tuple(RankProgram(job.lines.rank, i, job.device_name) for i, job in enumerate(jobs)),
        works=tuple(works.found),
        groups={group: (members,) for group, members in groups.items()},
        warnings=tuple(warnings),
        provenance={"from": "kineto", "traces": ", ".join(Path(t.path).name for t in traces)},
    )
    graph.check()
    return Linked(graph, measured_timeline(name, [job.measured(i) for i, job in enumerate(jobs)], tuple(warnings)))


def _meet(jobs: list[_Rank]) -> dict[str, tuple[int, ...]]:
    """Match the collectives, put all ranks on the first one's clock and give them one origin."""
    lines = [job.lines for job in jobs]
    matched = ranks.match(lines, [job.collectives for job in jobs], [job.steps for job in jobs])
    offsets = ranks.clock_offsets(matched, lines)
    begin = min(line.origin - offsets[line.rank] for line in lines)
    for job in jobs:
        job.lines.offset = offsets[job.lines.rank]
        job.lines.origin = begin + job.lines.offset
    return ranks.settle(matched, lines)


def _told(lines: list[RankLines]) -> list[str]:
    """What was tolerated, each with its count over all ranks."""
    counts: Counter[str] = Counter()
    for line in lines:
        counts.update(line.counts)
        for why, count in line.trace.skipped.items():
            counts[f"events skipped because of {why}"] += count
    return [f"{count} {what}" for what, count in sorted(counts.items()) if count]


def _some(numbers: list[int]) -> str:
    shown = ", ".join(str(n) for n in numbers[:8])
    return f"{shown}, ..." if len(numbers) > 8 else shown


class _Rank:
    """One rank on its way from events to a program."""

    def __init__(self, trace: KinetoTrace, rank: int) -> None:
        self.lines = lines = RankLines(trace, rank)
        self.lanes: list[Lane] = host.thread_lanes(trace)
        lines.threads = host.thread_lines(trace)
        if not lines.threads:
            lines.counts["traces without host events: the gaps between kernels are kept as they are"] += 1
            self.lanes, lines.threads = [Lane("thread", 0, "host")], [ThreadLine(0)]
        lines.main = host.main_thread(trace, lines.threads)
        self.lanes += device.build_streams(lines, len(self.lanes))
        lines.origin = _origin(lines)
        self.collectives = cpu.add_ops(lines) if trace.cpu_is_device else find_collectives(lines)
        self.steps: list[StepSpan] = steps.find_steps(lines)
        self.device = next(iter(lines.streams))[0] if lines.streams else 0
        self.nodes: list[Node] = []

    def settle(self) -> None:
        """All dependencies, then the durations that remain."""
        lines = self.lines
        waiting.find_waits(lines)
        for line in lines.threads:
            line.nodes += [node for call in line.calls for node in _call_nodes(call)]
        memory.add_memory(lines)
        steps.add_marks(lines, self.steps)
        for line in lines.threads:
            line.ends = [node.end for node in line.nodes]
        if lines.trace.cpu_is_device:
            cpu.find_waits(lines)
        handoff.find_handoffs(lines)
        streamwaits.find_stream_waits(lines)
        device.settle_starts(lines)
        steps.count_cut(lines, self.steps)
        self.nodes = program.in_order(lines)
        program.settle_threads(lines)

    def program(self, works: Works) -> Program:
        return Program(tuple(self.lanes), program.operations(self.nodes, works))

    @property
    def device_name(self) -> str:
        """The name of the device the rank ran on, as the trace gives it."""
        if self.lines.trace.cpu_is_device:
            return "cpu"
        known = self.lines.trace.devices.get(self.device)
        return known.name if known is not None else f"gpu{self.device}"

    def measured(self, place: int) -> MeasuredRank:
        """What was measured; ``place`` is the rank's place among the job's ranks."""
        known = self.lines.trace.devices.get(self.device)
        device = RankInfo(self.lines.rank, f"gpu{place}", self.device_name, known.memory_bytes if known else None)
        return MeasuredRank(self.lines, self.lanes, self.nodes, self.steps, device)


def _origin(lines: RankLines) -> int:
    starts = [events[0].start_ns for events in (lines.trace.host, lines.trace.runtime) if events]
    starts += [stream.nodes[0].start for stream in lines.streams.values()]
    return min(starts)


def _call_nodes(call: Call) -> list[Node]:
    """A call as operations: those that neither launch nor wait are the thread's own time between others.

    A call that waits for what it launched itself is two: it launches, then it waits.
    """
    if call.launched and any(node in call.launched for node in call.waits):
        waiting_part = Node("call", call.lane, call.name, call.start, call.end)
        waiting_part.waits, waiting_part.own = call.waits, call.own
        call.waits, call.own, call.end = [], 0, call.start
        return [call, waiting_part]
    if call.launched or call.waits or call.plain_name in _KEPT:
        return [call]
    return []


_KEPT = frozenset(
    {*waiting.SYNC_DEVICE, *waiting.SYNC_STREAM, *waiting.SYNC_EVENT, *waiting.RELEASES, *waiting.ALLOCATES,
     *device.LAUNCH_NAMES}
)  # fmt: skip
