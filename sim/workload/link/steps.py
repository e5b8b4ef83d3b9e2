"""Training steps: the ProfilerStep regions of the main thread as marks; without any, the whole trace is one step."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from sim.workload.link.host import steps
from sim.workload.link.nodes import Node, RankLines

WHOLE_TRACE = "trace"
CUT = "first steps that began while the device still did what was launched before the trace: not a whole step"


@dataclass(frozen=True)
class StepMark:
    """One edge of a step."""

    name: str
    step: int
    edge: Literal["begin", "end"]


@dataclass(frozen=True)
class StepSpan:
    """A step as the trace measured it, in nanoseconds of the trace's clock."""

    name: str
    step: int
    start_ns: int
    end_ns: int


def find_steps(lines: RankLines) -> list[StepSpan]:
    """The steps of a rank; ``[trace]`` alone where the profiler marked none."""
    found = [
        StepSpan(event.name, _number(event.name, i), event.start_ns, event.end_ns)
        for i, event in enumerate(steps(lines.trace, lines.main))
    ]
    return found or [StepSpan(WHOLE_TRACE, 0, lines.origin, _end(lines))]


def add_marks(lines: RankLines, found: list[StepSpan]) -> None:
    """Put the steps' marks into the main thread's line; call before its nodes are final."""
    main = lines.threads[lines.main]
    for step in found:
        for edge, time in (("begin", step.start_ns), ("end", step.end_ns)):
            node = Node("mark", main.lane, step.name, time, time)
            node.detail = StepMark(step.name, step.step, "begin" if edge == "begin" else "end")
            if step.name == WHOLE_TRACE and edge == "end":
                node.after = [stream.nodes[-1] for stream in lines.streams.values() if stream.nodes]
            main.nodes.append(node)
    main.nodes.sort(key=_place)


def count_cut(lines: RankLines, found: list[StepSpan]) -> None:
    """Count a first step that the profiler did not see whole: the device was still at work that it had not recorded."""
    first = found[0]
    if first.name == WHOLE_TRACE:
        return
    nodes = [node for stream in lines.streams.values() for node in stream.nodes]
    if any(node.launch is None and node.start < first.end_ns and node.end > first.start_ns for node in nodes):
        lines.counts[CUT] += 1


def _place(node: Node) -> tuple[int, int]:
    """An end at the instant of a beginning comes first, and both hold what happens at that instant inside."""
    if not isinstance(node.detail, StepMark):
        return node.start, 1
    return node.start, 0 if node.detail.edge == "end" else -1 if node.name == WHOLE_TRACE else 0


def _end(lines: RankLines) -> int:
    ends = [node.end for stream in lines.streams.values() for node in stream.nodes]
    ends += [end for line in lines.threads for _, end in line.busy[-1:]]
    return max(ends, default=lines.origin)


def _number(name: str, otherwise: int) -> int:
    found = re.search(r"\d+$", name)
    return int(found.group()) if found else otherwise
