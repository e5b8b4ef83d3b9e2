"""Waiting: which host calls returned only when the device had finished something, and what that was.

Four ways in which a host thread waits for its device, each turned from recorded time into a dependency:

* synchronising calls (stream, event, device), through the trace's cuda_sync events where it has them, else by name
  and time;
* copies to and from pageable memory, and blocking copies, which return when the copy is done;
* calls that find the launch queue full: the driver holds a launch back until an earlier operation is finished;
* loops that ask an event again and again.

The call's own duration is what remains after the awaited operation ended.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from statistics import median_low

from sim.workload.kineto import SyncEvent
from sim.workload.link.nodes import CLOCK_TOLERANCE_NS, Call, Node, RankLines, Stream, ThreadLine

SYNC_DEVICE = frozenset({"DeviceSynchronize", "CtxSynchronize", "ThreadSynchronize"})
SYNC_STREAM = frozenset({"StreamSynchronize"})
SYNC_EVENT = frozenset({"EventSynchronize"})
# Releasing memory synchronises the device implicitly (CUDA C programming guide, "Implicit synchronization").
RELEASES = frozenset({"Free", "FreeHost", "HostFree", "FreeArray", "HostUnregister", "ModuleUnload"})
ALLOCATES = frozenset(
    {"Malloc", "HostAlloc", "MallocHost", "HostMalloc", "HostRegister", "MallocPitch", "MallocManaged"}
)
COPIES_WAITING = frozenset({"Memcpy", "Memcpy2D", "MemcpyHtoD", "MemcpyDtoH", "MemcpyDtoD", "MemcpyWithStream",
                            "MemcpyToSymbol", "MemcpyFromSymbol"})  # fmt: skip
QUERIES = frozenset({"EventQuery", "StreamQuery"})

# How many operations a stream holds, the one being launched included, when a launch returns.  Measured on a V100
# (v100-1gpu-steady of HolisticTraceAnalysis): launches block when 1,023 are outstanding and return when 1,022 are.
# A trace that shows more outstanding has a deeper queue, and that one is used.
QUEUE_DEPTH = 1_022
# A call in a queue fuller than this that takes many times its usual time was held back by the queue.
NEARLY_FULL = 0.95
HELD_BACK = 4
# A loop of queries shorter than this is the caching allocator looking through its events once.
POLLING_NS = 200_000


def find_waits(lines: RankLines) -> None:
    """Fill ``waits`` and ``own`` of the calls of every thread."""
    syncs = {sync.correlation: sync for sync in lines.trace.syncs if sync.correlation >= 0}
    records = _calls_by_correlation(lines) if syncs else {}
    by_lane = {stream.lane: stream for stream in lines.streams.values()}
    for line in lines.threads:
        last_stream: Stream | None = None
        for call in line.calls:
            if call.launched:
                last_stream = by_lane[call.launched[-1].lane]
                _wait_for_copy(call)
            elif call.plain_name in SYNC_DEVICE:
                _wait_for(call, _all_launched(lines, call), lines)
            elif call.plain_name in SYNC_STREAM:
                _wait_for(call, _stream_work(lines, call, syncs.get(call.correlation), last_stream), lines)
            elif call.plain_name in SYNC_EVENT:
                _wait_for(call, _event_work(lines, call, syncs.get(call.correlation), records), lines)
            elif call.plain_name in RELEASES or call.plain_name in ALLOCATES:
                _wait_for_memory(call, lines)
        _find_polling(line, lines)
    _find_full_queues(lines)


def _calls_by_correlation(lines: RankLines) -> dict[int, Call]:
    return {call.correlation: call for line in lines.threads for call in line.calls}


def _all_launched(lines: RankLines, call: Call) -> list[Node]:
    last = (stream.last_launched_before(call.start) for stream in lines.streams.values())
    return [node for node in last if node is not None]


def _stream_work(lines: RankLines, call: Call, sync: SyncEvent | None, last_stream: Stream | None) -> list[Node]:
    """The last operation of the stream that was synchronised: named by the trace, or the one that fits the time.

    A stream fits if its last operation had ended when the call returned; of those the thread's own last one is
    taken, unless another ended while the call waited, and later.
    """
    if sync is not None:
        named = [s for s in lines.streams.values() if s.number == sync.stream]
        if named:
            return [n for s in named if (n := s.last_launched_before(call.start)) is not None]
    fitting = [
        (node.end, stream is last_stream, node)
        for stream in lines.streams.values()
        if (node := stream.last_launched_before(call.start)) is not None and node.end <= call.end + CLOCK_TOLERANCE_NS
    ]
    waited = [f for f in fitting if f[0] > call.start]
    own = [f for f in fitting if f[1]]
    chosen = max(waited, key=lambda f: f[:2], default=None) or (own[0] if own else None)
    return [chosen[2]] if chosen else []


def _event_work(lines: RankLines, call: Call, sync: SyncEvent | None, records: dict[int, Call]) -> list[Node]:
    """What the event stood for: what was on its stream when it was recorded; without a record, what had just ended."""
    record = records.get(sync.wait_record) if sync is not None and sync.wait_record >= 0 else None
    if sync is not None and record is not None:
        named = [s for s in lines.streams.values() if s.number == sync.wait_stream]
        return [n for s in named if (n := s.last_launched_before(record.start)) is not None]
    ended = [n for n in (_last_ended(s, call.end) for s in lines.streams.values()) if n is not None]
    latest = max(ended, key=lambda n: n.end, default=None)
    if latest is None or latest.end <= call.start or not _launched_before(latest, call):
        return []
    return [latest]


def _last_ended(stream: Stream, time: int) -> Node | None:
    place = bisect_right(stream.nodes, time + CLOCK_TOLERANCE_NS, key=lambda n: n.end)
    return stream.nodes[place - 1] if place else None


def _launched_before(node: Node, call: Call) -> bool:
    return node.launch is None or node.launch.start < call.start


def _wait_for(call: Call, awaited: list[Node], lines: RankLines) -> None:
    """``call`` returns after ``awaited``; what the trace contradicts is left out and counted.

    An operation that was under way when the call returned is waited for all the same: the clocks of host and device
    are not aligned better in some traces.
    """
    fitting = [node for node in awaited if node.start < call.end]
    if awaited and not fitting:
        lines.counts["synchronising calls that return before what they wait for has begun: not waited for"] += 1
    if fitting:
        call.waits = fitting
        call.own = max(0, call.end - max(call.start, *(node.end for node in fitting)))


def _wait_for_copy(call: Call) -> None:
    """A copy that the host stages or awaits: the call returns when the copy has ended, or nearly."""
    copies = [node for node in call.launched if node.kind == "copy"]
    if not copies or "Memset" in call.plain_name:
        return
    copy = copies[-1]
    staged = "Pageable" in copy.name or call.plain_name in COPIES_WAITING
    if staged and call.end >= (copy.start + copy.end) // 2:
        call.waits = [copy]
        call.own = max(0, call.end - max(call.start, copy.end))


def _wait_for_memory(call: Call, lines: RankLines) -> None:
    """cudaFree waits for the device; an allocation only where it returned just as the device became idle."""
    launched = _all_launched(lines, call)
    if not launched or any(node.end > call.end + CLOCK_TOLERANCE_NS for node in launched):
        return
    idle = max(node.end for node in launched)
    if call.plain_name in RELEASES or (idle > call.start and (call.end - idle) * 3 < call.end - call.start):
        _wait_for(call, launched, lines)


def _find_polling(line: ThreadLine, lines: RankLines) -> None:
    """A run of queries with nothing between them is a loop: one call, which waits for what ended before its last."""
    run: list[Call] = []
    for call in [*line.calls, None]:
        if call is not None and call.plain_name in QUERIES:
            run.append(call)
            continue
        if len(run) > 2 and run[-1].start - run[0].start > POLLING_NS:
            _end_of_polling(run, lines)
        run = []


def _end_of_polling(run: list[Call], lines: RankLines) -> None:
    ended = [n for n in (_last_ended(s, run[-1].start) for s in lines.streams.values()) if n is not None]
    latest = max(ended, key=lambda n: n.end, default=None)
    if latest is not None and latest.end > run[-2].start and _launched_before(latest, run[0]):
        loop = run[0]
        loop.end = run[-1].end
        loop.waits = [latest]
        loop.own = max(0, loop.end - max(loop.start, latest.end))


def _find_full_queues(lines: RankLines) -> None:
    usual = _usual_durations(lines)
    for stream in lines.streams.values():
        if len(stream.by_launch) > QUEUE_DEPTH:
            _Queue(stream, usual).hold_back()


def _usual_durations(lines: RankLines) -> dict[str, int]:
    durations: defaultdict[str, list[int]] = defaultdict(list)
    for line in lines.threads:
        for call in line.calls:
            durations[call.name].append(call.end - call.start)
    return {name: median_low(values) for name, values in durations.items()}


class _Queue:
    """The launch queue of one stream: how full it was at each launch, and which launches it held back."""

    def __init__(self, stream: Stream, usual: dict[str, int]) -> None:
        self.nodes = stream.by_launch
        self.ends = sorted(node.end for node in self.nodes)
        self.usual = usual
        # Outstanding when the call returned: itself and what was launched before it, less what had ended.
        self.left = [
            i + 1 - bisect_left(self.ends, node.launch.end) if node.launch is not None else 0
            for i, node in enumerate(self.nodes)
        ]
        self.depth = max(QUEUE_DEPTH, *self.left)

    def hold_back(self) -> None:
        for i, node in enumerate(self.nodes):
            call = node.launch
            if not isinstance(call, Call) or call.waits or i < self.depth:
                continue
            outstanding = i + 1 - bisect_left(self.ends, call.start)
            freed = self.nodes[i - self.depth]
            long = call.end - call.start > HELD_BACK * self.usual[call.name]
            if long and outstanding >= NEARLY_FULL * self.depth:
                # Other commands than operations take places too (event records), so the queue may have been full
                # a little earlier: it was the last operation to end before the call returned that made room.
                freed = self.nodes[max(i - self.depth, i - self.left[i])]
            if freed.end <= call.end + CLOCK_TOLERANCE_NS:
                call.waits = [freed]
                call.own = max(0, call.end - max(call.start, freed.end))
