"""Several ranks of one job: which file is which rank, whose clock is how far off, and where collectives meet."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import median_low

from sim.errors import InputError, UserError
from sim.workload.kineto import KinetoTrace
from sim.workload.link.meeting import Meeting
from sim.workload.link.nodes import Node, RankLines
from sim.workload.link.steps import StepSpan

# rank3.pt.trace.json, rank-3, rank_3of8, worker3.1623143089.pt.trace.json (torch-tb-profiler's worker names)
_RANK_IN_NAME = re.compile(r"(?:rank|worker|gpu)[-_]?(\d+)", re.IGNORECASE)
# A rank may receive less than another gives (all_to_all with its own splits), so only these must agree in bytes.
_SAME_BYTES = frozenset({"all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce"})
# Kinds that end on all ranks at once: nobody has the result before everybody has given.
_ALIKE = frozenset({"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "barrier"})


def assign_ranks(traces: list[KinetoTrace]) -> tuple[list[int], list[str]]:
    """The rank of each trace: what it says itself, else its file's name, else its place; and what was assumed."""
    ranks: list[int] = []
    warnings: list[str] = []
    for place, trace in enumerate(traces):
        named = _RANK_IN_NAME.search(Path(trace.path).name)
        if trace.rank is not None:
            ranks.append(trace.rank)
        elif named and len(traces) > 1:
            ranks.append(int(named.group(1)))
        else:
            ranks.append(place if len(traces) > 1 else 0)
            if len(traces) > 1:
                warnings.append(f"{Path(trace.path).name} does not say its rank: taken as rank {place}")
    first: dict[int, KinetoTrace] = {}
    for rank, trace in zip(ranks, traces, strict=True):
        if rank in first:
            raise InputError(
                trace.path, f"rank {rank} again: {Path(first[rank].path).name} is the same rank; give one file per rank"
            )
        first[rank] = trace
    return ranks, warnings


class Matched:
    """One collective of a group with the node of each rank that took part."""

    def __init__(self, nodes: dict[int, Node]) -> None:
        self.nodes = nodes

    def meeting(self, rank: int) -> Meeting:
        detail = self.nodes[rank].detail
        assert isinstance(detail, Meeting)
        return detail


def match(lines: list[RankLines], nodes: list[list[Node]], steps: list[list[StepSpan]]) -> list[Matched]:
    """Which collective of one rank meets which of the others."""
    places: dict[tuple[str, object], dict[int, Node]] = defaultdict(dict)
    for rank_lines, rank_nodes, rank_steps in zip(lines, nodes, steps, strict=True):
        for key, node in _keys(rank_nodes, rank_steps):
            places[key][rank_lines.rank] = node
    return [Matched(found) for found in places.values()]


def _keys(nodes: list[Node], steps: list[StepSpan]) -> list[tuple[tuple[str, object], Node]]:
    """A collective's place: its group with the sequence number, or with the step and the place in the step.

    What comes before the first step is counted from its end: that is where the profiler began.
    """
    keyed: list[tuple[tuple[str, object], Node]] = []
    parts: defaultdict[tuple[str, str], list[Node]] = defaultdict(list)
    for node in nodes:
        meeting = node.detail
        assert isinstance(meeting, Meeting)
        if meeting.recorded_seq is not None and meeting.peer is None:
            keyed.append(((meeting.group, (meeting.recorded_seq, meeting.kind)), node))
        else:
            parts[meeting.group, _step_at(node, steps)].append(node)
    for (group, step), part in parts.items():
        offset = -len(part) if step == "" else 0
        keyed.extend(((group, (step, offset + i)), node) for i, node in enumerate(part))
    return keyed


def _step_at(node: Node, steps: list[StepSpan]) -> str:
    time = node.launch.start if node.launch is not None else node.start
    begun = [step.name for step in steps if step.start_ns <= time]
    return begun[-1] if begun else ""


def clock_offsets(matched: list[Matched], lines: list[RankLines]) -> dict[int, int]:
    """How far each rank's clock is ahead of the first rank's: all ranks see a collective end at the same time.

    Ranks of one host share a clock; what their ends differ by is then scatter, not an offset, and is left alone.
    Between CPUs the ends differ by when each thread gets to run, so there the host's name decides.
    """
    reference = lines[0].rank
    differences: defaultdict[int, list[int]] = defaultdict(list)
    for one in matched:
        if reference in one.nodes and one.meeting(reference).kind in _ALIKE:
            for rank, node in one.nodes.items():
                differences[rank].append(node.end - one.nodes[reference].end)
    return {
        line.rank: 0 if _same_clock(line.trace, lines[0].trace) else _offset(differences[line.rank]) for line in lines
    }


