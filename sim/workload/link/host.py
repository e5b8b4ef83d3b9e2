"""Host threads: which calls each made, inside which op, and when it was silent."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from sim.ops import Lane
from sim.workload.kineto import HostEvent, KinetoTrace, RuntimeEvent
from sim.workload.link.nodes import Call, ThreadLine

STEP = "ProfilerStep#"


def thread_lines(trace: KinetoTrace) -> list[ThreadLine]:
    """One line for each thread of the trace, in the trace's order; each call knows the op it was made in."""
    alias = _threads_without_a_name(trace)
    events: list[list[HostEvent]] = [[] for _ in trace.threads]
    calls: list[list[RuntimeEvent]] = [[] for _ in trace.threads]
    for event in trace.host:
        events[event.thread].append(event)
    for call in trace.runtime:
        calls[alias.get(call.thread, call.thread)].append(call)
    return [_line(i, events[i], calls[i]) for i in range(len(trace.threads))]


def thread_lanes(trace: KinetoTrace) -> list[Lane]:
    """The lanes of the threads, in the trace's order."""
    return [Lane("thread", thread.tid, thread.name) for thread in trace.threads]


def main_thread(trace: KinetoTrace, lines: list[ThreadLine]) -> int:
    """The thread that the steps are marked on; without marks the process' first thread, or the busiest."""
    marked = Counter(e.thread for e in trace.host if e.annotation and e.name.startswith(STEP))

    def rank(i: int) -> tuple[int, bool, int, int]:
        thread = trace.threads[i]
        return marked[i], thread.pid == thread.tid, len(lines[i].calls) + len(lines[i].busy), -i

    return max(range(len(trace.threads)), key=rank, default=0)


def steps(trace: KinetoTrace, main: int) -> list[HostEvent]:
    """The main thread's ProfilerStep regions, in order; one that begins inside another is no step."""
    found: list[HostEvent] = []
    for event in trace.host:
        marked = event.thread == main and event.annotation and event.name.startswith(STEP)
        if marked and (not found or event.start_ns >= found[-1].end_ns):
            found.append(event)
    return found


def _threads_without_a_name(trace: KinetoTrace) -> dict[int, int]:
    """Threads that only appear with calls (Kineto could not name them), and the thread whose ops made those calls.

    The external id of a call is the id of the op it was made in; the call must lie inside that op.
    """
    named = {event.thread for event in trace.host}
    unnamed = {call.thread for call in trace.runtime} - named
    if not unnamed:
        return {}
    ops: dict[int, HostEvent] = {}
    for event in trace.host:
        external = event.args.external if event.args.external is not None else event.args.external_old
        if external is not None:
            ops[external] = event
    votes: defaultdict[int, Counter[int]] = defaultdict(Counter)
    for call in trace.runtime:
        if call.thread in unnamed:
            op = ops.get(call.external)
            inside = op is not None and op.start_ns <= call.start_ns <= op.end_ns
            votes[call.thread][op.thread if op is not None and inside else -1] += 1
    winners = {thread: counts.most_common(1)[0][0] for thread, counts in votes.items()}
    return {thread: winner for thread, winner in winners.items() if winner >= 0}


def _line(lane: int, events: list[HostEvent], calls: Iterable[RuntimeEvent]) -> ThreadLine:
    line = ThreadLine(lane)
    line.ops = [event for event in events if not event.annotation]
    line.calls = [Call(lane, event) for event in calls]
    for call, op in zip(line.calls, innermost(line.ops, [call.start for call in line.calls]), strict=True):
        call.op = op
    line.busy = union([(op.start_ns, op.end_ns) for op in line.ops], [(c.start, c.end) for c in line.calls])
    return line


def innermost(ops: list[HostEvent], times: list[int]) -> list[HostEvent | None]:
    """The innermost op of a thread that was open at each of the times; both are in order, ops by their start."""
    found: list[HostEvent | None] = []
    stack: list[HostEvent] = []
    place = 0
    for time in times:
        while place < len(ops) and ops[place].start_ns <= time:
            op = ops[place]
            while stack and stack[-1].end_ns <= op.start_ns:
                stack.pop()
            stack.append(op)
            place += 1
        while stack and stack[-1].end_ns < time:
            stack.pop()
        found.append(stack[-1] if stack else None)
    return found


def union(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The times covered by either list, as intervals that do not touch."""
    joined: list[tuple[int, int]] = []
    begin, end = 0, -1
    for start, stop in sorted(first + second):
        if start <= end:
            end = max(end, stop)
        else:
            if end >= begin:
                joined.append((begin, end))
            begin, end = start, stop
    if end >= begin:
        joined.append((begin, end))
    return joined
