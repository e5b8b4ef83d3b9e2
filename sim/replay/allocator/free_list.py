"""Blocks in the order of an integer key, in logarithmic time for all practical numbers of blocks.

PyTorch keeps free blocks in a ``std::set`` ordered by (stream, size, number, address) (see ordering.py).  Here
each stream has a list of its own, and the rest is one integer: Python compares integers several times faster
than tuples.  The keys lie in buckets of bounded
length, so an insertion moves at most a bucket's worth of pointers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from sim.replay.allocator.blocks import Block, smallest_key

_BUCKET = 256  # keys in a full bucket; measured flat between 128 and 1024


class KeyedBlocks:
    """A sorted map from integer keys to blocks: buckets of keys, and beside each the blocks in the same order."""

    __slots__ = ("_blocks", "_keys", "_lasts")

    def __init__(self) -> None:
        self._keys: list[list[int]] = []
        self._blocks: list[list[Block]] = []
        self._lasts: list[int] = []  # the last key of each bucket

    def __len__(self) -> int:
        return sum(map(len, self._keys))

    def __iter__(self) -> Iterator[Block]:
        """All blocks in order, as they are now: the list may be changed while they are gone through."""
        return iter([block for bucket in self._blocks for block in bucket])

    def insert(self, key: int, block: Block) -> None:
        lasts = self._lasts
        place = bisect_left(lasts, key)
        if place == len(lasts):
            if place == 0:
                self._keys.append([key])
                self._blocks.append([block])
                lasts.append(key)
                return
            place -= 1
            lasts[place] = key
        keys = self._keys[place]
        at = bisect_left(keys, key)
        keys.insert(at, key)
        self._blocks[place].insert(at, block)
        if len(keys) > _BUCKET:
            self._halve(place)

    def _halve(self, place: int) -> None:
        keys, blocks = self._keys[place], self._blocks[place]
        half = len(keys) // 2
        self._keys.insert(place + 1, keys[half:])
        self._blocks.insert(place + 1, blocks[half:])
        del keys[half:], blocks[half:]
        self._lasts.insert(place, keys[-1])

    def delete(self, key: int) -> None:
        lasts = self._lasts
        place = bisect_left(lasts, key)
        keys = self._keys[place]
        if len(keys) == 1:
            del self._keys[place], self._blocks[place], lasts[place]
            return
        at = bisect_left(keys, key)
        del keys[at], self._blocks[place][at]
        lasts[place] = keys[-1]

    def first_from(self, key: int) -> Block | None:
        """The block with the smallest key that is at least ``key``."""
        place = bisect_left(self._lasts, key)
        if place == len(self._lasts):
            return None
        return self._blocks[place][bisect_left(self._keys[place], key)]

    def upward_from(self, key: int) -> Iterator[Block]:
        """Blocks with keys of at least ``key``, in order; the list must not change meanwhile."""
        place = bisect_left(self._lasts, key)
        if place == len(self._lasts):
            return
        bucket = self._blocks[place]
        for at in range(bisect_left(self._keys[place], key), len(bucket)):
            yield bucket[at]
        for later in range(place + 1, len(self._blocks)):
            yield from self._blocks[later]

    def downward_from(self, key: int) -> Iterator[Block]:
        """Blocks with keys below ``key``, largest first; the list must not change meanwhile."""
        place = bisect_left(self._lasts, key)
        if place < len(self._lasts):
            bucket = self._blocks[place]
            for at in range(bisect_left(self._keys[place], key) - 1, -1, -1):
                yield bucket[at]
        for earlier in range(place - 1, -1, -1):
            yield from reversed(self._blocks[earlier])


class FreeList(KeyedBlocks):
    """The free blocks of one pool on one stream, ordered by (size, number, address)."""

    __slots__ = ()

    def add(self, block: Block) -> None:
        self.insert(block.key, block)

    def remove(self, block: Block) -> None:
        self.delete(block.key)

    def find(self, size: int, address: int) -> Block | None:
        """The free block of exactly this size and address."""
        for block in self.upward_from(smallest_key(size)):
            if block.size != size:
                return None
            if block.address == address:
                return block
        return None


class AddressList(KeyedBlocks):
    """Blocks ordered by address alone: the unmapped ranges of one pool on one stream."""

    __slots__ = ()

    def add(self, block: Block) -> None:
        self.insert(block.address, block)

    def remove(self, block: Block) -> None:
        self.delete(block.address)
