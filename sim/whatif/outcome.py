"""One machine tried: the graph placed and replayed there, and what decided each of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sim.graph import OpGraph
from sim.ops import Collective, Kernel
from sim.place.place import place
from sim.place.placement import Flow, Placement
from sim.replay.allocator.config import AllocatorConfig
from sim.replay.critical import CriticalPaths, Segment
from sim.replay.engine import run
from sim.replay.replay import timeline_of
from sim.report.steps import job_steps, rank_views, slowest
from sim.report.summarize import summarize
from sim.report.summary import Summary
from sim.timeline import Timeline
from sim.topology.machine import Machine
from sim.units import format_bytes, ms_from_ns
from sim.whatif.energy import with_energy
from sim.whatif.ranges import Ranges, ranges

_FULL = 1 - 1e-9  # a lane that is full but for rounding


@dataclass(frozen=True)
class Rules:
    """How every machine of a what-if is replayed: whether anything is shared, the allocator's settings, and how many
    draws its ranges are made of (0: none)."""

    contention: bool = True
    allocator: AllocatorConfig | None = None
    draws: int = 0


DEFAULT_RULES = Rules()


@dataclass(frozen=True)
class Outcome:
    """What came of a placement: ``paths`` are the critical paths of the job's steps, in their order."""

    placement: Placement
    timeline: Timeline
    summary: Summary
    paths: tuple[tuple[Segment, ...], ...]
    drawn: Ranges | None = None

    @property
    def graph(self) -> OpGraph:
        return self.placement.graph

    def label(self, segment: Segment) -> str:
        """What a segment's operation is called in a ledger."""
        program = next(r.program for r in self.placement.ranks if r.rank == segment.rank)
        op = self.graph.programs[program].ops[segment.op]
        if isinstance(op, Collective):
            return collective_label(op.kind, op.bytes)
        if segment.part == "contention" and isinstance(op, Kernel):
            return "kernels beside NCCL's"
        return getattr(op, "name", "") or type(op).__name__.lower()


@dataclass(frozen=True)
class Spent:
    """Time on the critical path, a step: milliseconds and operations."""

    ms: float
    count: float


def collective_label(kind: str, nbytes: int) -> str:
    """``all_reduce 64.00 MiB``."""
    return f"{kind} {format_bytes(nbytes)}"


def outcome(graph: OpGraph, machine: Machine, gpus: Sequence[int] = (), rules: Rules = DEFAULT_RULES) -> Outcome:
    """Place, replay and walk back.  UserError as ``place`` and ``replay`` raise it."""
    return replayed(place(graph, machine, gpus), rules)


def replayed(placement: Placement, rules: Rules = DEFAULT_RULES) -> Outcome:
    """Replay a placement, and find what decides each of its job's steps (the slowest rank's)."""
    ran = run(placement, contention=rules.contention)
    timeline = timeline_of(ran, rules.allocator)
    paths = CriticalPaths(ran)
    steps = [slowest(steps) for steps in job_steps(rank_views(timeline))]
    summary = with_energy(summarize(timeline), placement, timeline)
    drawn = ranges(ran, timeline, rules.draws) if rules.draws else None
    return Outcome(
        placement,
        timeline,
        summary if drawn is None else drawn.on(summary),
        tuple(paths.path(step.rank, step.start_ns, step.end_ns) for step in steps),
        drawn,
    )


def spent(told: Outcome) -> dict[tuple[str, str], Spent]:
    """Per part and name of operation: time on the critical path and operations there, the mean over the steps."""
    time: dict[tuple[str, str], int] = {}
    ops: dict[tuple[str, str], int] = {}
    labels: dict[tuple[int, int, str], str] = {}
    programs = {placed.rank: placed.program for placed in told.placement.ranks}
    for path in told.paths:
        seen: set[tuple[str, int, int]] = set()
        for segment in path:
            code = (programs[segment.rank], segment.op, segment.part)
            if code not in labels:
                labels[code] = told.label(segment)
            key = (segment.part, labels[code])
            time[key] = time.get(key, 0) + segment.duration_ns
            if (segment.part, segment.rank, segment.op) not in seen:
                seen.add((segment.part, segment.rank, segment.op))
                ops[key] = ops.get(key, 0) + 1
    steps = len(told.paths)
    return {key: Spent(ms_from_ns(ns / steps), ops[key] / steps) for key, ns in time.items()}


def bounding_links(told: Outcome, part: str) -> tuple[str, ...]:
    """The classes of links that bound the transfers of one part of the critical paths, by name."""
    costs = {placed.rank: placed.costs for placed in told.placement.ranks}
    flows = {(s.rank, s.op): costs[s.rank].flows.get(s.op) for path in told.paths for s in path if s.part == part}
    return tuple(sorted({cls for flow in flows.values() if flow is not None for cls in bounding_classes(flow)}))


def bounding_classes(flow: Flow) -> set[str]:
    """The classes of the links that are full while the flow runs at its own rate."""
    return {link_class(lane) for lane, share in flow.shares if share >= _FULL}


def link_class(lane: str) -> str:
    """The class of a lane's link: ``pcie`` of ``pcie:gpu0>cpu0``."""
    return lane.partition(":")[0]


def collectives_a_step(told: Outcome) -> dict[str, float]:
    """How many collectives of each label one rank takes part in, a step (of the whole run's)."""
    counts: dict[str, float] = {}
    for row in told.summary.collectives:
        label = collective_label(row.kind, row.bytes)
        counts[label] = counts.get(label, 0) + row.count / len(told.paths)
    return counts
