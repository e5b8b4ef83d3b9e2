"""What linking works on: the operations of one rank with their measured times, before they become a program."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import Counter
from functools import cache
from typing import Literal

from sim.workload.kineto import DeviceEvent, HostEvent, KinetoTrace, RuntimeEvent

NodeKind = Literal["call", "mark", "alloc", "free", "kernel", "copy", "collective"]

# The clocks of host and device are aligned by the profiler to a few microseconds, and traces before 2024 cut both to
# whole microseconds: ends that differ by less are the same instant.
CLOCK_TOLERANCE_NS = 5_000


class Node:
    """One operation: when it ran, and what it turned out to depend on.

    ``before``, ``own``, ``lag`` and ``gap`` become the durations of sim.ops; ``after``, ``waits`` and ``launch``
    its references.  ``op`` is the op it was called in, ``work`` the op that it computes; ``detail`` is what its
    kind needs; ``tail`` is the call in which a collective's thread returns from it; ``index`` is the place in the
    finished program.
    """

    __slots__ = (
        "after", "before", "detail", "end", "gap", "index", "kind", "lag", "lane", "launch", "name", "op", "own",
        "start", "tail", "waits", "work",
    )  # fmt: skip

    def __init__(self, kind: NodeKind, lane: int, name: str, start: int, end: int) -> None:
        self.kind: NodeKind = kind
        self.lane = lane
        self.name = name
        self.start = start
        self.end = end
        self.own = end - start
        self.before = 0
        self.lag = 0
        self.gap = 0
        self.launch: Node | None = None
        self.after: list[Node] = []
        self.waits: list[Node] = []
        self.op: HostEvent | None = None
        self.work: HostEvent | None = None
        self.detail: object = None
        self.tail: Node | None = None
        self.index = -1


class Call(Node):
    """A runtime call with the device operations it launched, in order of their start."""

    __slots__ = ("correlation", "launched", "plain_name")

    def __init__(self, lane: int, event: RuntimeEvent) -> None:
        super().__init__("call", lane, event.name, event.start_ns, event.end_ns)
        self.correlation = event.correlation
        self.plain_name = plain_name(event.name)
        self.launched: list[Node] = []


class Stream:
    """A device stream: its operations in order of start, and in order of launch."""

    def __init__(self, lane: int, device: int, number: int) -> None:
        self.lane = lane
        self.device = device
        self.number = number
        self.nodes: list[Node] = []
        self.by_launch: list[Node] = []
        self.launch_times: list[int] = []

    def sort(self) -> None:
        """Call when all nodes and their launches are known."""
        self.by_launch = sorted(self.nodes, key=_launch_time)
        self.launch_times = [_launch_time(node) for node in self.by_launch]

    def last_launched_before(self, time: int) -> Node | None:
        """The last operation that had been put on the stream when a call at ``time`` began."""
        place = bisect_left(self.launch_times, time)
        return self.by_launch[place - 1] if place else None


def _launch_time(node: Node) -> int:
    return node.launch.start if node.launch is not None else -1


class ThreadLine:
    """A host thread: its ops and calls, its nodes in order, and when it was busy with ops or calls.

    ``told``: what the thread waits for, and who waits for it, is known and need not be guessed from silence.
    """

    def __init__(self, lane: int) -> None:
        self.lane = lane
        self.ops: list[HostEvent] = []
        self.calls: list[Call] = []
        self.nodes: list[Node] = []
        self.busy: list[tuple[int, int]] = []
        self.ends: list[int] = []
        self.told = False

    def last_ended_before(self, time: int) -> Node | None:
        place = bisect_right(self.ends, time)
        return self.nodes[place - 1] if place else None

    def first_from(self, time: int) -> Node | None:
        place = bisect_left(self.nodes, time, key=lambda node: node.start)
        return self.nodes[place] if place < len(self.nodes) else None


class RankLines:
    """All of one rank: lines of threads and streams, and what was tolerated."""

    def __init__(self, trace: KinetoTrace, rank: int) -> None:
        self.trace = trace
        self.rank = rank
        self.threads: list[ThreadLine] = []
        self.streams: dict[tuple[int, int], Stream] = {}
        self.main = 0
        self.origin = 0
        self.offset = 0
        self.counts: Counter[str] = Counter()


@cache
def plain_name(name: str) -> str:
    """``LaunchKernel`` of cudaLaunchKernel, cuLaunchKernel, hipLaunchKernel and their versions."""
    return re.sub(r"(_v\d+|_pt[sd]z)+$", "", re.sub(r"^(cuda|cu|hip)(?=[A-Z])", "", name))


def device_node(lane: int, event: DeviceEvent, behind: int) -> Node:
    """A node of a stream from its event, on the host's clock: the device's is ``behind`` nanoseconds behind."""
    kind: NodeKind = "kernel" if event.kind == "kernel" else "copy"
    node = Node(kind, lane, event.name, event.start_ns + behind, event.end_ns + behind)
    node.detail = event
    return node
