"""The allocator's memory as PyTorch's snapshots show it, and an allocator that starts from such a state.

Source: ``DeviceCachingAllocator::snapshot`` of c10/cuda/CUDACachingAllocator.cpp (PyTorch v2.13.0): for
expandable segments every contiguous mapped range is one segment.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from sim.replay.allocator.blocks import Block
from sim.replay.allocator.caching import CachingAllocator
from sim.replay.allocator.pools import COMMON_POOL, PoolId

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
