"""Pools of free blocks: small and large, the common ones and the private ones of CUDA graphs.

Source: ``struct BlockPool`` and ``struct PrivatePool`` of c10/cuda/CUDACachingAllocator.cpp (PyTorch v2.13.0).
"""

from __future__ import annotations

from collections.abc import Iterator

from sim.replay.allocator.blocks import Block
from sim.replay.allocator.free_list import AddressList, FreeList

PoolId = tuple[int, int]
"""As PyTorch's MempoolId_t: (graph capture, pool handle); (0, 0) is the common pool."""

COMMON_POOL: PoolId = (0, 0)

_UNSIGNED = (1 << 64) - 1  # streams are pointers and compare as such; recordings print them signed


def stream_order(stream: int) -> int:
    """Where a stream stands among the others: pointers compare unsigned."""
    return stream & _UNSIGNED


class BlockPool:
    """Free and unmapped blocks of one kind; every stream reuses only its own."""

    __slots__ = ("free", "owner", "searches", "small", "unmapped")

    def __init__(self, *, small: bool, owner: PrivatePool | None = None) -> None:
        self.small = small
        self.owner = owner
        self.free: dict[int, FreeList] = {}
        self.unmapped: dict[int, AddressList] = {}
        self.searches = 0  # get_free_blocks_call_count: the clock of garbage collection

    @property
    def pool_id(self) -> PoolId:
        return COMMON_POOL if self.owner is None else self.owner.pool_id

    def add(self, block: Block) -> None:
        """Put a block among the free ones; its age starts at 0 (``insert_into_blocks``)."""
        block.idle = True
        block.age_base = self.searches
        try:
            self.free[block.stream].add(block)
        except KeyError:
            self.free[block.stream] = found = FreeList()
            found.add(block)

    def add_unmapped(self, block: Block) -> None:
        block.idle = True
        self.unmapped.setdefault(block.stream, AddressList()).add(block)

    def forget(self, block: Block) -> None:
        """Take a block out of the list it lies in."""
        block.idle = False
        if block.mapped:
            self.free[block.stream].remove(block)
        else:
            self.unmapped[block.stream].remove(block)

    def free_blocks(self) -> Iterator[Block]:
        """All free blocks by (stream, size, address), as they are now."""
        for stream in sorted(self.free, key=stream_order):
            yield from self.free[stream]

    def unmapped_blocks(self) -> Iterator[Block]:
        for stream in sorted(self.unmapped, key=stream_order):
            yield from self.unmapped[stream]

    def age(self, block: Block) -> int:
        """How many searches of this pool a free block has seen (``gc_count``)."""
        return self.searches - block.age_base


class PrivatePool:
    """The two pools of a CUDA graph, or of several that share memory."""

    __slots__ = ("large", "pool_id", "segments", "small", "uses")

    def __init__(self, pool_id: PoolId) -> None:
        self.pool_id = pool_id
        self.small = BlockPool(small=True, owner=self)
        self.large = BlockPool(small=False, owner=self)
        self.uses = 1  # graphs that use it; at 0 its cached memory may be released
        self.segments = 0  # segments that are not given back; at 0 and without uses the pool is gone
