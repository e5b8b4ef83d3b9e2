"""PyTorch's CUDA caching allocator as a pure state machine, exact to the address.

Source: ``DeviceCachingAllocator`` of c10/cuda/CUDACachingAllocator.cpp (PyTorch v2.13.0, commit cf30153c;
docs/allocator.md has the rules one by one and the version in which each changed).  One object is one device.
No time passes here: that a stream has reached the point up to which it used a freed block is told by the
caller (:class:`StreamUse`), and where new segments lie is the policy of the :class:`Device`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from sim.errors import UserError
from sim.replay.allocator.blocks import Block, absorb, smallest_key
from sim.replay.allocator.config import AllocatorConfig
from sim.replay.allocator.device import Device, DeviceMemory
from sim.replay.allocator.expandable import ExpandableSegments, expandable_size
from sim.replay.allocator.ledger import Ledger, Listener, Statistics
from sim.replay.allocator.oom import OutOfMemory, OutOfMemoryError
from sim.replay.allocator.ordering import NEWEST_ORDERING, Numbering, Ordering
from sim.replay.allocator.pools import COMMON_POOL, BlockPool, PoolId, PrivatePool
from sim.replay.allocator.release import aged_victims, oversize_victims, whole_segments
from sim.replay.allocator.rounding import (
    LARGEST_REQUEST,
    MIN_BLOCK_SIZE,
    NO_ROUNDUP,
    SMALL_SIZE,
    round_size,
    segment_size,
)

_NEVER = 1 << 200  # larger than any size: "no limit"


class Allocation(NamedTuple):
    """What a request got: the address, and the block's size in bytes (the request, rounded, or more)."""

    address: int
    size: int


class StreamUse:
    """A use of a freed block by another stream; the block returns once all its uses are over.

    The event PyTorch records on that stream when the block is freed.  The caller calls :meth:`over` when the
    stream has reached it; the allocator looks at the next request, as PyTorch does.
    """

    __slots__ = ("address", "ended", "stream")

    def __init__(self, address: int, stream: int) -> None:
        self.address = address
        self.stream = stream
        self.ended = False

    def over(self) -> None:
        self.ended = True


class _Capture(NamedTuple):
    pool_id: PoolId
    accepts: Callable[[int], bool]
    capturing: bool


