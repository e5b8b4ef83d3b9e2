"""A recorded memory history replayed through the simulated allocator, every address and segment compared.

What the driver decides is taken from the recording: the base address of a new segment, and when it has no
more memory.  So is what other streams decide: when a block they used is free.  Everything else is predicted:
which block serves a request and at which address, when memory is asked of the device and how much, which
cached segments are given back and in which order.

Where the history is not complete, the state at its start is worked out backwards
(:mod:`sim.replay.allocator.history`).  Where that cannot be done, or does not hold, only memory that the
history itself shows being taken from the device is checked, and the rest is counted as not predictable.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from sim.replay.allocator.blocks import Block
from sim.replay.allocator.caching import Allocation, CachingAllocator
from sim.replay.allocator.history import History, read_history, start_state
from sim.replay.allocator.intervals import Intervals
from sim.replay.allocator.ledger import SegmentEvent
from sim.replay.allocator.oom import OutOfMemoryError
from sim.replay.allocator.pools import COMMON_POOL, PoolId
from sim.replay.allocator.recording import DeviceRecording, Recording, TraceEvent, read_recording
from sim.replay.allocator.release_order import Release, matching_releases
from sim.replay.allocator.rounding import SMALL_SIZE, round_size
from sim.replay.allocator.segments import BlockView, SegmentView, adopt_segment, restore

_REQUESTS = ("segment_alloc", "segment_map")
_RELEASES = ("segment_free", "segment_unmap")
_NOWHERE = 1 << 62  # where a segment is put that the recording does not have; no device reaches so far
_ADDRESS_SPACE = 1 << 45  # a recording does not say how large its GPU is; only has to be larger than it


@dataclasses.dataclass(frozen=True, slots=True)
class Mismatch:
    """The first event where prediction and recording part.  ``event`` counts within the device's history."""

    event: int
    action: str
    expected: int | None
    predicted: int | None
    device: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class SnapshotReplay:
    """How the prediction compares with a recording.  Counts of events; sizes are bytes.

    not_predictable: events on memory that was there before the recording began and of which the recording
    does not say enough.  The peaks and the fragmentation, the share of reserved memory that is not allocated
    when most is allocated, are those of the device that allocates most.
    """

    allocations_checked: int
    allocations_matched: int
    segments_checked: int
    segments_matched: int
    segments_released_checked: int
    segments_released_matched: int
    out_of_memory_checked: int
    out_of_memory_matched: int
    not_predictable: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    fragmentation_at_peak: float
    first_mismatch: Mismatch | None
    notes: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        return self.first_mismatch is None


def replay_snapshot(path: str | Path) -> SnapshotReplay:
    """Read a snapshot pickle and replay it.  Raises :class:`~sim.errors.InputError` for what is no recording."""
    return replay_recording(read_recording(path))


def replay_recording(recording: Recording) -> SnapshotReplay:
    """Replay every device of a recording; the counts are added up."""
    replayed = [replay_device(device, recording) for device in recording.devices if device.events]
    return together(replayed)


def together(replays: list[SnapshotReplay]) -> SnapshotReplay:
    """The counts of several devices added up, with the peaks of the one that allocates most."""
    fullest = max(replays, key=lambda replay: replay.peak_allocated_bytes)
    summed = {
        name: sum(getattr(replay, name) for replay in replays)
        for name in (
            "allocations_checked", "allocations_matched", "segments_checked", "segments_matched",
            "segments_released_checked", "segments_released_matched",
            "out_of_memory_checked", "out_of_memory_matched", "not_predictable",
        )
    }  # fmt: skip
    return dataclasses.replace(
        fullest,
        peak_reserved_bytes=max(replay.peak_reserved_bytes for replay in replays),
        first_mismatch=next((replay.first_mismatch for replay in replays if replay.first_mismatch), None),
        notes=tuple(dict.fromkeys(note for replay in replays for note in replay.notes)),
        **summed,
    )


def replay_device(recording: DeviceRecording, whole: Recording) -> SnapshotReplay:
    """Replay the history of one device."""
    history = read_history(recording, whole.path)
    old_segments = any(view.address not in history.born for view in recording.segments)
    if history.complete and not old_segments:
        return _Replay(recording, history, whole, (), complete=True).run()
    start = start_state(recording, history, whole.config, whole.path)
    if start is not None:
        replay = _Replay(recording, history, whole, start, complete=True).run()
        if replay.exact:
            return replay
    return _Replay(recording, history, whole, (), complete=False).run()


