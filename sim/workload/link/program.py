"""From linked lines to a Program: an order in which every reference points backwards, and frozen operations."""

from __future__ import annotations

import re

from sim.ops import Alloc, Collective, Copy, CopyKind, Free, HostCall, Kernel, Mark, Op
from sim.workload.kineto import DeviceEvent
from sim.workload.link.meeting import Meeting
from sim.workload.link.memory import Block
from sim.workload.link.nodes import Node, RankLines
from sim.workload.link.steps import StepMark
from sim.workload.link.works import Works


def settle_threads(lines: RankLines) -> None:
    """Give every host operation ``before``: the thread's own work since it was free and released."""
    for line in lines.threads:
        free = lines.origin
        for node in line.nodes:
            released = max((n.end for n in node.after), default=free)
            node.before = max(0, node.start - max(free, released))
            if node.start < free:
                node.own = max(0, min(node.own, node.end - free))
            free = max(free, node.end)


def in_order(lines: RankLines) -> list[Node]:
    """All nodes by start, each after what it refers to and after its predecessor on its lane.

    A reference that would close a circle contradicts the others; it is left out and counted.
    """
    previous: dict[Node, Node] = {}
    chains = [line.nodes for line in lines.threads] + [stream.nodes for stream in lines.streams.values()]
    for chain in chains:
        previous.update(zip(chain[1:], chain, strict=False))
    ordered: list[Node] = []
    for root in sorted((node for chain in chains for node in chain), key=lambda node: (node.start, node.lane)):
        if root.index < 0:
            _emit(root, previous, ordered, lines)
    return ordered


_OPEN = -2


def _emit(root: Node, previous: dict[Node, Node], ordered: list[Node], lines: RankLines) -> None:
    stack = [root]
    while stack:
        node = stack[-1]
        if node.index >= 0:
            stack.pop()
            continue
        node.index = _OPEN
        pending = [n for n in _needs(node, previous) if n.index < 0]
        circular = [n for n in pending if n.index == _OPEN]
        if circular:
            _leave_out(node, circular, previous, lines)
            continue
        if pending:
            stack.extend(pending)
        else:
            stack.pop()
            node.index = len(ordered)
            ordered.append(node)


def _needs(node: Node, previous: dict[Node, Node]) -> list[Node]:
    needs = [*node.after, *node.waits]
    if node.launch is not None:
        needs.append(node.launch)
    before = previous.get(node)
    if before is not None:
        needs.append(before)
    return needs


def _leave_out(node: Node, circular: list[Node], previous: dict[Node, Node], lines: RankLines) -> None:
    lines.counts["references that contradict the order of the others: left out"] += len(circular)
    node.after = [n for n in node.after if n not in circular]
    node.waits = [n for n in node.waits if n not in circular]
    if node.launch in circular:
        node.launch = None
    if previous.get(node) in circular:
        del previous[node]


def operations(nodes: list[Node], works: Works) -> tuple[Op, ...]:
    """The frozen operations, in the order of ``nodes``."""
    return tuple(_operation(node, works) for node in nodes)


def _operation(node: Node, works: Works) -> Op:
    after = tuple(sorted({n.index for n in node.after})) if node.after else ()
    if node.kind in ("kernel", "copy", "collective"):
        return _device_operation(node, after, works)
    lane, before = node.lane, node.before
    if node.kind == "call":
        waits = tuple(sorted({n.index for n in node.waits})) if node.waits else ()
        return HostCall(lane, before, after, node.name, node.own, waits, _work(node, works))
    if node.kind == "mark":
        mark = node.detail
        assert isinstance(mark, StepMark)
        return Mark(lane, before, after, mark.name, mark.step, mark.edge)
    block = node.detail
    assert isinstance(block, Block)
    if node.kind == "free":
        return Free(lane, before, after, block.number)
    return Alloc(lane, before, after, block.number, block.bytes, block.stream, name=node.name, address=block.address)


def _work(node: Node, works: Works) -> int | None:
    return works.index(node.work) if node.work is not None else None


def _device_operation(node: Node, after: tuple[int, ...], works: Works) -> Op:
    launch = node.launch.index if node.launch is not None else None
    lag = node.lag if launch is not None else None
    start = (node.lane, node.name, launch, lag, node.gap, after, node.own)
    if node.kind == "kernel":
        return Kernel(*start, work=_work(node, works))
    if node.kind == "copy":
        event = node.detail
        assert isinstance(event, DeviceEvent)
        return Copy(*start, kind=copy_kind(event), bytes=max(0, event.args.bytes or 0))
    meeting = node.detail
    assert isinstance(meeting, Meeting)
    return Collective(
        *start, kind=meeting.kind, bytes=meeting.bytes, group=meeting.group, seq=meeting.seq, dtype=meeting.dtype,
        peer=meeting.peer,
    )  # fmt: skip


_COPY_KINDS: dict[str, CopyKind] = {"HtoD": "h2d", "DtoH": "d2h", "DtoD": "d2d", "PtoP": "p2p"}


def copy_kind(event: DeviceEvent) -> CopyKind:
    """From the names that Kineto gives copies: ``Memcpy HtoD (Pageable -> Device)``."""
    if event.kind == "memset":
        return "memset"
    found = re.search(r"HtoD|DtoH|DtoD|PtoP|HostToDevice|DeviceToHost", event.name)
    if found is None:
        return "d2d"
    short = {"HostToDevice": "HtoD", "DeviceToHost": "DtoH"}.get(found.group(), found.group())
    return _COPY_KINDS[short]
