"""Blocks in the order of an integer key, in logarithmic time for all practical numbers of blocks.

PyTorch keeps free blocks in a ``std::set`` ordered by (stream, size, address) (``BlockComparatorSize`` in
c10/cuda/CUDACachingAllocator.cpp, v2.13.0).  Here each stream has a list of its own, and size and address are
one integer: Python compares integers several times faster than tuples.  The keys lie in buckets of bounded
length, so an insertion moves at most a bucket's worth of pointers.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from sim.replay.allocator.blocks import ADDRESS_BITS, Block

_BUCKET = 512  # keys in a full bucket; measured flat between 256 and 2048


class KeyedBlocks:
    """A sorted map from integer keys to blocks."""

    __slots__ = ("_blocks", "_buckets", "_lasts")

    def __init__(self) -> None:
        self._blocks: dict[int, Block] = {}
        self._buckets: list[list[int]] = []
        self._lasts: list[int] = []  # the last key of each bucket

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[Block]:
        """All blocks in order, as they are now: the list may be changed while they are gone through."""
        keys = [key for bucket in self._buckets for key in bucket]
        return iter([self._blocks[key] for key in keys])

    def insert(self, key: int, block: Block) -> None:
        self._blocks[key] = block
        lasts = self._lasts
        place = bisect_left(lasts, key)
        if place == len(lasts):
            if place == 0:
                self._buckets.append([key])
                lasts.append(key)
                return
            place -= 1
            bucket = self._buckets[place]
            bucket.append(key)
            lasts[place] = key
        else:
            bucket = self._buckets[place]
            insort(bucket, key)
        if len(bucket) > _BUCKET:
            self._halve(place)

    def _halve(self, place: int) -> None:
        bucket = self._buckets[place]
        half = len(bucket) // 2
        self._buckets.insert(place + 1, bucket[half:])
        del bucket[half:]
        self._lasts.insert(place, bucket[-1])

    def delete(self, key: int) -> None:
        del self._blocks[key]
        lasts = self._lasts
        place = bisect_left(lasts, key)
        bucket = self._buckets[place]
        if len(bucket) == 1:
            del self._buckets[place]
            del lasts[place]
            return
        del bucket[bisect_left(bucket, key)]
        lasts[place] = bucket[-1]

    def first_from(self, key: int) -> Block | None:
        """The block with the smallest key that is at least ``key``."""
        lasts = self._lasts
        place = bisect_left(lasts, key)
        if place == len(lasts):
            return None
        bucket = self._buckets[place]
        return self._blocks[bucket[bisect_left(bucket, key)]]

    def upward_from(self, key: int) -> Iterator[Block]:
        """Blocks with keys of at least ``key``, in order; the list must not change meanwhile."""
        place = bisect_left(self._lasts, key)
        if place == len(self._lasts):
            return
        bucket = self._buckets[place]
        for at in range(bisect_left(bucket, key), len(bucket)):
            yield self._blocks[bucket[at]]
        for later in range(place + 1, len(self._buckets)):
            for found in self._buckets[later]:
                yield self._blocks[found]

    def downward_from(self, key: int) -> Iterator[Block]:
        """Blocks with keys below ``key``, largest first; the list must not change meanwhile."""
        place = bisect_left(self._lasts, key)
        if place < len(self._lasts):
            bucket = self._buckets[place]
            for at in range(bisect_left(bucket, key) - 1, -1, -1):
                yield self._blocks[bucket[at]]
        for earlier in range(place - 1, -1, -1):
            for found in reversed(self._buckets[earlier]):
                yield self._blocks[found]


class FreeList(KeyedBlocks):
    """The free blocks of one pool on one stream, ordered by (size, address)."""

    __slots__ = ()

    def add(self, block: Block) -> None:
        self.insert(block.size << ADDRESS_BITS | block.address, block)

    def remove(self, block: Block) -> None:
        self.delete(block.size << ADDRESS_BITS | block.address)

    def find(self, size: int, address: int) -> Block | None:
        """The free block of exactly this size and address."""
        return self._blocks.get(size << ADDRESS_BITS | address)


class AddressList(KeyedBlocks):
    """Blocks ordered by address alone: the unmapped ranges of one pool on one stream."""

    __slots__ = ()

    def add(self, block: Block) -> None:
        self.insert(block.address, block)

    def remove(self, block: Block) -> None:
        self.delete(block.address)
