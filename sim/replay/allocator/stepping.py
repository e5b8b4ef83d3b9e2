"""Stepping the allocator through a recorded history: what is taken from the recording, and what is compared."""

from __future__ import annotations

import dataclasses

from sim.replay.allocator.caching import Allocation, CachingAllocator
from sim.replay.allocator.comparison import SnapshotReplay
from sim.replay.allocator.given_back import differ_by_age, free_pages, free_segment, release_of
from sim.replay.allocator.history import History
from sim.replay.allocator.intervals import Intervals
from sim.replay.allocator.ledger import SegmentEvent
from sim.replay.allocator.oom import OutOfMemoryError
from sim.replay.allocator.ordering import Ordering
from sim.replay.allocator.pools import COMMON_POOL, PoolId
from sim.replay.allocator.recording import DeviceRecording, Recording, TraceEvent
from sim.replay.allocator.release_order import Release, matching_releases
from sim.replay.allocator.rounding import SMALL_SIZE, round_size
from sim.replay.allocator.segments import BlockView, SegmentView, adopt_segment, extend_range, restore
from sim.replay.allocator.tally import Tally

_REQUESTS = ("segment_alloc", "segment_map")
_RELEASES = ("segment_free", "segment_unmap")
_RELEASES_OF: dict[Ordering, str] = {"address": "until 2.11", "block": "2.12", "segment": "since 2.13"}
_NOWHERE = 1 << 62  # where a segment is put that the recording does not have; no device reaches so far
_ADDRESS_SPACE = 1 << 45  # a recording does not say how large its GPU is; only has to be larger than it


class _RecordedDevice:
    """The driver as it behaved: it gives the addresses of the recording, and nothing where that ran out."""

    total_bytes = _ADDRESS_SPACE

    def __init__(self, replay: DeviceReplay) -> None:
        self._replay = replay
        self._nowhere = _NOWHERE

    def free_bytes(self) -> int:
        return 0

    def allocate(self, nbytes: int, stream: int) -> int | None:
        event = self._replay.next_event()
        if event is not None and event.action == "segment_alloc":
            self._replay.compare_request(event, event.address, nbytes)
            return event.address
        return self._unrecorded(event, nbytes)

    def map(self, address: int, nbytes: int) -> bool:
        event = self._replay.next_event()
        if event is not None and event.action == "segment_map":
            self._replay.compare_request(event, address, nbytes)
            return True
        return self._unrecorded(event, nbytes) is not None

    def reserve(self, nbytes: int, stream: int) -> int:
        event = self._replay.next_event()
        return event.address if event is not None and event.action == "segment_map" else self._away(nbytes)

    def _unrecorded(self, event: TraceEvent | None, nbytes: int) -> int | None:
        """A request the recording does not have: either it failed, which an out-of-memory tells, or it is wrong."""
        if event is None or event.action != "alloc":
            self._replay.skip_completed()
            return None
        self._replay.wrong_request(event, nbytes)
        return self._away(nbytes)

    def _away(self, nbytes: int) -> int:
        address = self._nowhere
        self._nowhere += nbytes
        return address

    def release(self, address: int, nbytes: int) -> None: ...
    def unmap(self, address: int, nbytes: int) -> None: ...
    def unreserve(self, address: int, nbytes: int) -> None: ...


class _LostError(Exception):
    """Prediction and recording have parted so far that following the recording makes no sense any more."""


