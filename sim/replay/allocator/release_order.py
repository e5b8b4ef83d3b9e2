"""Which releases the rules predict for a moment when the recording gives memory back.

A recording does not say why memory was given back: ``empty_cache``, a request the device could not serve, or
garbage collection.  Each reason releases its own blocks in its own order; the one that explains what was
recorded is taken, and where none does, the prediction is that of ``empty_cache``.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

from sim.replay.allocator.blocks import Block
from sim.replay.allocator.caching import CachingAllocator
from sim.replay.allocator.pools import COMMON_POOL, BlockPool, PoolId
from sim.replay.allocator.release import aged_victims, oversize_victims, whole_segments


class Release(NamedTuple):
    """A range given back: ``segment_free`` or ``segment_unmap``, bytes."""

    action: str
    address: int
    size: int


def matching_releases(
    allocator: CachingAllocator, recorded: list[Release], request: tuple[int, int, PoolId] | None
) -> list[Release]:
    """The predicted releases for this moment.  ``request``: rounded size, stream and pool of what comes next."""
    plain = _emptied(allocator, recorded, set())
    if plain == recorded:
        return plain
    within = request is not None and _not_cached(allocator, *request)
    for collecting, oversize in product((False, True), repeat=2):
        if (collecting or oversize) and not within:
            continue
        found = _explained(allocator, recorded, request, collecting=collecting, oversize=oversize)
        if found is not None:
            return found
    return _one_pool(allocator, recorded) or plain


def _not_cached(allocator: CachingAllocator, size: int, stream: int, pool_id: PoolId) -> bool:
    return allocator.best_fit(_pool(allocator, size, pool_id), stream, size) is None


def _pool(allocator: CachingAllocator, size: int, pool_id: PoolId) -> BlockPool:
    return allocator.pool_for_size(size, pool_id)


def _explained(
    allocator: CachingAllocator,
    recorded: list[Release],
    request: tuple[int, int, PoolId] | None,
    *,
    collecting: bool,
    oversize: bool,
) -> list[Release] | None:
    """Garbage collection, oversize blocks, then everything: does some beginning of that explain what was recorded?"""
    found: list[Release] = []
    gone: set[int] = set()
    if collecting:
        if allocator.config.garbage_collection_threshold == 0.0:
            return None
        for victims in aged_victims(allocator.pool(COMMON_POOL, small=False)):
            part = [_whole(block) for block in victims]
            if recorded[len(found) : len(found) + len(part)] != part:
                break
            found += part
            gone.update(release.address for release in part)
    if oversize and request is not None:
        limit = allocator.config.max_split_size
        if limit is None:
            return None
        size, stream, pool_id = request
        victims, _ = oversize_victims(_pool(allocator, size, pool_id), stream, size, limit)
        part = [_whole(block) for block in victims if block.address not in gone]
        found += part
        gone.update(release.address for release in part)
    if found == recorded:
        return found
    found += _emptied(allocator, recorded, gone)
    return found if found == recorded else None


def _emptied(allocator: CachingAllocator, recorded: list[Release], gone: set[int]) -> list[Release]:
    """Emptying the cache.  Of private pools, those of which something was released: their graphs are gone."""
    releases = _of_pool(allocator.pool(COMMON_POOL, small=False), gone)
    releases += _of_pool(allocator.pool(COMMON_POOL, small=True), gone)
    left = recorded[len(releases) :]
    return releases + _private_pools(allocator, left, gone)


def _private_pools(allocator: CachingAllocator, recorded: list[Release], gone: set[int]) -> list[Release]:
    """The released private pools, in the order recorded: PyTorch's order of pools is that of a hash table."""
    found: list[Release] = []
    waiting = {}
    for pool_id in allocator.private_pool_ids():
        part = _of_pool(allocator.pool(pool_id, small=True), gone) + _of_pool(
            allocator.pool(pool_id, small=False), gone
        )
        if part:
            waiting[part[0]] = part
    while len(found) < len(recorded):
        part = waiting.pop(recorded[len(found)], [])
        if not part:
            break
        found += part
    return found


def _one_pool(allocator: CachingAllocator, recorded: list[Release]) -> list[Release] | None:
    """Emptying private pools alone (``MemPool`` released)."""
    found = _private_pools(allocator, recorded, set())
    return found if found == recorded else None


def _of_pool(pool: BlockPool, gone: set[int]) -> list[Release]:
    segments, expandable = whole_segments(pool)
    releases = [_whole(block) for block in segments if block.address not in gone]
    for block in expandable:
        assert block.virtual is not None
        start, end = block.virtual.whole_pages(block)
        if start < end:
            releases.append(Release("segment_unmap", start, end - start))
    return releases


def _whole(block: Block) -> Release:
    return Release("segment_free", block.address, block.size)
