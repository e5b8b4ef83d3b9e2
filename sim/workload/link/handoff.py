"""Threads that wait for each other: backward() blocks the thread that calls it while the autograd thread works.

A trace does not record such waits: the waiting thread is merely silent.  A thread that was silent while another
worked, and went on when that one had finished, waited for it; its next operation comes ``after`` the other's last.
The same rule wakes the autograd thread after the forward pass of the main thread.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from sim.workload.link.host import union
from sim.workload.link.nodes import Node, RankLines, ThreadLine

# A shorter silence is the thread's own work between two ops (Python, a few microseconds a line).
SILENCE_NS = 50_000
# A thread that works through this share of another's silence is what the other waits for, even if it goes on after.
SHARE = 0.5


def find_handoffs(lines: RankLines) -> None:
    """Fill ``after`` of the first operation of each thread after a silence that another thread filled."""
    workers = [line for line in lines.threads if _works(line) and not line.told]
    if len(workers) < 2:
        return
    for line in workers:
        line.busy = union(line.busy, [(node.start, node.end) for node in line.nodes])
    for line in workers:
        others = [other for other in workers if other is not line]
        for begin, end in silences(line, lines.origin):
            node = line.first_from(end)
            if node is not None:
                _wake(node, begin, end, others)


def _works(line: ThreadLine) -> bool:
    """Whether a thread does any work for the device (a watchdog that only asks events does not)."""
    return any(node.kind != "mark" for node in line.nodes)


def silences(line: ThreadLine, origin: int) -> list[tuple[int, int]]:
    """When the thread did nothing that the trace tells, in order of time."""
    ends = [origin, *(end for _, end in line.busy)]
    return [(end, start) for end, (start, _) in zip(ends, line.busy, strict=False) if start - end >= SILENCE_NS]


def _wake(node: Node, begin: int, end: int, others: list[ThreadLine]) -> None:
    for other in others:
        last = other.last_ended_before(end)
        if last is None or last.end <= begin or last.start >= node.start or last in node.after:
            continue
        first, stop, resumes = _activity(other, begin, end)
        finished = resumes is None or resumes - end >= SILENCE_NS
        if finished or stop - first >= SHARE * (end - begin):
            node.after.append(last)


def _activity(line: ThreadLine, begin: int, end: int) -> tuple[int, int, int | None]:
    """When a thread first and last was busy between two times, and when it is busy again afterwards."""
    low = bisect_right(line.busy, begin, key=lambda b: b[1])
    high = bisect_left(line.busy, end, key=lambda b: b[0])
    if low >= high:
        return begin, begin, line.busy[high][0] if high < len(line.busy) else None
    first, stop = max(begin, line.busy[low][0]), line.busy[high - 1][1]
    if stop > end:
        return first, end, end
    return first, stop, line.busy[high][0] if high < len(line.busy) else None
