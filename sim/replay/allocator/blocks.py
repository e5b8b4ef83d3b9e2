"""A block: a range of device memory that is handed out, cached or not backed by memory.

Source: ``struct Block``, ``struct BlockPool`` and ``try_merge_blocks`` of
c10/cuda/CUDACachingAllocator.cpp (PyTorch v2.13.0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sim.replay.allocator.expandable import VirtualRange
    from sim.replay.allocator.pools import BlockPool

_ADDRESS_BITS = 64  # addresses of the unified address space fit
_SIZE_SHIFT = 2 * _ADDRESS_BITS  # above the address stands the number that decides between equal sizes, then the size


def smallest_key(size: int) -> int:
    """The key before all blocks of at least this size: where a search for one begins."""
    return size << _SIZE_SHIFT


class Block:
    """One block.  ``previous`` and ``next`` are its neighbours in the same segment.

    ``idle`` says that nothing uses it: it lies in its pool's free list, or (``mapped`` false) in the list of
    ranges without memory.  A block that was freed while another stream uses it is neither idle nor allocated.
    """

    __slots__ = (
        "address",
        "age_base",
        "allocated",
        "events",
        "idle",
        "mapped",
        "next",
        "number",
        "pool",
        "previous",
        "requested",
        "size",
        "stream",
        "users",
        "virtual",
    )

    def __init__(
        self, address: int, size: int, stream: int, pool: BlockPool, virtual: VirtualRange | None = None
    ) -> None:
        self.address = address
        self.size = size
        self.requested = 0
        self.stream = stream
        self.pool = pool
        self.virtual = virtual
        self.allocated = False
        self.idle = False
        self.mapped = True
        self.previous: Block | None = None
        self.next: Block | None = None
        self.users: dict[int, bool] | None = None  # other streams that use it; true: said during a graph's capture
        self.events = 0  # uses by other streams that must end before the block is free
        self.number = 0  # see ordering.py
        self.age_base = 0  # its pool's search count when it became free

    @property
    def end(self) -> int:
        return self.address + self.size

    @property
    def key(self) -> int:
        """Where it stands among free blocks: by (size, number, address)."""
        return self.size << _SIZE_SHIFT | self.number << _ADDRESS_BITS | self.address

    @property
    def whole(self) -> bool:
        """Whether it is a whole segment, not a part of one (``!is_split()``)."""
        return self.previous is None and self.next is None

    @property
    def head(self) -> Block:
        """The first block of its segment."""
        block = self
        while block.previous is not None:
            block = block.previous
        return block

    def link(self, previous: Block | None, following: Block | None) -> None:
        """Put it between two neighbours (``splice``)."""
        self.previous = previous
        self.next = following
        if previous is not None:
            previous.next = self
        if following is not None:
            following.previous = self


def absorb(block: Block, neighbour: Block | None) -> None:
    """Merge an idle neighbour into ``block`` where both are mapped, or both are not (``try_merge_blocks``)."""
    if neighbour is None or not neighbour.idle or neighbour.mapped != block.mapped:
        return
    neighbour.pool.forget(neighbour)
    if neighbour is block.previous:
        block.address = neighbour.address
        block.previous = neighbour.previous
        if block.previous is not None:
            block.previous.next = block
    else:
        block.next = neighbour.next
        if block.next is not None:
            block.next.previous = block
    block.size += neighbour.size
