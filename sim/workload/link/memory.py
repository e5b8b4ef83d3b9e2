"""Memory: the allocations and frees of the caching allocator, from a trace's [memory] events.

New traces say the address of each block and what is allocated in total; old ones only signed sizes, and a free is
then matched to the latest block of its size.  What was allocated before the trace began is resident: it is
allocated at the program's beginning.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict

import msgspec

from sim.workload.kineto import MemoryEvent
from sim.workload.link.host import innermost
from sim.workload.link.nodes import Node, RankLines, ThreadLine

RESIDENT = "blocks freed that were allocated before the trace began: resident from its beginning"


class Block(msgspec.Struct, frozen=True, gc=False):
    """What an Alloc or Free is about; ``stream`` is the lane it was allocated for."""

    number: int
    bytes: int
    address: int | None
    stream: int = -1


def add_memory(lines: RankLines) -> None:
    """Put Alloc and Free nodes into the lines of the threads they happened on."""
    device = _device(lines)
    events = [m for m in lines.trace.memory if m.bytes and m.device == device]
    if not events:
        return
    matching = _Matching(lines)
    resident = matching.resident(events)
    main = lines.threads[lines.main]
    main.nodes[:0] = [_node("alloc", main, lines.origin, block) for block in resident]
    for event in events:
        matching.follow(event)
    for line in lines.threads:
        line.nodes.sort(key=lambda node: node.start)
        _name(line)


def _name(line: ThreadLine) -> None:
    """An allocation is called after the op that asked for it."""
    asked = [node for node in line.nodes if node.kind == "alloc"]
    for node, op in zip(asked, innermost(line.ops, [node.start for node in asked]), strict=True):
        node.name = op.name if op is not None else ""


def _device(lines: RankLines) -> int:
    """The device most of whose memory is recorded (a rank has one)."""
    return max(Counter(m.device for m in lines.trace.memory).items(), key=lambda item: item[1], default=(0, 0))[0]


def _node(kind: str, line: ThreadLine, time: int, block: Block) -> Node:
    node = Node("alloc" if kind == "alloc" else "free", line.lane, "", time, time)
    node.detail = block
    return node


class _Matching:
    """Which free gives which block back."""

    def __init__(self, lines: RankLines) -> None:
        self.lines = lines
        self.blocks = 0
        self.live: defaultdict[tuple[str, int], list[tuple[Block, Node | None]]] = defaultdict(list)
        self.streams = [_launch_lanes(line) for line in lines.threads]
        self.usual = max(lines.streams.values(), key=lambda s: len(s.nodes)).lane if lines.streams else -1

    def resident(self, events: list[MemoryEvent]) -> list[Block]:
        """Blocks that are freed in the trace but not allocated in it, and the rest of what was allocated before it."""
        open_blocks: Counter[tuple[str, int]] = Counter()
        found: list[Block] = []
        for event in events:
            key = _key(event)
            if event.bytes > 0:
                open_blocks[key] += 1
            elif open_blocks[key]:
                open_blocks[key] -= 1
            else:
                found.append(self._resident_block(-event.bytes, event.address, key))
        if found:
            self.lines.counts[RESIDENT] += len(found)
        first = events[0]
        if first.allocated is not None:
            rest = first.allocated - first.bytes - sum(block.bytes for block in found)
            if rest > 0:
                found.append(self._resident_block(rest, None, ("rest", 0)))
        return found

    def _resident_block(self, size: int, address: int | None, key: tuple[str, int]) -> Block:
        self.blocks += 1
        block = Block(self.blocks - 1, size, address, self.usual)
        self.live[key].append((block, None))
        return block

    def follow(self, event: MemoryEvent) -> None:
        line = self.lines.threads[event.thread]
        held = self.live[_key(event)]
        if event.bytes > 0:
            block = Block(self.blocks, event.bytes, event.address, self._stream(event))
            self.blocks += 1
            node = _node("alloc", line, event.time_ns, block)
            held.append((block, node))
            line.nodes.append(node)
        elif held:
            block, allocated = held.pop()
            node = _node("free", line, event.time_ns, block)
            if allocated is not None and allocated.lane != line.lane:
                node.after.append(allocated)
            line.nodes.append(node)

    def _stream(self, event: MemoryEvent) -> int:
        """The lane of the stream that the thread launched on last: its current stream, most likely."""
        times, lanes = self.streams[event.thread]
        place = _last_at(times, event.time_ns)
        return lanes[place] if place >= 0 else self.usual


def _key(event: MemoryEvent) -> tuple[str, int]:
    return ("address", event.address) if event.address is not None else ("size", abs(event.bytes))


def _launch_lanes(line: ThreadLine) -> tuple[list[int], list[int]]:
    launches = [call for call in line.calls if call.launched and call.launched[0].kind != "collective"]
    return [call.start for call in launches], [call.launched[0].lane for call in launches]


def _last_at(times: list[int], time: int) -> int:
    return bisect_right(times, time) - 1
