"""How well a prediction agrees with a recording: the counts, and the first place where they part."""

from __future__ import annotations

import dataclasses

COUNTS = (
    "allocations_checked", "allocations_matched", "segments_checked", "segments_matched",
    "segments_released_checked", "segments_released_matched",
    "out_of_memory_checked", "out_of_memory_matched", "not_predictable",
)  # fmt: skip


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


def together(replays: list[SnapshotReplay]) -> SnapshotReplay:
    """The counts of several devices added up, with the peaks of the one that allocates most."""
    fullest = max(replays, key=lambda replay: replay.peak_allocated_bytes)
    summed = {name: sum(getattr(replay, name) for replay in replays) for name in COUNTS}
    return dataclasses.replace(
        fullest,
        peak_reserved_bytes=max(replay.peak_reserved_bytes for replay in replays),
        first_mismatch=next((replay.first_mismatch for replay in replays if replay.first_mismatch), None),
        notes=tuple(dict.fromkeys(note for replay in replays for note in replay.notes)),
        **summed,
    )


def best_of(replays: list[SnapshotReplay]) -> SnapshotReplay:
    """The replay that explains a recording: exact before not, then the least left open, then the most matched."""
    return max(
        replays,
        key=lambda replay: (replay.exact, -replay.not_predictable if replay.exact else 0, replay.allocations_matched),
    )
