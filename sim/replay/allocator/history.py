"""What a history says about the time before it: is it complete, and if not, what was there at its start.

A ring buffer that dropped its oldest events, or a recording begun in the middle of a run, leaves memory the
history never saw being allocated.  The segments the snapshot lists are the state at its end; going back
through the events from there gives the state at the start, from which the rules can be followed again.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left

from sim.errors import InputError
from sim.replay.allocator.config import AllocatorConfig
from sim.replay.allocator.intervals import Intervals
from sim.replay.allocator.pools import COMMON_POOL
from sim.replay.allocator.recording import DeviceRecording, TraceEvent
from sim.replay.allocator.rounding import SMALL_BUFFER, SMALL_SIZE, round_size
from sim.replay.allocator.segments import BlockState, BlockView, SegmentView

_MORE = ("segment_alloc", "segment_map")
_LESS = ("segment_free", "segment_unmap")


@dataclasses.dataclass(slots=True)
class History:
    """The events of one device and what they touch of the time before them.

    old_frees: blocks that were handed out before the first event: address to the event that freed them.
    old_allocations: how many allocations lie in memory that was there before.
    """

    events: tuple[TraceEvent, ...]
    born: Intervals
    old_frees: dict[int, TraceEvent]
    old_pending: set[int]
    old_allocations: int
    old_releases: int
    live_at_end: set[int]

    @property
    def complete(self) -> bool:
        """Whether nothing in it needs memory from before its first event."""
        return not (self.old_frees or self.old_allocations or self.old_releases)

    def refuse_unknown_frees(self, device: int, path: str) -> None:
        """Where nothing else is older than the recording, a free of what it never allocated is a mistake."""
        if self.old_frees and not self.old_allocations and not self.old_releases:
            raise unknown_free(path, device, next(iter(self.old_frees.values())), "no event allocates it")


def unknown_free(path: str, device: int, event: TraceEvent, why: str) -> InputError:
    """The error for a free of an address that nothing accounts for."""
    return InputError(
        path,
        f"device_traces[{device}][{event.position}] ({event.action} {event.address:#x}): "
        f"a free of an unknown address: {why}",
    )


def with_both_frees(events: tuple[TraceEvent, ...]) -> tuple[TraceEvent, ...]:
    """The events, with the half of every free that ``skip_actions`` left out of the recording (since 2.10)."""
    actions = {event.action for event in events}
    if "free_requested" in actions and "free_completed" in actions:
        return events
    whole: list[TraceEvent] = []
    for event in events:
        if event.action in ("free_requested", "free_completed"):
            whole.append(event._replace(action="free_requested"))
            whole.append(event._replace(action="free_completed"))
        else:
            whole.append(event)
    return tuple(whole)


def read_history(recording: DeviceRecording, path: str) -> History:
    """Go through the events once.  Raises InputError where they contradict each other."""
    return _Scan(recording, path).history()


class _Scan:
    """Follows which memory and which blocks the events themselves account for."""

    def __init__(self, recording: DeviceRecording, path: str) -> None:
        self._path = path
        self._device = recording.device
        self._events = with_both_frees(recording.events)
        self._born = Intervals()  # memory the events show being taken from the device, as it is now
        self._live: dict[int, TraceEvent] = {}
        self._waiting: dict[int, TraceEvent] = {}  # freed, but not completely
        self._freed: set[int] = set()  # addresses whose last event was a free
        self._old_frees: dict[int, TraceEvent] = {}
        self._old_pending: set[int] = set()
        self._old_allocations = 0
        self._old_releases = 0

    def history(self) -> History:
        steps = {
            "alloc": self._alloc,
            "free_requested": self._free_requested,
            "free_completed": self._free_completed,
            "segment_alloc": self._more,
            "segment_map": self._more,
            "segment_free": self._less,
            "segment_unmap": self._less,
        }
        for event in self._events:
            step = steps.get(event.action)
            if step is not None:
                step(event)
        return History(
            self._events,
            self._born,
            self._old_frees,
            self._old_pending,
            self._old_allocations,
            self._old_releases,
            set(self._live) | set(self._waiting),
        )

    def _wrong(self, event: TraceEvent, problem: str) -> InputError:
        return InputError(
            self._path,
            f"device_traces[{self._device}][{event.position}] ({event.action} {event.address:#x}): {problem}",
        )

    def _alloc(self, event: TraceEvent) -> None:
        if event.address in self._live or event.address in self._waiting:
            raise self._wrong(event, "this address is allocated already")
        if event.address not in self._born:
            self._old_allocations += 1
        self._live[event.address] = event
        self._freed.discard(event.address)

    def _free_requested(self, event: TraceEvent) -> None:
        if event.address not in self._live:
            self._old_block(event)
        self._live.pop(event.address, None)
        self._waiting[event.address] = event

    def _free_completed(self, event: TraceEvent) -> None:
        if event.address not in self._waiting:
            if event.address in self._live:
                self._refuse_stray_request()
                raise self._wrong(event, "this block is allocated: nobody requested the free")
            self._old_block(event)
            self._old_pending.add(event.address)
        self._waiting.pop(event.address, None)
        self._freed.add(event.address)

    def _refuse_stray_request(self) -> None:
        """A request to free nothing that exists is better named than the free it was meant for."""
        old = list(self._old_frees.values())
        if old and not self._old_allocations and not self._old_releases:
            raise unknown_free(self._path, self._device, old[-1], "nothing was allocated there")

    def _old_block(self, event: TraceEvent) -> None:
        """A free of what no event allocated: a block from before the recording, or a mistake."""
        if event.address in self._waiting or event.address in self._freed:
            raise self._wrong(event, "a free of an unknown address: it is freed already")
        if event.address in self._born:
            raise self._wrong(event, "a free of an unknown address: nothing was allocated there")
        self._old_frees[event.address] = event

    def _more(self, event: TraceEvent) -> None:
        if not self._born.add(event.address, event.address + event.size):
            raise self._wrong(event, "this memory overlaps memory the device gave before")

    def _less(self, event: TraceEvent) -> None:
        end = event.address + event.size
        if self._born.remove(event.address, end):
            return
        self._old_releases += 1
        for start, stop in list(self._born):  # a range may reach over memory old and new
            low, high = max(start, event.address), min(stop, end)
            if low < high:
                self._born.remove(low, high)


def start_state(
    recording: DeviceRecording, history: History, config: AllocatorConfig, path: str, *, wide: bool = False
) -> tuple[SegmentView, ...] | None:
    """The segments and blocks before the first event; ``None`` where the snapshot does not say enough.

    How large a block of the large pool was whose allocation the history never saw can stay open by up to 1 MiB.
    It is taken to be the rounded request, or with ``wide`` to reach to the next block: nothing is allocated
    between them while it is there, or its size would not be open.

    Raises InputError for a free of an address that neither the events nor the segments know.
    """
    return _Backwards(recording, history, config, path, wide=wide).state()


class _Backwards:
    """Undoes the events from the segments at the end."""

    def __init__(
        self, recording: DeviceRecording, history: History, config: AllocatorConfig, path: str, *, wide: bool
    ) -> None:
        self._wide = wide
        self._recording = recording
        self._history = history
        self._config = config
        self._path = path
        self._memory = Intervals()
        self._kinds: list[SegmentView] = []  # the same ranges with their streams and pools
        self._allocated = sorted((e.address, e.position, e.size) for e in history.events if e.action == "alloc")

    def state(self) -> tuple[SegmentView, ...] | None:
        if not self._undo_segments():
            return None
        for event in self._history.old_frees.values():
            if event.address not in self._memory:
                if not self._recording.segments:
                    return None
                why = "no event allocates it and it lies in no segment"
                raise unknown_free(self._path, self._recording.device, event, why)
        return self._segments()

    def _undo_segments(self) -> bool:
        for view in self._recording.segments:
            if not self._memory.add(view.address, view.address + view.size):
                return False
            self._kinds.append(view)
        for event in reversed(self._history.events):
            end = event.address + event.size
            if event.action in _MORE:
                if not self._memory.remove(event.address, end):
                    return False
                self._kinds = [part for view in self._kinds for part in _without(view, event.address, end)]
            elif event.action in _LESS:
                if not self._memory.add(event.address, end):
                    return False
                self._kinds.append(self._released(event))
        return True

    def _released(self, event: TraceEvent) -> SegmentView:
        """What a released range was: the blocks that lay in it tell its pool, or else its size."""
        low, high = event.address, event.address + event.size
        first, last = bisect_left(self._allocated, (low,)), bisect_left(self._allocated, (high,))
        sizes = [size for _, _, size in self._allocated[first:last]]
        sizes += [other.size for other in self._history.old_frees.values() if low <= other.address < high]
        expandable = event.action == "segment_unmap"
        if sizes:
            small = max(sizes) <= SMALL_SIZE
        elif expandable:
            small = event.size % self._config.large_segment_size != 0
        else:
            small = event.size <= SMALL_BUFFER
        return SegmentView(low, event.size, event.stream, small, expandable, event.pool_id or COMMON_POOL)

    def _segments(self) -> tuple[SegmentView, ...] | None:
        blocks = sorted(self._old_blocks())
        starts = [block[0] for block in blocks]
        views = []
        for kind in _joined(sorted(self._kinds, key=lambda view: view.address)):
            start, end = kind.address, kind.address + kind.size
            row = self._row(start, end, blocks[bisect_left(starts, start) : bisect_left(starts, end)], kind)
            if row is None:
                return None
            views.append(dataclasses.replace(kind, blocks=row))
        return tuple(views)

    def _old_blocks(self) -> list[tuple[int, int | None, int, BlockState]]:
        """Address, size where it is known, requested size and state of the blocks at the start."""
        old = self._history.old_frees
        found: list[tuple[int, int | None, int, BlockState]] = [
            (
                event.address,
                None,
                event.size,
                "active_pending_free" if event.address in self._history.old_pending else "active_allocated",
            )
            for event in old.values()
        ]
        for view in self._recording.segments:
            found.extend(
                (block.address, block.size, block.requested, block.state)
                for block in view.blocks
                if block.state != "inactive" and block.address not in self._history.live_at_end
            )
        return found

    def _row(
        self, start: int, end: int, inside: list[tuple[int, int | None, int, BlockState]], kind: SegmentView
    ) -> tuple[BlockView, ...] | None:
        row: list[BlockView] = []
        reached = start
        for place, (address, size, requested, state) in enumerate(inside):
            limit = inside[place + 1][0] if place + 1 < len(inside) else end
            if size is None:
                size = self._size(address, requested, limit, kind)
            if address < reached or address + size > limit:
                return None
            if address > reached:
                row.append(BlockView(reached, address - reached, 0, "inactive"))
            row.append(BlockView(address, size, requested, state))
            reached = address + size
        if reached < end:
            row.append(BlockView(reached, end - reached, 0, "inactive"))
        return tuple(row)

    def _size(self, address: int, requested: int, limit: int, kind: SegmentView) -> int:
        """The block behind a free whose allocation was before the recording.

        It is the rounded request, or more where it was not split: an oversize block, and one of the large
        pool that left 1 MiB or less, for then no block can stand there.
        """
        size = round_size(requested, self._config.roundup_power2_divisions)
        if kind.small or kind.expandable:
            return size
        unsplit = self._config.max_split_size is not None and size >= self._config.max_split_size
        if unsplit or limit - (address + size) <= SMALL_SIZE:
            return max(limit - address, size)
        behind = self._first_use_behind(address, size)
        if behind is not None:
            return behind
        return limit - address if self._wide else size

    def _first_use_behind(self, address: int, size: int) -> int | None:
        """A larger size that the events give away: an allocation right behind the block while it was there."""
        freed = self._history.old_frees[address].position
        low, high = address + size, address + size + SMALL_SIZE
        near = self._allocated[bisect_left(self._allocated, (low,)) : bisect_left(self._allocated, (high + 1,))]
        uses = [(index, at) for at, index, _ in near if index < freed]
        return min(uses)[1] - address if uses else None


def _without(view: SegmentView, start: int, end: int) -> list[SegmentView]:
    """What is left of a range's description without ``[start, end)``."""
    stop = view.address + view.size
    if end <= view.address or stop <= start:
        return [view]
    left = []
    if view.address < start:
        left.append(dataclasses.replace(view, size=start - view.address))
    if end < stop:
        left.append(dataclasses.replace(view, address=end, size=stop - end))
    return left


def _joined(views: list[SegmentView]) -> list[SegmentView]:
    """Adjoining mapped ranges of one stream and pool are one: free blocks reach across."""
    joined: list[SegmentView] = []
    for view in views:
        last = joined[-1] if joined else None
        if (
            last is not None
            and view.expandable
            and last.address + last.size == view.address
            and (last.expandable, last.stream, last.small, last.pool_id)
            == (view.expandable, view.stream, view.small, view.pool_id)
        ):
            joined[-1] = dataclasses.replace(last, size=last.size + view.size)
        else:
            joined.append(view)
    return joined