class DeviceReplay:
    """Steps the allocator through the events of one device and counts."""

    def __init__(
        self,
        recording: DeviceRecording,
        history: History,
        whole: Recording,
        start: tuple[SegmentView, ...],
        *,
        complete: bool,
        ordering: Ordering,
    ) -> None:
        self._events = history.events
        self._place = 0
        config = whole.config
        if not whole.settings_known and any(event.action == "segment_map" for event in self._events):
            config = dataclasses.replace(config, expandable_segments=True)
        self._allocator = CachingAllocator(config, _RecordedDevice(self), self._hear, recording.device, ordering)
        self._allocator.set_memory_fraction(1.0)  # the recording tells when a limit was reached
        self._collects = config.garbage_collection_threshold > 0.0
        if self._collects:
            self._allocator.count_ages()
        self._ages_known = complete and not start
        self._pressed: bool | None = None  # see _under_pressure
        kinds = {event.action == "segment_map" for event in self._events if event.action in _REQUESTS}
        kinds.update(view.expandable for view in (*recording.segments, *start) if view.pool_id == COMMON_POOL)
        self._mixed = len(kinds) == 2  # segments of both kinds: expandable_segments may have been switched
        self._known = Intervals()  # memory whose blocks are known here
        self._complete = complete
        self._elsewhere: set[int] = set()  # blocks in memory that is not known
        self._pool_ranges: list[tuple[int, int, PoolId]] = [
            (view.address, view.address + view.size, view.pool_id)
            for view in (*recording.segments, *start)
            if view.pool_id != COMMON_POOL
        ]
        self._replaying_releases = False
        self._tally = Tally(recording.device)
        restore(self._allocator, start)
        self._old_numbers = self._allocator.numbering.last  # numbers up to here were guessed: see _learn_order
        if ordering != "address":
            self._tally.note(
                f"of free blocks of one size the oldest {ordering} is taken, as in PyTorch {_RELEASES_OF[ordering]}"
            )
        for view in start:
            self._known.add(view.address, view.address + view.size)
        if not complete:
            self._tally.note("memory from before the recording is left out: its blocks cannot be worked out")
        self._tally.weigh(self._allocator)

    def run(self) -> SnapshotReplay:
        steps = {
            "free_requested": self._free_requested,
            "free_completed": self._free_completed,
            "segment_free": self._releases,
            "segment_unmap": self._releases,
        }
        try:
            while (event := self.next_event()) is not None:
                steps.get(event.action, self._serve)(event)
        except _LostError:
            self._give_up()
        return self._tally.told(self._allocator)

    # the recording

    def next_event(self) -> TraceEvent | None:
        """The event that comes next, or ``None`` at the end."""
        return self._events[self._place] if self._place < len(self._events) else None

    def skip_completed(self) -> None:
        """Frees that were completed while the allocator waited for all streams, inside a request."""
        while (event := self.next_event()) is not None and event.action == "free_completed":
            self._place += 1

    # requests to the device

    def compare_request(self, event: TraceEvent, address: int, nbytes: int) -> None:
        """The allocator asks for memory where the recording does: is it as much, and (mapped) at the same place?"""
        self._tally.count("segments_checked")
        if nbytes != event.size:
            self._tally.differs(event, event.size, nbytes)
        elif address != event.address:
            self._tally.differs(event, event.address, address)
        else:
            self._tally.count("segments_matched")
        self._known.add(event.address, event.address + event.size)
        self._place += 1

    def wrong_request(self, event: TraceEvent, nbytes: int) -> None:
        """The allocator asks for memory where the recording found some cached."""
        self._tally.differs(event, None, nbytes)

    def _hear(self, event: SegmentEvent) -> None:
        """The allocator gives memory back within a request: the recording has to say the same."""
        if event.action not in _RELEASES or self._replaying_releases:
            return
        recorded = self.next_event()
        if recorded is None or recorded.action != event.action:
            if recorded is not None:
                self._tally.differs(recorded, None, event.address)
            return
        self._count_release(recorded, Release(event.action, event.address, event.size))
        self._known.remove(recorded.address, recorded.address + recorded.size)
        self._place += 1

    # requests of the program

    def _serve(self, event: TraceEvent) -> None:
        """A request, with the memory asked of the device before it."""
        if event.action == "segment_map" and not self._complete:
            return self._unknown_pages(event)
        target = self._target()
        if target is None:
            return self._orphan(event)
        request = self._events[target]
        if request.action == "alloc" and target == self._place and not self._is_known(request.address):
            self._tally.count("not_predictable")
            self._elsewhere.add(request.address)
            self._place += 1
            return None
        pool_id = self._pool_of(request)
        self._follow_switch(event, pool_id)
        self._follow_range(event, pool_id, request)
        pressed, self._pressed = bool(self._pressed) and event.action != "alloc", None
        learnt = request is event and self._learn_order(request, pool_id)
        got = self._malloc(request, pool_id, search=not pressed)
        while self._place < target:
            self._unpredicted(self._events[self._place], request, pool_id)
        self._place = target + 1
        if learnt:
            self._tally.count("not_predictable")
        elif request.action == "alloc":
            self._compare_address(request, got)
        else:
            self._compare_failure(request, got)
        self._tally.weigh(self._allocator)
        return None

    def _learn_order(self, request: TraceEvent, pool_id: PoolId) -> bool:
        """Which of two equal blocks from before the recording is older is not known until one is taken.

        True where the recording tells it: this allocation was not predictable, later ones are.
        """
        if not self._old_numbers:
            return False
        size = self._rounded(request)
        pool = self._allocator.pool_for_size(size, pool_id)
        guess = self._allocator.best_fit(pool, request.stream, size)
        if guess is None or guess.address == request.address or guess.number > self._old_numbers:
            return False
        taken = pool.free[request.stream].find(guess.size, request.address)
        if taken is None or taken.number > self._old_numbers:
            return False
        if not self._allocator.numbering.by_block and taken.head is guess.head:
            return False  # within a segment the address decides, and that is known
        self._allocator.make_older(taken, guess.number - 1)
        return True

    def _unknown_pages(self, event: TraceEvent) -> None:
        """Pages of an expandable segment whose other pages are not known: free blocks reach across them."""
        self._tally.count("not_predictable")
        self._place += 1

    def _malloc(self, request: TraceEvent, pool_id: PoolId, *, search: bool) -> Allocation | None:
        try:
            # While a graph is captured nothing is given back; only private pools show that there are captures.
            release = request is not self.next_event() or not self._allocator.private_pool_ids()
            return self._allocator.malloc(max(request.size, 1), request.stream, pool_id, search=search, release=release)
        except OutOfMemoryError:
            return None

    def _target(self) -> int | None:
        """The request that the events from here on belong to."""
        for place in range(self._place, len(self._events)):
            action = self._events[place].action
            if action in ("alloc", "oom"):
                return place
            if action == "free_requested":
                return None
        return None

    def _compare_address(self, request: TraceEvent, got: Allocation | None) -> None:
        self._tally.count("allocations_checked")
        if got is not None and got.address == request.address:
            self._tally.count("allocations_matched")
            return
        self._tally.differs(request, request.address, None if got is None else got.address)
        if got is not None:
            self._allocator.free(got.address)
        self._force(request)

    def _compare_failure(self, request: TraceEvent, got: Allocation | None) -> None:
        self._tally.count("out_of_memory_checked")
        if got is None:
            self._tally.count("out_of_memory_matched")
            return
        self._allocator.free(got.address)
        if self._pool_ranges:
            # It may have failed in a private pool that never got memory, which nothing in a recording shows.
            self._tally.count("out_of_memory_checked", -1)
            self._tally.count("not_predictable")
            return
        self._tally.differs(request, None, got.address)

    def _follow_switch(self, event: TraceEvent, pool_id: PoolId) -> None:
        """Settings are those at the end of the recording; the kind of its requests shows what they were before."""
        config = self._allocator.config
        if pool_id == COMMON_POOL and event.action in _REQUESTS:
            expanding = event.action == "segment_map"
            if expanding != config.expandable_segments:
                self._switch()
        elif self._mixed and event.action == "alloc" and not self._serves(event, pool_id):
            self._switch()
            if not self._serves(event, pool_id):
                self._switch()

    def _switch(self) -> None:
        config = self._allocator.config
        self._allocator.reconfigure(dataclasses.replace(config, expandable_segments=not config.expandable_segments))
        self._tally.note("expandable_segments was switched during the recording, as its requests show")

    def _serves(self, request: TraceEvent, pool_id: PoolId) -> bool:
        """Whether the cache, with the settings as they are, would answer with the recorded address."""
        pool = self._allocator.pool_for_size(self._rounded(request), pool_id)
        block = self._allocator.best_fit(pool, request.stream, self._rounded(request))
        return block is not None and block.address == request.address

    def _follow_range(self, event: TraceEvent, pool_id: PoolId, request: TraceEvent) -> None:
        """Pages mapped below all that is known of a range: its start was unmapped when the recording began."""
        if event.action == "segment_map":
            pool = self._allocator.pool_for_size(self._rounded(request), pool_id)
            extend_range(pool, event.stream, event.address)

    def _rounded(self, request: TraceEvent) -> int:
        return round_size(max(request.size, 1), self._allocator.config.roundup_power2_divisions)

    def _pool_of(self, request: TraceEvent) -> PoolId:
        """Which pool the program's capture chose: said by the event, or by where the memory lies."""
        if request.pool_id is not None:
            return request.pool_id
        if request.action == "oom":
            return self._pool_of_failure(request)
        at = request.address
        return next((pool_id for low, high, pool_id in self._pool_ranges if low <= at < high), COMMON_POOL)

    def _pool_of_failure(self, request: TraceEvent) -> PoolId:
        """A failure has no address: with several pools, it was in one that has nothing cached for it."""
        for pool_id in (COMMON_POOL, *self._allocator.private_pool_ids()):
            if not self._served_from_cache(self._rounded(request), request.stream, pool_id):
                return pool_id
        return COMMON_POOL

    def _is_known(self, address: int) -> bool:
        return self._complete or address in self._known

    # following the recording where the prediction left it

    def _unpredicted(self, event: TraceEvent, request: TraceEvent, pool_id: PoolId) -> None:
        """Memory the recording asked for and the prediction did not."""
        self._place += 1
        if event.action not in _REQUESTS:
            return
        self._tally.count("segments_checked")
        self._tally.differs(event, event.size, None)
        self._known.add(event.address, event.address + event.size)
        self._adopt(event, self._rounded(request) <= SMALL_SIZE, pool_id)

    def _orphan(self, event: TraceEvent) -> None:
        """Memory taken from the device for a request that the recording does not have."""
        self._place += 1
        if event.action in _REQUESTS:
            self._tally.note("memory is taken from the device for a request the recording does not have")
            self._tally.count("not_predictable")
            self._known.add(event.address, event.address + event.size)
            self._adopt(event, event.size <= 2 * SMALL_SIZE, event.pool_id or COMMON_POOL)

    def _adopt(self, event: TraceEvent, small: bool, pool_id: PoolId) -> None:
        if event.action == "segment_map":
            raise _LostError
        whole = (BlockView(event.address, event.size, 0, "inactive"),)
        adopt_segment(
            self._allocator,
            SegmentView(event.address, event.size, event.stream, small, False, pool_id, whole),
        )

    def _force(self, request: TraceEvent) -> None:
        """Put the block where the recording has it."""
        size = self._rounded(request)
        for block in self._allocator.blocks():
            if block.idle and block.mapped and block.address == request.address and size <= block.size:
                self._allocator.place(block, size, request.size)
                return
        raise _LostError

    def _give_up(self) -> None:
        """Nothing after this point can be said to match."""
        self._tally.note("the prediction parted from the recording and could not follow it to its end")
        last = self._events[max(self._place - 1, 0)]
        self._tally.differs(last, last.address, None)
        for event in self._events[self._place :]:
            if event.action == "alloc":
                self._tally.count("allocations_checked")
            elif event.action in _REQUESTS:
                self._tally.count("segments_checked")
            elif event.action in _RELEASES:
                self._tally.count("segments_released_checked")
            elif event.action == "oom":
                self._tally.count("out_of_memory_checked")

    # frees

    def _free_requested(self, event: TraceEvent) -> None:
        self._place += 1
        self._pressed = None
        if event.address in self._elsewhere:
            return
        if self._allocator.live_block(event.address) is None:
            if self._complete:
                raise _LostError
            self._tally.count("not_predictable")  # a block from before the recording
            self._elsewhere.add(event.address)
            return
        following = self.next_event()
        if following is not None and following.action == "free_completed" and following.address == event.address:
            self._allocator.free(event.address)
            self._place += 1
        else:
            self._allocator.hold(event.address)

    def _under_pressure(self) -> None:
        """Note, before memory is given back, whether the request behind it would have been served from the cache.

        A request that is not, and then makes the allocator wait for all streams and give memory back, asks
        the device again; it does not search what has become free meanwhile.
        """
        if self._pressed is None:
            request = self._request_behind(self._place)
            self._pressed = request is not None and not self._served_from_cache(*request)

    def _served_from_cache(self, size: int, stream: int, pool_id: PoolId) -> bool:
        pool = self._allocator.pool_for_size(size, pool_id)
        return self._allocator.best_fit(pool, stream, size) is not None

    def _free_completed(self, event: TraceEvent) -> None:
        self._under_pressure()
        self._place += 1
        if event.address in self._elsewhere:
            self._elsewhere.discard(event.address)
        elif self._allocator.is_pending(event.address):
            self._allocator.finish_pending(event.address)
        elif self._complete:
            raise _LostError

    # releases

    def _releases(self, event: TraceEvent) -> None:
        """A run of memory given back, before a request or on its own (``empty_cache``)."""
        self._under_pressure()
        run = self._run_of_releases()
        known = [release for release in run if self._known_range(release)]
        self._tally.count("not_predictable", len(run) - len(known))
        request = self._request_behind(self._place + len(run))
        recorded_releases = [release_of(event) for event in known]
        predicted = matching_releases(self._allocator, recorded_releases, request)
        if predicted != recorded_releases and self._collects and not self._ages_known:
            # Garbage collection goes by age, and how old blocks were when the recording began is not said.
            self._tally.count("not_predictable", len(known))
            predicted, counted = recorded_releases, []
        elif differ_by_age(self._allocator, predicted, known, self._old_numbers):
            unknown = [place for place, release in enumerate(recorded_releases) if release != predicted[place]]
            self._tally.count("not_predictable", len(unknown))
            counted = [event for event, release in zip(known, predicted, strict=True) if release_of(event) == release]
            predicted = [release_of(event) for event in counted]
        else:
            counted = known
        for place, recorded in enumerate(counted):
            self._count_release(recorded, predicted[place] if place < len(predicted) else None)
        if len(predicted) > len(counted) == len(known):
            extra = predicted[len(known)]
            self._tally.differs(run[-1], None, extra.address)
        self._place += len(run)
        self._replaying_releases = True
        for recorded in known:
            self._apply(recorded)
        self._replaying_releases = False

    def _run_of_releases(self) -> list[TraceEvent]:
        end = self._place
        while end < len(self._events) and self._events[end].action in _RELEASES:
            end += 1
        return list(self._events[self._place : end])

    def _known_range(self, event: TraceEvent) -> bool:
        return self._complete or self._known.covers(event.address, event.address + event.size)

    def _request_behind(self, place: int) -> tuple[int, int, PoolId] | None:
        """Rounded size, stream and pool of the request that the releases may belong to."""
        for at in range(place, len(self._events)):
            event = self._events[at]
            if event.action in ("alloc", "oom"):
                return self._rounded(event), event.stream, self._pool_of(event)
            if event.action == "free_requested":
                return None
        return None

    def _count_release(self, recorded: TraceEvent, predicted: Release | None) -> None:
        self._tally.count("segments_released_checked")
        if predicted == release_of(recorded):
            self._tally.count("segments_released_matched")
        elif predicted is not None and predicted.address == recorded.address:
            self._tally.differs(recorded, recorded.size, predicted.size)
        else:
            self._tally.differs(recorded, recorded.address, None if predicted is None else predicted.address)

    def _apply(self, recorded: TraceEvent) -> None:
        """Give back what the recording gave back."""
        whole = recorded.action == "segment_free"
        block = free_segment(self._allocator, recorded) if whole else free_pages(self._allocator, recorded)
        if block is None:
            raise _LostError
        if whole:
            self._allocator.release_segment(block)
        else:
            self._allocator.unmap_block(block)
        self._known.remove(recorded.address, recorded.address + recorded.size)
