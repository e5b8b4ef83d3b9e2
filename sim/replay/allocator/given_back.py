"""Memory that a recording gives back: which free block it is here, and whether only age decides between two orders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sim.replay.allocator.blocks import Block
from sim.replay.allocator.caching import CachingAllocator
from sim.replay.allocator.free_list import FreeList
from sim.replay.allocator.recording import TraceEvent
from sim.replay.allocator.release_order import Release


def release_of(event: TraceEvent) -> Release:
    """The release that an event tells."""
    return Release(event.action, event.address, event.size)


def free_segment(allocator: CachingAllocator, recorded: TraceEvent) -> Block | None:
    """The free block that is the whole recorded segment."""
    for free in _free_lists(allocator, recorded.stream):
        block = free.find(recorded.size, recorded.address)
        if block is not None and block.whole and block.virtual is None:
            return block
    return None


def free_pages(allocator: CachingAllocator, recorded: TraceEvent) -> Block | None:
    """The free block of an expandable segment whose whole pages are the recorded ones."""
    pages = (recorded.address, recorded.address + recorded.size)
    for free in _free_lists(allocator, recorded.stream):
        for block in free:
            if block.virtual is not None and block.virtual.whole_pages(block) == pages:
                return block
    return None


def _free_lists(allocator: CachingAllocator, stream: int) -> Iterator[FreeList]:
    return (pool.free[stream] for pool in allocator.pools() if stream in pool.free)


def differ_by_age(
    allocator: CachingAllocator, predicted: Sequence[Release], recorded: Sequence[TraceEvent], old_numbers: int
) -> bool:
    """Whether the same is given back, and only memory of one size from before the recording changes places.

    Blocks with numbers up to ``old_numbers`` were there when the recording began.
    """
    there = [release_of(event) for event in recorded]
    if not old_numbers or predicted == there or sorted(predicted) != sorted(there):
        return False
    streams = {release_of(event): event.stream for event in recorded}

    def old(release: Release) -> bool:
        return _is_old(allocator, release, old_numbers)

    return all(
        one == two or (one.size == two.size and streams[one] == streams[two] and old(one) and old(two))
        for one, two in zip(predicted, there, strict=True)
    )


def _is_old(allocator: CachingAllocator, release: Release, old_numbers: int) -> bool:
    """Whether a free range was there when the recording began, so that its age is not known."""
    for pool in allocator.pools():
        for free in pool.free.values():
            block = free.find(release.size, release.address)
            if block is not None:
                return block.number <= old_numbers
    return False
