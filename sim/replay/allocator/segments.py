"""The allocator's memory as PyTorch's snapshots show it, and an allocator that starts from such a state.

Source: ``DeviceCachingAllocator::snapshot`` of c10/cuda/CUDACachingAllocator.cpp (PyTorch v2.13.0): for
expandable segments every contiguous mapped range is one segment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from sim.replay.allocator.blocks import Block
from sim.replay.allocator.caching import CachingAllocator
from sim.replay.allocator.expandable import VirtualRange
from sim.replay.allocator.pools import COMMON_POOL, BlockPool, PoolId
from sim.replay.allocator.rounding import SMALL_BUFFER

_ROOM = 1 << 20  # numbers kept free before each block taken over, for when the true order is learnt

BlockState = Literal["active_allocated", "active_pending_free", "inactive"]


@dataclasses.dataclass(frozen=True, slots=True)
class BlockView:
    """One block; sizes and addresses are bytes."""

    address: int
    size: int
    requested: int
    state: BlockState


@dataclasses.dataclass(frozen=True, slots=True)
class SegmentView:
    """One segment and its blocks, by address."""

    address: int
    size: int
    stream: int
    small: bool
    expandable: bool
    pool_id: PoolId = COMMON_POOL
    blocks: tuple[BlockView, ...] = ()


def segments(allocator: CachingAllocator) -> tuple[SegmentView, ...]:
    """All segments by address."""
    views = []
    for block in allocator.blocks():
        if block.mapped and (block.previous is None or not block.previous.mapped):
            views.append(_view(block))
    return tuple(sorted(views, key=lambda view: view.address))


def _view(head: Block) -> SegmentView:
    blocks: list[BlockView] = []
    block: Block | None = head
    while block is not None and block.mapped:
        state: BlockState = (
            "active_allocated" if block.allocated else "inactive" if block.idle else "active_pending_free"
        )
        blocks.append(BlockView(block.address, block.size, block.requested, state))
        block = block.next
    return SegmentView(
        address=head.address,
        size=sum(part.size for part in blocks),
        stream=head.stream,
        small=head.pool.small,
        expandable=head.virtual is not None,
        pool_id=head.pool.pool_id,
        blocks=tuple(blocks),
    )


def restore(allocator: CachingAllocator, start: tuple[SegmentView, ...]) -> None:
    """Give an empty allocator the memory of another: segments, blocks and what is unmapped between.

    Mapped ranges of the same stream and pool belong to one expandable segment, which is how PyTorch makes
    them (a second one comes only when the first has no addresses left).
    """
    ranges: dict[tuple[int, bool, PoolId], list[SegmentView]] = {}
    for view in sorted(start, key=lambda view: view.address):
        if view.expandable:
            ranges.setdefault((view.stream, view.small, view.pool_id), []).append(view)
        else:
            adopt_segment(allocator, view)
    for views in ranges.values():
        _adopt_range(allocator, views)


def adopt_segment(allocator: CachingAllocator, view: SegmentView) -> None:
    """Take in one segment that is not expandable."""
    pool = allocator.pool(view.pool_id, small=view.small)
    if pool.owner is not None:
        pool.owner.segments += 1
    _adopt_row(allocator, [(Block(part.address, part.size, view.stream, pool), part) for part in view.blocks])


def _adopt_range(allocator: CachingAllocator, views: list[SegmentView]) -> None:
    first = views[0]
    pool = allocator.pool(first.pool_id, small=first.small)
    page = SMALL_BUFFER if first.small else allocator.config.large_segment_size
    span = max(allocator.device.total_bytes // 8 * 9, views[-1].address + views[-1].size - first.address)
    virtual = VirtualRange(first.address, (span + page - 1) // page * page, page)
    row: list[tuple[Block, BlockView | None]] = []
    reached = first.address
    for view in views:
        if view.address > reached:
            row.append((Block(reached, view.address - reached, first.stream, pool, virtual), None))
        row.extend((Block(part.address, part.size, first.stream, pool, virtual), part) for part in view.blocks)
        reached = view.address + view.size
    end = virtual.address + virtual.size
    if reached < end:
        row.append((Block(reached, end - reached, first.stream, pool, virtual), None))
    _adopt_row(allocator, row)


def _adopt_row(allocator: CachingAllocator, row: Sequence[tuple[Block, BlockView | None]]) -> None:
    previous: Block | None = None
    allocator.numbering.leave_room(_ROOM)
    number = allocator.numbering.memory()
    for block, part in row:
        if previous is None:
            block.number = number
        else:
            allocator.numbering.leave_room(_ROOM * allocator.numbering.by_block)
            block.number = allocator.numbering.part(previous)
        block.mapped = part is not None
        block.requested = 0 if part is None else part.requested
        block.link(previous, None)
        previous = block
    for block, part in row:
        state = "inactive" if part is None else part.state
        allocator.adopt(block, allocated=state == "active_allocated", pending=state == "active_pending_free")


def extend_range(pool: BlockPool, stream: int, address: int) -> None:
    """Let an expandable segment that was taken over begin at a lower address, with unmapped pages."""
    for block in pool.unmapped.get(stream, ()):
        virtual = block.virtual
        if virtual is None or virtual.address <= address:
            continue
        head = block
        while head.previous is not None:
            head = head.previous
        gained = virtual.address - address
        if head.mapped:
            below = Block(address, gained, stream, pool, virtual)
            below.number = head.number
            below.mapped = False
            below.link(None, head)
        else:
            below = head
            pool.forget(below)
            below.address, below.size = address, below.size + gained
        pool.add_unmapped(below)
        virtual.address, virtual.size = address, virtual.size + gained
        return
