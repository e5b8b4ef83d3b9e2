"""What a replay of a recording has found so far: counts, the first mismatch, notes, the fullest moment."""

from __future__ import annotations

from sim.replay.allocator.caching import CachingAllocator
from sim.replay.allocator.comparison import COUNTS, Mismatch, SnapshotReplay
from sim.replay.allocator.recording import TraceEvent


class Tally:
    """Of one device."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._counts = dict.fromkeys(COUNTS, 0)
        self._mismatch: Mismatch | None = None
        self._notes: dict[str, None] = {}
        self._fullest = self._reserved_then = 0

    def count(self, what: str, events: int = 1) -> None:
        """So many events more of one of ``COUNTS``."""
        self._counts[what] += events

    def differs(self, event: TraceEvent, expected: int | None, predicted: int | None) -> None:
        """Prediction and recording part at an event; the first place is told."""
        if self._mismatch is None:
            self._mismatch = Mismatch(event.position, event.action, expected, predicted, self._device)

    def note(self, note: str) -> None:
        """Something to say about the whole, once."""
        self._notes[note] = None

    def weigh(self, allocator: CachingAllocator) -> None:
        """Look whether more is allocated than ever."""
        allocated = allocator.allocated_bytes
        if allocated > self._fullest:
            self._fullest, self._reserved_then = allocated, allocator.reserved_bytes

    def told(self, allocator: CachingAllocator) -> SnapshotReplay:
        """All of it, with the peaks that the allocator had."""
        statistics = allocator.statistics()
        fullest = max(self._fullest, 1)
        return SnapshotReplay(
            **self._counts,
            peak_allocated_bytes=statistics.peak_allocated,
            peak_reserved_bytes=statistics.peak_reserved,
            fragmentation_at_peak=1.0 - fullest / self._reserved_then if self._reserved_then else 0.0,
            first_mismatch=self._mismatch,
            notes=tuple(self._notes),
        )
