"""Expandable segments: ranges of addresses that get memory page by page.

Source: ``struct ExpandableSegment``, ``find_expandable_block``, ``map_block``,
``try_allocate_expandable_block``, ``unmap_block`` and ``release_expandable_segment`` of
c10/cuda/CUDACachingAllocator.cpp (PyTorch v2.13.0; the rules are those of 2.1, when they came; since 2.10
the page of the large pool is ``large_segment_size_mb``).

A range is 1 1/8 of the GPU's memory, rounded up to pages: 2 MiB for the small pool, 20 MiB for the large one.
"""

from __future__ import annotations

from sim.replay.allocator.blocks import Block, absorb
from sim.replay.allocator.device import Device
from sim.replay.allocator.ledger import Ledger
from sim.replay.allocator.ordering import Numbering
from sim.replay.allocator.pools import BlockPool
from sim.replay.allocator.rounding import SMALL_BUFFER


class VirtualRange:
    """A reserved range of addresses; pages count from its start.  Bytes."""

    __slots__ = ("address", "page", "size")

    def __init__(self, address: int, size: int, page: int) -> None:
        self.address = address
        self.size = size
        self.page = page

    def page_at_or_below(self, address: int) -> int:
        return address - (address - self.address) % self.page

    def page_at_or_above(self, address: int) -> int:
        return address + (self.address - address) % self.page

    def whole_pages(self, block: Block) -> tuple[int, int]:
        """Start and end of the pages that lie wholly within a block; start >= end where there are none."""
        return self.page_at_or_above(block.address), self.page_at_or_below(block.end)


class ExpandableSegments:
    """Maps and unmaps pages for one device."""

    __slots__ = ("_device", "_ledger", "_numbering", "large_page")

    def __init__(self, device: Device, ledger: Ledger, numbering: Numbering, large_page: int) -> None:
        self._device = device
        self._ledger = ledger
        self._numbering = numbering
        self.large_page = large_page

    def take(self, pool: BlockPool, stream: int, size: int) -> Block | None:
        """A block of at least ``size`` bytes by mapping pages; ``None`` where the device is out of memory.

        Pages that were mapped before the device ran out stay, cached.
        """
        block = self._room(pool, stream, size)
        if not block.mapped and not self._map(block, min(block.size, size)):
            return None
        while block.size < size:
            following = block.next
            assert following is not None, "room was found in a range that ends before it"
            if not self._map(following, min(size - block.size, following.size)):
                return None
            block = following  # it has absorbed the free block before it
        pool.forget(block)
        return block

    def _room(self, pool: BlockPool, stream: int, size: int) -> Block:
        """The lowest unmapped range where ``size`` bytes fit, or the free block right before it."""
        for unmapped in pool.unmapped.get(stream, ()):
            before = unmapped.previous
            candidate = before if before is not None and before.idle else unmapped
            if _idle_bytes(candidate, size) >= size:
                return candidate
        return self._new_range(pool, stream, size)

    def _new_range(self, pool: BlockPool, stream: int, room: int) -> Block:
        """What is larger than the range of such a GPU cannot be mapped; a replay that went out of memory for it goes on
        as if there were room, and so needs a range."""
        page = SMALL_BUFFER if pool.small else self.large_page
        wanted = max(self._device.total_bytes + self._device.total_bytes // 8, room)
        size = (wanted + page - 1) // page * page
        virtual = VirtualRange(self._device.reserve(size, stream), size, page)
        block = Block(virtual.address, size, stream, pool, virtual)
        block.mapped = False
        block.number = self._numbering.memory()
        pool.add_unmapped(block)
        return block

    def _map(self, block: Block, size: int) -> bool:
        """Put memory behind the first ``size`` bytes (whole pages) of an unmapped block; it becomes free."""
        virtual = block.virtual
        assert virtual is not None and not block.mapped and block.address == virtual.page_at_or_below(block.address)
        mapped = virtual.page_at_or_above(block.address + size) - block.address
        if not self._device.map(block.address, mapped):
            return False
        pool, address = block.pool, block.address
        pool.forget(block)
        block.mapped = True
        if mapped < block.size:
            rest = Block(address + mapped, block.size - mapped, block.stream, pool, virtual)
            rest.mapped = False
            rest.number = self._numbering.part(block)
            rest.link(block, block.next)
            pool.add_unmapped(rest)
            block.size = mapped
        absorb(block, block.previous)
        absorb(block, block.next)
        pool.add(block)
        self._ledger.reserve("segment_map", address, mapped, block.stream, pool.pool_id)
        return True

    def unmap(self, block: Block) -> None:
        """Give back the whole pages within a free block; a range that is all unmapped is given up."""
        virtual = block.virtual
        assert virtual is not None and block.idle and block.mapped
        start, end = virtual.whole_pages(block)
        if start < end:
            self._unmap_pages(block, start, end)
        if block.whole:
            self._give_up(block, virtual)

    def _unmap_pages(self, block: Block, start: int, end: int) -> None:
        pool = block.pool
        pool.forget(block)
        if start > block.address:
            before = Block(block.address, start - block.address, block.stream, pool, block.virtual)
            before.number = self._numbering.part(block)
            before.link(block.previous, block)
            pool.add(before)
        if block.end > end:
            after = Block(end, block.end - end, block.stream, pool, block.virtual)
            after.number = self._numbering.part(block)
            after.link(block, block.next)
            pool.add(after)
        block.address, block.size, block.mapped = start, end - start, False
        absorb(block, block.previous)
        absorb(block, block.next)
        pool.add_unmapped(block)
        self._device.unmap(start, end - start)
        self._ledger.give_back("segment_unmap", start, end - start, block.stream, pool.pool_id)

    def _give_up(self, block: Block, virtual: VirtualRange) -> None:
        assert not block.mapped and block.size == virtual.size
        block.pool.forget(block)
        self._device.unreserve(virtual.address, virtual.size)


def _idle_bytes(block: Block | None, enough: int) -> int:
    """Bytes of idle blocks in a row from ``block`` on, counted until ``enough``."""
    total = 0
    while total < enough and block is not None and block.idle:
        total += block.size
        block = block.next
    return total


def expandable_size(block: Block) -> int:
    """A free block's size for the purpose of best fit: with the unmapped range it can grow into."""
    following = block.next
    return block.size + (following.size if following is not None and not following.mapped else 0)
