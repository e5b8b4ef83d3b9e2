"""Streams that wait for each other: cudaStreamWaitEvent, and which operation it made which one wait for.

New traces say both (cuda_sync events).  Where they do not: the waiting operation is the next one launched after the
call; it waits for the last operation that another stream had been given by then, if that fits the recorded times
(an operation cannot have started before what it waits for had ended).  Work of a collective waits for the thread's
compute stream.  Where even the calls are missing, an operation that starts late, and just as another stream's
operation ends, waited for it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from sim.workload.link.nodes import CLOCK_TOLERANCE_NS, Call, Node, RankLines, Stream

# An operation that starts this long after it could have, and within the second time after another stream's
# operation ended, waited for that one.
LATE_NS = 20_000
RELEASED_NS = 10_000
# Operations of one cudaGraphLaunch need no event calls to wait for each other, and are quick to follow.
LATE_IN_GRAPH_NS = 3_000


def find_stream_waits(lines: RankLines) -> None:
    """Fill ``after`` of the device operations."""
    if len(lines.streams) < 2:
        return
    launches = sorted(
        (node.launch.start, i, node)
        for i, node in enumerate(node for stream in lines.streams.values() for node in stream.by_launch)
        if node.launch is not None
    )
    by_time = [(start, node) for start, _, node in launches]
    syncs = {s.correlation: s for s in lines.trace.syncs if s.kind == "Stream Wait Event" and s.correlation >= 0}
    records = {c.correlation: c for line in lines.threads for c in line.calls if c.plain_name.startswith("EventRecord")}
    for line in lines.threads:
        for call in line.calls:
            if not call.plain_name.startswith("StreamWaitEvent"):
                continue
            sync = syncs.get(call.correlation)
            if sync is not None and sync.stream >= 0:
                record = records.get(sync.wait_record)
                _told(lines, call, sync.stream, sync.wait_stream, record.start if record is not None else call.start)
            else:
                _inferred(lines, call, by_time)
    for stream in lines.streams.values():
        _late(lines, stream)


def _told(lines: RankLines, call: Call, waiting: int, awaited: int, recorded: int) -> None:
    for stream in lines.streams.values():
        if stream.number != waiting:
            continue
        place = bisect_left(stream.launch_times, call.start)
        other = lines.streams.get((stream.device, awaited))
        last = other.last_launched_before(recorded) if other is not None else None
        if place < len(stream.by_launch) and last is not None:
            _add(stream.by_launch[place], last)


def _inferred(lines: RankLines, call: Call, launches: list[tuple[int, Node]]) -> None:
    if _follows_a_collective(call, launches):
        return
    place = bisect_left(launches, call.start, key=lambda item: item[0])
    if place == len(launches):
        return
    node = launches[place][1]
    candidates = [
        last
        for stream in lines.streams.values()
        if stream.lane != node.lane and (last := stream.last_launched_before(call.start)) is not None
    ]
    fitting = [last for last in candidates if last.end <= node.start + CLOCK_TOLERANCE_NS]
    if node.kind == "collective":
        fitting = [last for last in fitting if _same_thread(last, call)] or fitting
    if fitting:
        _add(node, max(fitting, key=lambda last: last.end))


def _same_thread(node: Node, call: Call) -> bool:
    return node.launch is not None and node.launch.lane == call.lane


def _follows_a_collective(call: Call, launches: list[tuple[int, Node]]) -> bool:
    """The bookkeeping of torch.distributed after it launched a collective, still inside the same op."""
    place = bisect_left(launches, call.start, key=lambda item: item[0])
    if not place or call.op is None:
        return False
    start, node = launches[place - 1]
    return node.kind == "collective" and call.op.start_ns <= start and _same_thread(node, call)


def _add(node: Node, awaited: Node) -> None:
    if awaited.end <= node.start + CLOCK_TOLERANCE_NS and awaited.start < node.start and awaited not in node.after:
        node.after.append(awaited)


def _late(lines: RankLines, stream: Stream) -> None:
    """Operations that nothing recorded explains: look for what another stream finished just before."""
    free = 0
    for node in stream.nodes:
        ready = max(free, node.launch.end if node.launch is not None else node.start, *(n.end for n in node.after), 0)
        free = max(free, node.end)
        if node.start - ready < LATE_IN_GRAPH_NS:
            continue
        for other in lines.streams.values():
            place = bisect_right(other.nodes, node.start, key=lambda n: n.end)
            if other is stream or not place:
                continue
            last = other.nodes[place - 1]
            late = LATE_IN_GRAPH_NS if last.launch is not None and last.launch is node.launch else LATE_NS
            if node.start - last.end <= RELEASED_NS and last.end > ready and node.start - ready >= late:
                _add(node, last)