class _RecordedDevice:
    """The driver as it behaved: it gives the addresses of the recording, and nothing where that ran out."""

    total_bytes = _ADDRESS_SPACE

    def __init__(self, replay: _Replay) -> None:
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


class _Lost(Exception):
    """Prediction and recording have parted so far that following the recording makes no sense any more."""


class _Replay:
    """Steps the allocator through the events of one device and counts."""

    def __init__(
        self,
        recording: DeviceRecording,
        history: History,
        whole: Recording,
        start: tuple[SegmentView, ...],
        *,
        complete: bool,
    ) -> None:
        self._device = recording.device
        self._events = history.events
        self._place = 0
        config = whole.config
        if not whole.settings_known and any(event.action == "segment_map" for event in self._events):
            config = dataclasses.replace(config, expandable_segments=True)
        self._allocator = CachingAllocator(config, _RecordedDevice(self), self._hear, recording.device)
        self._allocator.set_memory_fraction(1.0)
        self._known = Intervals()  # memory whose blocks are known here
        self._complete = complete
        self._elsewhere: set[int] = set()  # blocks in memory that is not known
        self._pools = {view.address: view.pool_id for view in recording.segments if view.pool_id != COMMON_POOL}
        self._pool_ranges: list[tuple[int, int, PoolId]] = [
            (view.address, view.address + view.size, view.pool_id)
            for view in (*recording.segments, *start)
            if view.pool_id != COMMON_POOL
        ]
        self._replaying_releases = False
        self._counts = dict.fromkeys(
            (
                "allocations_checked", "allocations_matched", "segments_checked", "segments_matched",
                "segments_released_checked", "segments_released_matched",
                "out_of_memory_checked", "out_of_memory_matched", "not_predictable",
            ), 0,
        )  # fmt: skip
        self._mismatch: Mismatch | None = None
        self._notes: list[str] = []
        self._fullest = self._reserved_then = 0
        restore(self._allocator, start)
        for view in start:
            self._known.add(view.address, view.address + view.size)
        if not complete:
            self._note("memory from before the recording is left out: its blocks cannot be worked out")
        self._weigh()

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
        except _Lost:
            self._give_up()
        statistics = self._allocator.statistics()
        fullest = max(self._fullest, 1)
        return SnapshotReplay(
            **self._counts,
            peak_allocated_bytes=statistics.peak_allocated,
            peak_reserved_bytes=statistics.peak_reserved,
            fragmentation_at_peak=1.0 - fullest / self._reserved_then if self._reserved_then else 0.0,
            first_mismatch=self._mismatch,
            notes=tuple(self._notes),
        )

    # the recording

    def next_event(self) -> TraceEvent | None:
        """The event that comes next, or ``None`` at the end."""
        return self._events[self._place] if self._place < len(self._events) else None

    def skip_completed(self) -> None:
        """Frees that were completed while the allocator waited for all streams, inside a request."""
        while (event := self.next_event()) is not None and event.action == "free_completed":
            self._place += 1

    def _differs(self, event: TraceEvent, expected: int | None, predicted: int | None) -> None:
        if self._mismatch is None:
            self._mismatch = Mismatch(event.index, event.action, expected, predicted, self._device)

    def _note(self, note: str) -> None:
        if note not in self._notes:
            self._notes.append(note)

    def _weigh(self) -> None:
        allocated = self._allocator.allocated_bytes
        if allocated > self._fullest:
            self._fullest, self._reserved_then = allocated, self._allocator.reserved_bytes

    # requests to the device

    def compare_request(self, event: TraceEvent, address: int, nbytes: int) -> None:
        """The allocator asks for memory where the recording does: is it as much, and (mapped) at the same place?"""
        self._counts["segments_checked"] += 1
        if nbytes != event.size:
            self._differs(event, event.size, nbytes)
        elif address != event.address:
            self._differs(event, event.address, address)
        else:
            self._counts["segments_matched"] += 1
        self._known.add(event.address, event.address + event.size)
        self._place += 1

    def wrong_request(self, event: TraceEvent, nbytes: int) -> None:
        """The allocator asks for memory where the recording found some cached."""
        self._differs(event, None, nbytes)

    def _hear(self, event: SegmentEvent) -> None:
        """The allocator gives memory back within a request: the recording has to say the same."""
        if event.action not in _RELEASES or self._replaying_releases:
            return
        recorded = self.next_event()
        if recorded is None or recorded.action != event.action:
            return
        self._count_release(recorded, Release(event.action, event.address, event.size))
        self._place += 1

    # requests of the program

    def _serve(self, event: TraceEvent) -> None:
        """A request, with the memory asked of the device before it."""
        target = self._target()
        if target is None:
            return self._orphan(event)
        request = self._events[target]
        if request.action == "alloc" and target == self._place and not self._is_known(request.address):
            self._counts["not_predictable"] += 1
            self._elsewhere.add(request.address)
            self._place += 1
            return None
        pool_id = self._pool_of(request, event)
        self._follow_switch(event, pool_id)
        got = self._malloc(request, pool_id)
        while self._place < target:
            self._unpredicted(self._events[self._place], request, pool_id)
        if request.action == "alloc":
            self._compare_address(request, got)
        else:
            self._compare_failure(request, got)
        self._place = target + 1
        self._weigh()
        return None

    def _malloc(self, request: TraceEvent, pool_id: PoolId) -> Allocation | None:
        try:
            return self._allocator.malloc(max(request.size, 1), request.stream, pool_id)
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
        self._counts["allocations_checked"] += 1
        if got is not None and got.address == request.address:
            self._counts["allocations_matched"] += 1
            return
        self._differs(request, request.address, None if got is None else got.address)
        if got is not None:
            self._allocator.free(got.address)
        self._force(request)

    def _compare_failure(self, request: TraceEvent, got: Allocation | None) -> None:
        self._counts["out_of_memory_checked"] += 1
        if got is None:
            self._counts["out_of_memory_matched"] += 1
            return
        self._differs(request, None, got.address)
        self._allocator.free(got.address)

    def _follow_switch(self, event: TraceEvent, pool_id: PoolId) -> None:
        """Settings are those at the end of the recording; the kind of its requests shows what they were before."""
        config = self._allocator.config
        if pool_id == COMMON_POOL and event.action in _REQUESTS:
            expanding = event.action == "segment_map"
            if expanding != config.expandable_segments:
                self._allocator.reconfigure(dataclasses.replace(config, expandable_segments=expanding))
                self._note("expandable_segments was switched during the recording, as its requests show")

    def _pool_of(self, request: TraceEvent, first: TraceEvent) -> PoolId:
        """Which pool the program's capture chose: said by the event, or by where the memory lies."""
        if request.pool_id is not None:
            return request.pool_id
        at = first.address if first.action in _REQUESTS else request.address
        if request.action == "alloc":
            at = request.address
        return next((pool_id for low, high, pool_id in self._pool_ranges if low <= at < high), COMMON_POOL)

    def _is_known(self, address: int) -> bool:
        return self._complete or address in self._known

    # following the recording where the prediction left it

    def _unpredicted(self, event: TraceEvent, request: TraceEvent, pool_id: PoolId) -> None:
        """Memory the recording asked for and the prediction did not."""
        self._place += 1
        if event.action not in _REQUESTS:
            return
        self._counts["segments_checked"] += 1
        self._differs(event, event.size, None)
        self._known.add(event.address, event.address + event.size)
        self._adopt(event, round_size(max(request.size, 1)) <= SMALL_SIZE, pool_id)

    def _orphan(self, event: TraceEvent) -> None:
        """Memory taken from the device for a request that the recording does not have."""
        self._place += 1
        if event.action in _REQUESTS:
            self._note("memory is taken from the device for a request the recording does not have")
            self._counts["not_predictable"] += 1
            self._known.add(event.address, event.address + event.size)
            self._adopt(event, event.size <= 2 * SMALL_SIZE, event.pool_id or COMMON_POOL)

    def _adopt(self, event: TraceEvent, small: bool, pool_id: PoolId) -> None:
        if event.action == "segment_map":
            raise _Lost
        whole = (BlockView(event.address, event.size, 0, "inactive"),)
        adopt_segment(
            self._allocator,
            SegmentView(event.address, event.size, event.stream, small, False, pool_id, whole),
        )

    def _force(self, request: TraceEvent) -> None:
        """Put the block where the recording has it."""
        size = round_size(max(request.size, 1), self._allocator.config.roundup_power2_divisions)
        for block in self._allocator.blocks():
            if block.idle and block.mapped and block.address <= request.address < block.end:
                if request.address == block.address and size <= block.size:
                    self._allocator.place(block, size, request.size)
                    return
        raise _Lost

    def _give_up(self) -> None:
        """Nothing after this point can be said to match."""
        self._note("the prediction parted from the recording and could not follow it to its end")
        for event in self._events[self._place :]:
            if event.action == "alloc":
                self._counts["allocations_checked"] += 1
            elif event.action in _REQUESTS:
                self._counts["segments_checked"] += 1
            elif event.action in _RELEASES:
                self._counts["segments_released_checked"] += 1
            elif event.action == "oom":
                self._counts["out_of_memory_checked"] += 1

    # frees

    def _free_requested(self, event: TraceEvent) -> None:
        self._place += 1
        if event.address in self._elsewhere:
            return
        if self._allocator.live_block(event.address) is None:
            if self._complete:
                raise _Lost
            self._counts["not_predictable"] += 1  # a block from before the recording
            self._elsewhere.add(event.address)
            return
        following = self.next_event()
        if following is not None and following.action == "free_completed" and following.address == event.address:
            self._allocator.free(event.address)
            self._place += 1
        else:
            self._allocator.hold(event.address)

    def _free_completed(self, event: TraceEvent) -> None:
        self._place += 1
        if event.address in self._elsewhere:
            self._elsewhere.discard(event.address)
        elif event.address in self._allocator.pending_addresses():
            self._allocator.finish_pending(event.address)
        elif self._complete:
            raise _Lost

    # releases

    def _releases(self, event: TraceEvent) -> None:
        """A run of memory given back, before a request or on its own (``empty_cache``)."""
        run = self._run_of_releases()
        known = [release for release in run if self._known_range(release)]
        self._counts["not_predictable"] += len(run) - len(known)
        request = self._request_behind(self._place + len(run))
        predicted = matching_releases(self._allocator, [_release(event) for event in known], request)
        for place, recorded in enumerate(known):
            self._count_release(recorded, predicted[place] if place < len(predicted) else None)
        if len(predicted) > len(known):
            extra = predicted[len(known)]
            self._differs(run[-1], None, extra.address)
        self._place += len(run)
        self._replaying_releases = True
        for recorded in known:
            self._apply(recorded)
        self._replaying_releases = False

    def _run_of_releases(self) -> list[TraceEvent]:
        run = []
        for event in self._events[self._place :]:
            if event.action not in _RELEASES:
                break
            run.append(event)
        return run

    def _known_range(self, event: TraceEvent) -> bool:
        return self._complete or self._known.covers(event.address, event.address + event.size)

    def _request_behind(self, place: int) -> tuple[int, int, PoolId] | None:
        """Rounded size, stream and pool of the request that the releases may belong to."""
        for at in range(place, len(self._events)):
            event = self._events[at]
            if event.action in ("alloc", "oom"):
                size = round_size(max(event.size, 1), self._allocator.config.roundup_power2_divisions)
                return size, event.stream, self._pool_of(event, self._events[place])
            if event.action not in _REQUESTS:
                return None
        return None

    def _count_release(self, recorded: TraceEvent, predicted: Release | None) -> None:
        self._counts["segments_released_checked"] += 1
        if predicted == _release(recorded):
            self._counts["segments_released_matched"] += 1
        elif predicted is not None and predicted.address == recorded.address:
            self._differs(recorded, recorded.size, predicted.size)
        else:
            self._differs(recorded, recorded.address, None if predicted is None else predicted.address)

    def _apply(self, recorded: TraceEvent) -> None:
        """Give back what the recording gave back."""
        block = self._free_block_at(recorded.address)
        if block is None or block.end < recorded.address + recorded.size:
            raise _Lost
        if block.virtual is not None:
            self._allocator.unmap_block(block)
        elif block.whole and block.address == recorded.address and block.size == recorded.size:
            self._allocator.release_segment(block)
        else:
            raise _Lost
        self._known.remove(recorded.address, recorded.address + recorded.size)

    def _free_block_at(self, address: int) -> Block | None:
        for block in self._allocator.blocks():
            if block.idle and block.mapped and block.address <= address < block.end:
                return block
        return None


def _release(event: TraceEvent) -> Release:
    return Release(event.action, event.address, event.size)