class CachingAllocator:
    """The allocator of one device.

    ``listener`` is told of every request to the device, in order.  Sizes and addresses are bytes.  ``ordering``
    says which of several free blocks of one size is taken, which changed with 2.12 and 2.13.
    """

    def __init__(
        self,
        config: AllocatorConfig | None = None,
        device: Device | None = None,
        listener: Listener | None = None,
        device_index: int = 0,
        ordering: Ordering = NEWEST_ORDERING,
    ) -> None:
        self.device: Device = DeviceMemory() if device is None else device
        self.device_index = device_index
        self._ledger = Ledger(listener)
        self.numbering = Numbering(ordering)
        self._small = BlockPool(small=True)
        self._large = BlockPool(small=False)
        self._private: dict[PoolId, PrivatePool] = {}
        self._captures: list[_Capture] = []
        self._capturing = 0  # captures of CUDA graphs among them
        self._live: dict[int, Block] = {}  # handed out, by address
        self._pending: dict[int, Block] = {}  # freed, but another stream still uses them
        self._uses: dict[int, deque[tuple[StreamUse, Block]]] = {}  # by stream, in the order of the events
        self._deferred: list[Block] = []  # freed during a capture: their events wait for its end
        self.allowed_bytes: int | None = None
        self._ages_count = False
        self._expandable = ExpandableSegments(self.device, self._ledger, self.numbering, 0)
        self.reconfigure(AllocatorConfig() if config is None else config)
        self.set_memory_fraction(self.config.per_process_memory_fraction)

    # settings

    def reconfigure(self, config: AllocatorConfig) -> None:
        """Use other settings from now on (``torch.cuda.memory._set_allocator_settings``)."""
        self.config = config
        divisions = config.roundup_power2_divisions
        self._divisions = None if divisions == NO_ROUNDUP else divisions
        self._max_split = _NEVER if config.max_split_size is None else config.max_split_size
        self._expanding = config.expandable_segments
        self._expandable.large_page = config.large_segment_size
        self._ages_count = self._collects()
        # should_split: what must remain of a large block; blocks of the small pool and, with expandable
        # segments on, all blocks are split down to 512 bytes whatever max_split_size_mb says (since 2.1).
        self._large_remainder = MIN_BLOCK_SIZE if config.expandable_segments else SMALL_SIZE + 1
        self._unsplit_from = _NEVER if config.expandable_segments else self._max_split

    def set_memory_fraction(self, fraction: float) -> None:
        """Allow only a part of the device's memory (``set_per_process_memory_fraction``); 1 allows all.

        Garbage collection works only where less than all is allowed (since 2.10 a fraction of 1 is no limit).
        """
        if not 0.0 <= fraction <= 1.0:
            raise UserError(f"a memory fraction of {fraction} is not possible: give one in 0 to 1")
        self.allowed_bytes = int(fraction * self.device.total_bytes) if fraction < 1.0 else None
        self._ages_count = self._collects()

    def _collects(self) -> bool:
        return self.allowed_bytes is not None and self.config.garbage_collection_threshold > 0.0

    def count_ages(self) -> None:
        """Count how long blocks stay free though nothing is collected here: for a recording that may collect."""
        self._ages_count = True

    # the program's requests

    def malloc(
        self,
        nbytes: int,
        stream: int = 0,
        pool_id: PoolId | None = None,
        *,
        search: bool = True,
        release: bool = True,
    ) -> Allocation:
        """Memory for ``nbytes`` bytes used on ``stream``.  0 bytes are address 0, as in PyTorch.

        ``pool_id`` names the pool instead of what captures under way say; without ``search`` cached blocks are
        passed over (a request that failed once and waited for all streams does not search again), and without
        ``release`` nothing cached is given back for it (as while a graph is captured).  Raises
        :class:`~sim.replay.allocator.oom.OutOfMemoryError`, and UserError for a negative size.
        """
        if nbytes <= 0 or nbytes >= LARGEST_REQUEST:
            return self._refuse_or_nothing(nbytes, stream)
        if self._uses or self._deferred:
            self.process_events()
        size = round_size(nbytes, self._divisions)
        if pool_id is None and not self._captures:
            pool = self._small if size <= SMALL_SIZE else self._large
        else:
            pool = self._pool_for(size, stream, pool_id)
        if self._ages_count:
            pool.searches += 1
        block = self._cached(pool, stream, size) if search else None
        if block is None:
            block = self._uncached(pool, stream, size, nbytes, release=release and not self._capturing)
        remaining = block.size - size
        if remaining >= MIN_BLOCK_SIZE and (
            pool.small or (remaining >= self._large_remainder and size < self._unsplit_from)
        ):
            self._split(block, size)
        self._hand_out(block, nbytes)
        return Allocation(block.address, block.size)

    def free(self, address: int) -> tuple[StreamUse, ...]:
        """Give a block back.  Returns the uses by other streams that must end before it is free (mostly none).

        Raises UserError where nothing is allocated at ``address``.
        """
        block = self._live.pop(address, None)
        if block is None:
            if address == 0:
                return ()
            raise UserError(f"nothing is allocated at {address:#x}: it was never handed out or is freed already")
        block.allocated = False
        self._ledger.allocated -= block.size
        if block.users is None:
            self._free_block(block)
            return ()
        self._pending[address] = block
        if self._capturing:
            # Events of a capture cannot be asked: end-of-life events wait until it is over.
            self._deferred.append(block)
            return ()
        return self._insert_events(block)

    def record_stream(self, address: int, stream: int) -> None:
        """Another stream uses the block (``Tensor.record_stream``); its own stream changes nothing."""
        block = self._live.get(address)
        if block is None:
            raise UserError(f"nothing is allocated at {address:#x}, so stream {stream} cannot use it")
        if stream == block.stream:
            return
        if block.users is None:
            block.users = {}
        block.users[stream] = block.users.get(stream, False) or self._capturing > 0

    def empty_cache(self, pool_id: PoolId = COMMON_POOL) -> None:
        """Wait for all streams and give back all cached memory that is whole (``torch.cuda.empty_cache``)."""
        self._release_cached(pool_id)

    # other streams

    def process_events(self) -> None:
        """Free blocks whose uses by other streams are over, each stream's in order (every malloc does so)."""
        if self._capturing:
            return
        self._insert_deferred_events()
        for stream in list(self._uses):
            queue = self._uses[stream]
            while queue and queue[0][0].ended:
                self._end_use(queue.popleft()[1])
            if not queue:
                del self._uses[stream]

    def complete_stream(self, stream: int) -> None:
        """Mark all uses so far on one stream as over."""
        for use, _ in self._uses.get(stream, ()):
            use.over()

    def synchronize(self) -> None:
        """All streams have done all their work: every freed block is free."""
        self._insert_deferred_events()
        uses, self._uses = self._uses, {}
        for queue in uses.values():
            for _, block in queue:
                self._end_use(block)
        for block in list(self._pending.values()):  # held, without uses of their own
            self._return_pending(block)

    def hold(self, address: int) -> None:
        """Free a block that stays in use elsewhere until :meth:`finish_pending`: what a recording tells."""
        block = self._live.pop(address, None)
        if block is None:
            raise UserError(f"nothing is allocated at {address:#x}: it was never handed out or is freed already")
        block.allocated = False
        self._ledger.allocated -= block.size
        block.events += 1
        self._pending[address] = block

    def finish_pending(self, address: int) -> None:
        """A block that waits for other streams is free now, whatever its uses say."""
        block = self._pending.get(address)
        if block is None:
            raise UserError(f"no freed block at {address:#x} waits for another stream")
        for stream, queue in list(self._uses.items()):
            left = deque(entry for entry in queue if entry[1] is not block)
            if left:
                self._uses[stream] = left
            else:
                del self._uses[stream]
        self._deferred = [other for other in self._deferred if other is not block]
        self._return_pending(block)

    def _insert_events(self, block: Block) -> tuple[StreamUse, ...]:
        users, block.users = block.users or {}, None
        made = []
        for stream in users:
            use = StreamUse(block.address, stream)
            block.events += 1
            self._uses.setdefault(stream, deque()).append((use, block))
            made.append(use)
        return tuple(made)

    def _insert_deferred_events(self) -> None:
        deferred, self._deferred = self._deferred, []
        for block in deferred:
            # What was recorded during the capture is over with it.
            block.users = {stream: False for stream, captured in (block.users or {}).items() if not captured}
            self._insert_events(block)
            if block.events == 0:
                self._return_pending(block)

    def _end_use(self, block: Block) -> None:
        block.events -= 1
        if block.events == 0:
            self._return_pending(block)

    def _return_pending(self, block: Block) -> None:
        del self._pending[block.address]
        block.events = 0
        block.users = None
        self._free_block(block)

    # private pools

    def begin_pool(
        self, pool_id: PoolId, streams: Callable[[int], bool] | None = None, *, capturing: bool = True
    ) -> None:
        """Serve requests from a private pool: during the capture of a CUDA graph, or ``use_mem_pool``.

        ``streams`` says for which streams (all by default); the capture begun last is asked first (since 2.9).
        ``capturing`` is false for ``use_mem_pool``, which lets events be asked and the cache be emptied.
        """
        if any(capture.pool_id == pool_id for capture in self._captures):
            raise UserError(f"memory pool {pool_id} is in use already: end it before it begins again")
        if pool_id in self._private:
            self._private[pool_id].uses += 1
        else:
            self._private[pool_id] = PrivatePool(pool_id)
        self._captures.append(_Capture(pool_id, streams or (lambda stream: True), capturing))
        self._capturing += capturing

    def end_pool(self, pool_id: PoolId) -> None:
        """The capture is over; the pool keeps its memory for the graph."""
        for capture in self._captures:
            if capture.pool_id == pool_id:
                self._captures.remove(capture)
                self._capturing -= capture.capturing
                return
        raise UserError(f"memory pool {pool_id} is not in use, so it cannot end")

    def release_pool(self, pool_id: PoolId) -> None:
        """A graph that used the pool is gone; after the last, emptying the cache gives its memory back."""
        pool = self._private.get(pool_id)
        if pool is None or pool.uses == 0:
            raise UserError(f"memory pool {pool_id} is unknown or released already")
        pool.uses -= 1

    def private_pool_ids(self) -> tuple[PoolId, ...]:
        return tuple(self._private)

    def _pool_for(self, size: int, stream: int, pool_id: PoolId | None) -> BlockPool:
        if pool_id is None:
            pool_id = next(
                (capture.pool_id for capture in reversed(self._captures) if capture.accepts(stream)), COMMON_POOL
            )
        return self.pool_for_size(size, pool_id)

    def pool_for_size(self, size: int, pool_id: PoolId) -> BlockPool:
        """The free lists that serve a request of ``size`` (rounded) bytes."""
        return self.pool(pool_id, small=size <= SMALL_SIZE)

    def pool(self, pool_id: PoolId, *, small: bool) -> BlockPool:
        """The free lists of a pool; a private pool that is not known yet is made."""
        if pool_id == COMMON_POOL:
            return self._small if small else self._large
        private = self._private.get(pool_id)
        if private is None:
            private = self._private[pool_id] = PrivatePool(pool_id)
        return private.small if small else private.large

    # cached blocks

    def _cached(self, pool: BlockPool, stream: int, size: int) -> Block | None:
        """The best fitting cached block, taken out of its list (``get_free_block``)."""
        block = self.best_fit(pool, stream, size)
        if block is not None:
            pool.forget(block)
        return block

    def best_fit(self, pool: BlockPool, stream: int, size: int) -> Block | None:
        """The block a request of ``size`` (rounded) bytes would be given from the cache, left where it is."""
        free = pool.free.get(stream)
        block = None if free is None else free.first_from(smallest_key(size))
        if block is None:
            return None
        if block.virtual is not None:
            block = self._best_expandable(pool, stream, block)
            if block is None:
                return None
        limit = self._max_split
        if size < limit:
            # An oversize block is not given to a request that is not oversize itself ...
            return None if block.size >= limit else block
        # ... and to one that is only if it wastes less than max_non_split_rounding_mb (20 MiB until 2.6).
        return None if block.size >= size + self.config.max_non_split_rounding else block

    def _best_expandable(self, pool: BlockPool, stream: int, first: Block) -> Block | None:
        """``first`` or a larger block, when the best fitting one lies in an expandable segment."""
        if self._expanding and (first.next is None or first.next.mapped):
            return first  # it cannot grow, and every block after it is at least as large
        following = pool.free[stream].upward_from(first.key)
        best = next(following)
        if not self._expanding:
            # Expandable segments were switched off: only other blocks serve.
            return next((block for block in following if block.virtual is None), None)
        for block in following:
            if best.virtual is None or expandable_size(block) >= expandable_size(best):
                break
            best = block
        return best

    def _split(self, block: Block, size: int) -> None:
        """Cut a block that is in no list down to ``size`` bytes; the rest is free."""
        rest = Block(block.address + size, block.size - size, block.stream, block.pool, block.virtual)
        rest.link(block, block.next)
        block.size = size
        rest.number = block.number  # the front part is the new one
        block.number = self.numbering.part(block)
        block.pool.add(rest)

    def _hand_out(self, block: Block, nbytes: int) -> None:
        block.allocated = True
        block.requested = nbytes
        self._live[block.address] = block
        self._ledger.hand_out(block.size, nbytes)

    def _free_block(self, block: Block) -> None:
        """Into the free list, merged with idle neighbours (``free_block``)."""
        ledger = self._ledger
        ledger.active -= block.size
        ledger.requested -= block.requested
        block.requested = 0
        pool = block.pool
        if block.previous is not None:
            absorb(block, block.previous)
        if block.next is not None:
            absorb(block, block.next)
        pool.add(block)

    # new memory

    def _uncached(self, pool: BlockPool, stream: int, size: int, nbytes: int, *, release: bool) -> Block:
        """Memory from the device, giving back cached memory where the device has no more (``malloc``)."""
        if self._collects():
            self._collect_garbage()
        block = self._from_device(pool, stream, size)
        if block is None and self._max_split != _NEVER and self._release_oversize(pool, stream, size):
            block = self._from_device(pool, stream, size)
        if block is None and release:
            self._release_cached(COMMON_POOL)
            self._ledger.retries += 1
            block = self._from_device(pool, stream, size)
        if block is None:
            raise self._out_of_memory(stream, size, nbytes)
        return block

    def _from_device(self, pool: BlockPool, stream: int, size: int) -> Block | None:
        """A new segment, or newly mapped pages (``alloc_block``)."""
        wanted = segment_size(size, self.config.large_segment_size)
        if self.allowed_bytes is not None and self._ledger.reserved + wanted > self.allowed_bytes:
            return None
        if self._expanding:
            return self._expandable.take(pool, stream, size)
        address = self.device.allocate(wanted, stream)
        if address is None:
            return None
        if pool.owner is not None:
            pool.owner.segments += 1
        self._ledger.reserve("segment_alloc", address, wanted, stream, pool.pool_id)
        block = Block(address, wanted, stream, pool)
        block.number = self.numbering.memory()
        return block

    def _out_of_memory(self, stream: int, size: int, nbytes: int) -> OutOfMemoryError:
        ledger = self._ledger
        ledger.out_of_memories += 1
        private = sum(
            block.size for pool in self._private.values() for part in (pool.large, pool.small)
            for block in part.free_blocks()
        )  # fmt: skip
        return OutOfMemoryError(
            OutOfMemory(
                requested=nbytes,
                tried=segment_size(size, self.config.large_segment_size),
                stream=stream,
                device_total=self.device.total_bytes,
                device_free=self.device.free_bytes(),
                allowed=self.allowed_bytes,
                allocated=ledger.allocated,
                private_pools=private,
                reserved=ledger.reserved,
                device=self.device_index,
            )
        )

    def _refuse_or_nothing(self, nbytes: int, stream: int) -> Allocation:
        if nbytes < 0:
            raise UserError(f"{nbytes} bytes cannot be allocated: a size is 0 or more")
        if nbytes == 0:
            return Allocation(0, 0)
        raise self._out_of_memory(stream, nbytes, nbytes)

    # giving memory back

    def _collect_garbage(self) -> None:
        """Give back old cached segments above the threshold (``garbage_collect_cached_blocks``)."""
        assert self.allowed_bytes is not None
        threshold = int(self.config.garbage_collection_threshold * self.allowed_bytes)
        reserved = self._ledger.reserved
        if reserved <= threshold:
            return
        target, reclaimed = reserved - threshold, 0
        rounds = aged_victims(self._large)
        while reclaimed < target and (victims := next(rounds, None)):
            for block in victims:
                reclaimed += block.size
                self.release_segment(block)

    def _release_oversize(self, pool: BlockPool, stream: int, size: int) -> bool:
        """Give back oversize blocks for a request (``release_available_cached_blocks``)."""
        victims, enough = oversize_victims(pool, stream, size, self._max_split)
        for block in victims:
            self.release_segment(block)
        return enough

    def _release_cached(self, pool_id: PoolId) -> None:
        """Give back all that is cached and whole (``release_cached_blocks``)."""
        if pool_id == COMMON_POOL and not self._capturing:
            self.synchronize()
            self._empty(self._large)
            self._empty(self._small)
        for private_id, private in list(self._private.items()):
            if private.uses == 0 and pool_id in (COMMON_POOL, private_id):
                if pool_id != COMMON_POOL:
                    self._synchronize_pool(private)
                self.empty_private_pool(private_id)

    def empty_private_pool(self, pool_id: PoolId) -> None:
        """Give back what is cached and whole of one private pool, and forget the pool once it has nothing."""
        private = self._private[pool_id]
        self._empty(private.small)
        self._empty(private.large)
        nothing = not any(True for part in (private.small, private.large) for _ in _all_blocks(part))
        in_use = any(block.pool.owner is private for block in (*self._live.values(), *self._pending.values()))
        if private.uses == 0 and nothing and not in_use:
            del self._private[pool_id]

    def _synchronize_pool(self, private: PrivatePool) -> None:
        self._insert_deferred_events()
        for block in [block for block in self._pending.values() if block.pool.owner is private]:
            self.finish_pending(block.address)

    def _empty(self, pool: BlockPool) -> None:
        segments, expandable = whole_segments(pool)
        for block in segments:
            self.release_segment(block)
        for block in expandable:
            self._expandable.unmap(block)

    def release_segment(self, block: Block) -> None:
        """Give one whole free segment back (``release_block``)."""
        assert block.whole and block.idle and block.virtual is None
        pool = block.pool
        pool.forget(block)
        if pool.owner is not None:
            pool.owner.segments -= 1
        self.device.release(block.address, block.size)
        self._ledger.give_back("segment_free", block.address, block.size, block.stream, pool.pool_id)

    def unmap_block(self, block: Block) -> None:
        """Give the whole pages within a free expandable block back."""
        self._expandable.unmap(block)

    # states that did not come about here

    def adopt(self, block: Block, *, allocated: bool = False, pending: bool = False) -> None:
        """Take in a block whose neighbours are linked already: handed out, waiting, free or unmapped."""
        if not block.mapped:
            block.pool.add_unmapped(block)
            return
        ledger = self._ledger
        ledger.reserved += block.size
        ledger.peak_reserved = max(ledger.peak_reserved, ledger.reserved)
        if not allocated and not pending:
            block.pool.add(block)
            return
        ledger.hand_out(block.size, block.requested)
        block.allocated = True
        self._live[block.address] = block
        if pending:
            self.hold(block.address)

    def place(self, block: Block, size: int, nbytes: int) -> None:
        """Hand out the first ``size`` bytes of a free block, wherever the rules would have gone."""
        block.pool.forget(block)
        if block.size > size:
            self._split(block, size)
        self._hand_out(block, nbytes)

    def make_older(self, block: Block, number: int) -> None:
        """Give a block's memory a smaller number: all its segment's blocks, or (2.12) the block's alone."""
        changed: Block | None = block if self.numbering.by_block else block.head
        while changed is not None:
            listed = changed.idle and changed.mapped
            age_base = changed.age_base
            if listed:
                changed.pool.forget(changed)
            changed.number = number
            if listed:
                changed.pool.add(changed)
                changed.age_base = age_base
            changed = None if self.numbering.by_block else changed.next

    # what is there

    @property
    def allocated_bytes(self) -> int:
        return self._ledger.allocated

    @property
    def reserved_bytes(self) -> int:
        return self._ledger.reserved

    def statistics(self) -> Statistics:
        return self._ledger.statistics()

    def reset_peaks(self) -> None:
        self._ledger.reset_peaks()

    def pools(self) -> tuple[BlockPool, ...]:
        """All pools: the common ones, then the private ones in the order they were made."""
        private = (part for pool in self._private.values() for part in (pool.small, pool.large))
        return (self._small, self._large, *private)

    def blocks(self) -> Iterator[Block]:
        """Every block there is, unmapped ranges included, in no particular order."""
        for pool in self.pools():
            yield from _all_blocks(pool)
        yield from self._live.values()
        yield from self._pending.values()

    def live_block(self, address: int) -> Block | None:
        """The block that is handed out at ``address``."""
        return self._live.get(address)

    def is_pending(self, address: int) -> bool:
        """Whether the block at ``address`` is freed but still used by another stream."""
        return address in self._pending


def _all_blocks(pool: BlockPool) -> Iterator[Block]:
    yield from pool.free_blocks()
    yield from pool.unmapped_blocks()
