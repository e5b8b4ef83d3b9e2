"""Which cached memory is given back, and in which order.  Nothing here changes anything.

Sources: ``release_available_cached_blocks``, ``release_blocks`` and ``garbage_collect_cached_blocks`` of
c10/cuda/CUDACachingAllocator.cpp (PyTorch v2.13.0).  Since 2.9 the first passes over expandable blocks, and
garbage collection releases none of them; before, PyTorch failed on an assertion there.
"""

from __future__ import annotations

from collections.abc import Iterator

from sim.replay.allocator.blocks import Block, smallest_key
from sim.replay.allocator.pools import BlockPool


def oversize_victims(pool: BlockPool, stream: int, size: int, max_split_size: int) -> tuple[list[Block], bool]:
    """Oversize blocks of one stream to give back for a request of ``size`` bytes, and whether they are enough.

    One block that is large enough, the smallest such; else several, the largest first.  They are given
    back even where they are not enough.
    """
    free = pool.free.get(stream)
    if free is None:
        return [], False
    wanted = max(size, max_split_size)
    key = smallest_key(wanted)
    enough = free.first_from(key)
    if enough is not None and enough.virtual is None:
        return [enough], True
    victims: list[Block] = []
    total = 0
    for block in free.downward_from(key):
        if total >= wanted or block.size < max_split_size:
            break
        if block.virtual is None:
            victims.append(block)
            total += block.size
    return victims, total >= wanted


def whole_segments(pool: BlockPool) -> tuple[list[Block], list[Block]]:
    """What emptying a pool gives back: free blocks that are whole segments, then expandable ones (by pages)."""
    segments: list[Block] = []
    expandable: list[Block] = []
    for block in pool.free_blocks():
        if block.virtual is not None:
            expandable.append(block)
        elif block.whole:
            segments.append(block)
    return segments, expandable


def aged_victims(pool: BlockPool) -> Iterator[list[Block]]:
    """Rounds of garbage collection: in each, the whole free segments of at least the average age.

    The rounds assume that each is given back before the next is asked for; the caller stops when enough is.
    """
    left = [block for block in pool.free_blocks() if block.whole]
    total_age = sum(pool.age(block) for block in left)
    while left:
        average = total_age / len(left)
        victims = [block for block in left if block.virtual is None and pool.age(block) >= average]
        if not victims:
            return
        yield victims
        chosen = set(map(id, victims))
        left = [block for block in left if id(block) not in chosen]
        total_age -= sum(pool.age(block) for block in victims)
