"""Device streams: which call launched each operation, and what decided when it started.

A device operation starts when its stream is free (plus the device's turn-around, ``gap``), a latency after its
launch (``lag``), and after what it was told to wait for.  In a trace one of the three was last; that one is measured
for this operation, the others get the trace's typical value, never so much that they would decide instead.
"""

from __future__ import annotations

from collections import defaultdict
from statistics import median_low

from sim.ops import Lane
from sim.workload.kineto import DeviceEvent
from sim.workload.link.nodes import CLOCK_TOLERANCE_NS, Call, Node, RankLines, Stream, device_node

# Operations of one stream that overlap by no more than this did not overlap: traces before 2024 cut start and
# duration to whole microseconds.
ROUNDING_NS = 2_000

# Calls that put nothing on a stream in a healthy trace have other names than these; one without a device operation
# lost it.
LAUNCH_NAMES = ("LaunchKernel", "LaunchKernelExC", "GraphLaunch", "ModuleLaunchKernel", "ExtModuleLaunchKernel")


def build_streams(lines: RankLines, first_lane: int) -> list[Lane]:
    """Fill ``lines.streams`` with nodes linked to their launches; returns the streams' lanes."""
    events = lines.trace.device
    devices = {event.device for event in events}
    if len(devices) > 1:
        told = "devices that one process uses, in one trace: told, and placed, as one device with all their streams"
        lines.counts[told] += len(devices)
    lanes: list[Lane] = []
    for device, number in sorted({(event.device, event.stream) for event in events}):
        name = f"stream {number}" if len(devices) == 1 else f"device {device} stream {number}"
        lines.streams[device, number] = Stream(first_lane + len(lanes), device, number)
        lanes.append(Lane("stream", number, name))
    calls = _launching_calls(lines)
    behind = _clock_behind(events, calls, lines)
    for event in events:
        stream = lines.streams[event.device, event.stream]
        node = device_node(stream.lane, event, behind)
        call = calls.get(event.correlation)
        if call is not None and call.start > node.start + CLOCK_TOLERANCE_NS:
            lines.counts["device operations that start before their launch: the launch is not used"] += 1
            call = None
        if call is not None:
            node.launch = call
            node.op = node.work = call.op
            call.launched.append(node)
        else:
            lines.counts["device operations without a launch in the trace: taken to be launched in time"] += 1
        stream.nodes.append(node)
    for stream in lines.streams.values():
        _untangle(stream, lines)
        stream.sort()
    _count_lost_kernels(lines)
    return lanes


def _launching_calls(lines: RankLines) -> dict[int, Call]:
    """Calls by correlation id.  Runtime and driver may both record one launch, the one inside the other: the outer."""
    calls: dict[int, Call] = {}
    for line in lines.threads:
        inner: set[Call] = set()
        for call in line.calls:
            outer = calls.setdefault(call.correlation, call) if call.correlation >= 0 else call
            if outer is not call and outer.lane == call.lane and call.end <= outer.end:
                inner.add(call)
        if inner:
            line.calls = [call for call in line.calls if call not in inner]
    return calls


def _clock_behind(events: list[DeviceEvent], calls: dict[int, Call], lines: RankLines) -> int:
    """How far the device's clock is behind, where one operation in a hundred, or more, starts before its launch."""
    lags = sorted(e.start_ns - calls[e.correlation].start for e in events if e.correlation in calls)
    behind = -lags[len(lags) // 100] if len(lags) > 1 else 0
    if behind <= CLOCK_TOLERANCE_NS:
        return 0
    lines.counts["device clocks that ran behind the host's: set forward until launches come before kernels"] += 1
    return behind


def _untangle(stream: Stream, lines: RankLines) -> None:
    """A stream runs one operation at a time: what overlaps is the later one's remainder."""
    free = -(1 << 62)
    for node in stream.nodes:
        if node.start < free:
            if free - node.start > ROUNDING_NS:
                lines.counts["device operations that overlap another on their stream: only the remainder counts"] += 1
            node.own = max(0, node.end - free)
        free = max(free, node.end)


def _count_lost_kernels(lines: RankLines) -> None:
    for line in lines.threads:
        for call in line.calls:
            if not call.launched and call.plain_name in LAUNCH_NAMES:
                lines.counts["launches without a kernel in the trace"] += 1


def settle_starts(lines: RankLines) -> None:
    """Give every device operation its ``lag`` and ``gap``; call when ``after`` is known."""
    typical_lag, typical_gap = _typical(lines)
    anywhere = median_low(sorted(typical_lag.values())) if typical_lag else 0
    for stream in lines.streams.values():
        free: int | None = None
        for node in stream.nodes:
            lag = typical_lag.get(node.launch.name, anywhere) if node.launch is not None else 0
            _settle(node, free, lag, typical_gap, lines.origin)
            free = node.end if free is None else max(free, node.end)


def _settle(node: Node, free: int | None, typical_lag: int, typical_gap: int, origin: int) -> None:
    held = [n.end for n in node.after] + ([] if free is None else [free])
    since_ready = max(0, node.start - max(held, default=origin))
    since_launch = max(0, node.start - node.launch.start) if node.launch is not None else None
    node.gap, node.lag = min(typical_gap, since_ready), min(typical_lag, since_launch or 0)
    if since_launch is None or (held and since_ready + typical_lag <= since_launch):
        node.gap = since_ready
    else:
        node.lag = since_launch


def _typical(lines: RankLines) -> tuple[dict[str, int], int]:
    """Medians of this trace: launch to start on an idle stream by the call's name, and turn-around on a busy one."""
    lags: defaultdict[str, list[int]] = defaultdict(list)
    gaps: list[int] = []
    for stream in lines.streams.values():
        free: int | None = None
        for node in stream.nodes:
            call = node.launch
            if isinstance(call, Call) and not node.after:
                if free is None or free <= call.start:
                    lags[call.name].append(max(0, node.start - call.start))
                elif free > call.end:
                    gaps.append(max(0, node.start - free))
            free = node.end if free is None else max(free, node.end)
    return {name: median_low(values) for name, values in lags.items()}, median_low(gaps) if gaps else 0