def _same_clock(one: KinetoTrace, other: KinetoTrace) -> bool:
    return one.cpu_is_device and other.cpu_is_device and one.host_name == other.host_name != ""


def _offset(differences: list[int]) -> int:
    if not differences:
        return 0
    offset = median_low(differences)
    scatter = median_low(abs(d - offset) for d in differences)
    return offset if abs(offset) > 3 * scatter else 0


def settle(matched: list[Matched], lines: list[RankLines]) -> dict[str, tuple[int, ...]]:
    """Give the ranks of each collective one sequence number, size and transfer time; returns the groups.

    The transfer is what the last rank to arrive measured: the shortest of the kernels.  Where only some of the
    present ranks took part in a collective, those are a group of their own.
    """
    present = {line.rank for line in lines}
    by_rank = {line.rank: line for line in lines}
    counts: Counter[str] = Counter()
    groups: dict[str, tuple[int, ...]] = {}
    for one in sorted(matched, key=lambda m: min((n.start, r) for r, n in m.nodes.items())):
        ranks = sorted(one.nodes)
        meetings = [one.meeting(rank) for rank in ranks]
        _agree(ranks, meetings)
        members = tuple(sorted({*ranks, *(m for meeting in meetings for m in meeting.members)}))
        group = meetings[0].group
        if set(ranks) != present & set(members):
            absent = sorted(present & set(members) - set(ranks))
            for rank in ranks:
                by_rank[rank].counts[f"collectives that rank {_list(absent)} has no part in: met without it"] += 1
            group, members = f"{group} of {_list(ranks)}", tuple(m for m in members if m not in absent)
        transfer = min(one.nodes[rank].own for rank in ranks)
        if all(one.nodes[rank].tail is not None for rank in ranks):
            transfer = _end_together([(by_rank[rank].offset, one.nodes[rank]) for rank in ranks])
        size = max(meeting.bytes for meeting in meetings)
        group = _group_name(groups, group, members)
        for rank, meeting in zip(ranks, meetings, strict=True):
            one.nodes[rank].own = transfer
            one.nodes[rank].detail = replace(meeting, bytes=size, group=group, seq=counts[group], members=members)
        counts[group] += 1
    return groups


def _end_together(arrived: list[tuple[int, Node]]) -> int:
    """Collectives on host threads: each thread returns when it gets to run, so the transfer ends with the first.

    What the others take until they return is their own; it moves to the call that follows the collective.
    """
    begin = max(node.start - offset for offset, node in arrived)
    end = max(begin, min(node.end - offset for offset, node in arrived))
    for offset, node in arrived:
        assert node.tail is not None
        node.tail.own = max(0, node.end - offset - end)
        node.end = node.tail.start = end + offset
        node.tail.end = node.tail.start + node.tail.own
    return end - begin


def _group_name(groups: dict[str, tuple[int, ...]], name: str, members: tuple[int, ...]) -> str:
    """The group's name; the same name with other members (each rank counts its own groups) is another group."""
    while groups.setdefault(name, members) != members:
        name = f"{name}'"
    return name


def _agree(ranks: list[int], meetings: list[Meeting]) -> None:
    first = meetings[0]
    for rank, meeting in zip(ranks[1:], meetings[1:], strict=True):
        pair = {first.kind, meeting.kind}
        same_kind = len(pair) == 1 or pair == {"send", "recv"}
        same_bytes = first.kind not in _SAME_BYTES or first.bytes == meeting.bytes
        if not same_kind or not same_bytes:
            raise UserError(
                f"ranks {ranks[0]} and {rank} disagree about collective {first.seq} of process group {first.group!r}:"
                f" {first.kind} of {first.bytes} bytes and {meeting.kind} of {meeting.bytes} bytes;"
                " give traces of one run, all of the same steps"
            )


def _list(ranks: list[int]) -> str:
    return ", ".join(str(rank) for rank in ranks)


def missing_ranks(lines: list[RankLines], groups: dict[str, tuple[int, ...]]) -> list[int]:
    """Ranks that took part in the job's collectives and whose traces are not there."""
    present = {line.rank for line in lines}
    return sorted({member for members in groups.values() for member in members} - present)


def missing_steps(lines: list[RankLines], steps: list[list[StepSpan]]) -> list[str]:
    """Which steps some ranks have and others have not."""
    names = [[step.name for step in rank_steps] for rank_steps in steps]
    every = dict.fromkeys(name for rank_names in names for name in rank_names)
    told = []
    for name in every:
        without = [line.rank for line, rank_names in zip(lines, names, strict=True) if name not in rank_names]
        if without:
            told.append(f"{name} is not in the trace of rank {_list(without)}")
    return told
