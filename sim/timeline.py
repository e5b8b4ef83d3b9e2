"""Timeline: what happened when, on every lane of every rank; measured from a trace or predicted by a replay.

Because both are the same value, one report compares them.  Times are integer nanoseconds from the timeline's
own zero, sizes integer bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec

from sim.errors import UserError
from sim.ops import Category, CollectiveKind, LaneKind

DurationSource = Literal["measured", "profile", "roofline", "estimate"]
SpanKind = Literal["host", "compute", "memcpy", "memset", "communication"]


class RankInfo(msgspec.Struct, frozen=True):
    """A rank and the device it ran on: ``gpu3`` and ``NVIDIA RTX A5000``, with the memory that device has and what of
    it is taken outside PyTorch's allocator, by name."""

    rank: int
    device: str
    device_name: str = ""
    memory_bytes: int | None = None
    outside: dict[str, int] = {}


class Track(msgspec.Struct, frozen=True):
    """One lane of one rank."""

    rank: int
    kind: LaneKind
    id: int
    name: str


class CollectiveInfo(msgspec.Struct, frozen=True):
    """What a communication span did, and how."""

    kind: CollectiveKind
    bytes: int
    ranks: int
    algorithm: str
    protocol: str
    group: str
    seq: int


class Span(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One operation on one track.  ``launch`` is the index in ``spans`` of the host call that launched it, or -1;
    ``op`` the operation's index in its rank's program.  ``transfer_ns`` is the part of a collective after the
    last rank arrived."""

    track: int
    op: int
    name: str
    kind: SpanKind
    start_ns: int
    duration_ns: int
    source: DurationSource = "measured"
    launch: int = -1
    transfer_ns: int = 0
    collective: CollectiveInfo | None = None
    module: str = ""

    @property
    def end_ns(self) -> int:
        return self.start_ns + self.duration_ns


class Step(msgspec.Struct, frozen=True):
    """One training step of one rank, as its host thread saw it."""

    rank: int
    index: int
    name: str
    start_ns: int
    end_ns: int

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns


class MemorySample(msgspec.Struct, frozen=True, gc=False):
    """The caching allocator of a rank's device after an event."""

    rank: int
    time_ns: int
    allocated_bytes: int
    reserved_bytes: int


class MemoryPeak(msgspec.Struct, frozen=True):
    """The instant at which the most was allocated, the op that asked, and what was alive then, by category and by the
    module that allocated it."""

    rank: int
    time_ns: int
    allocated_bytes: int
    reserved_bytes: int
    op: str
    by_category: dict[Category, int]
    by_module: dict[str, int] = {}


class OutOfMemory(msgspec.Struct, frozen=True):
    """The first request of a rank that did not fit: what was asked when, what was held, and what PyTorch can have."""

    rank: int
    time_ns: int
    op: str
    requested_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    capacity_bytes: int


class Timeline(msgspec.Struct, frozen=True):
    """``spans`` of one track are in order of start.  ``steps`` are in order of rank, then time; ``memory`` too."""

    name: str
    origin: Literal["measured", "predicted"]
    ranks: tuple[RankInfo, ...]
    tracks: tuple[Track, ...]
    spans: tuple[Span, ...]
    steps: tuple[Step, ...]
    memory: tuple[MemorySample, ...] = ()
    peaks: tuple[MemoryPeak, ...] = ()
    out_of_memory: tuple[OutOfMemory, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def end_ns(self) -> int:
        return max((span.end_ns for span in self.spans), default=0)

    def device_spans(self, rank: int) -> Iterator[Span]:
        """The spans on the streams of ``rank`` (and its communication on host threads)."""
        for span in self.spans:
            if self.tracks[span.track].rank == rank and span.kind != "host":
                yield span

    def check(self) -> None:
        """Raise UserError with the first law that does not hold."""
        last_end: dict[int, int] = {}
        for i, span in enumerate(self.spans):
            if not 0 <= span.track < len(self.tracks):
                raise UserError(f"{self.name}: spans[{i}]: track {span.track} is not there")
            if span.duration_ns < 0:
                raise UserError(f"{self.name}: spans[{i}]: ends before it starts")
            if self.origin == "predicted":
                if span.start_ns < last_end.get(span.track, 0):
                    raise UserError(f"{self.name}: spans[{i}]: starts before its lane is free")
                last_end[span.track] = span.end_ns
        for step in self.steps:
            if step.end_ns < step.start_ns:
                raise UserError(f"{self.name}: step {step.name} of rank {step.rank} ends before it starts")
