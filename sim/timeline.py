"""Timeline: what happened when, on every lane of every rank; measured from a trace or predicted by a replay.

Because both are the same value, one report compares them.  Times are integer nanoseconds from the timeline's
own zero, sizes integer bytes.

Ranks that do the same share one list of spans and one of memory samples: ``RankSpans`` and ``RankSamples`` look like
the list of all ranks' and make an item of another rank when it is looked at.  So 256 ranks take no more room than one.
"""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Generic, Literal, NamedTuple, TypeVar, overload

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


T = TypeVar("T")


class Part(NamedTuple, Generic[T]):
    """What one rank did.  ``items`` may be another rank's: tracks and launches in them count from the rank's own first,
    and samples bear any rank."""

    rank: int
    items: tuple[T, ...]
    first_track: int = 0


class _Parts(Sequence[T]):
    """The items of all ranks in one sequence, rank by rank, without a copy of what several ranks share."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, parts: Iterable[Part[T]]) -> None:
        self.parts: tuple[Part[T], ...] = tuple(parts)
        self._begins = list(accumulate((len(part.items) for part in self.parts), initial=0))

    def __len__(self) -> int:
        return self._begins[-1]

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[T, ...]: ...
    def __getitem__(self, index: int | slice) -> T | tuple[T, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        at = index % len(self)
        p = bisect_right(self._begins, at) - 1
        begin = self._begins[p]
        return self._own(self.parts[p], begin, self.parts[p].items[at - begin])

    def __iter__(self) -> Iterator[T]:
        for part, begin in zip(self.parts, self._begins, strict=False):
            for item in part.items:
                yield self._own(part, begin, item)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def places(self, rank: int) -> range:
        """Where the items of a rank are."""
        for p, part in enumerate(self.parts):
            if part.rank == rank:
                return range(self._begins[p], self._begins[p + 1])
        return range(0)

    @abstractmethod
    def _own(self, part: Part[T], begin: int, item: T) -> T:
        """An item of a part that begins there, as the rank's own."""


class RankSpans(_Parts[Span]):
    """The spans of all ranks."""

    def _own(self, part: Part[Span], begin: int, item: Span) -> Span:
        if not begin and not part.first_track:
            return item
        launch = item.launch + begin if item.launch >= 0 else -1
        return Span(
            part.first_track + item.track, item.op, item.name, item.kind, item.start_ns, item.duration_ns,
            item.source, launch, item.transfer_ns, item.collective, item.module,
        )  # fmt: skip


class RankSamples(_Parts[MemorySample]):
    """The memory samples of all ranks."""

    def _own(self, part: Part[MemorySample], begin: int, item: MemorySample) -> MemorySample:
        if item.rank == part.rank:
            return item
        return MemorySample(part.rank, item.time_ns, item.allocated_bytes, item.reserved_bytes)


class OwnSpans(NamedTuple):
    """The spans of one rank, and the sequence in which their launches count.  Ranks that do the same share both."""

    spans: Sequence[Span]
    among: Sequence[Span]


class Timeline(msgspec.Struct, frozen=True):
    """``spans`` of one track are in order of start.  ``steps`` are in order of rank, then time; ``memory`` too."""

    name: str
    origin: Literal["measured", "predicted"]
    ranks: tuple[RankInfo, ...]
    tracks: tuple[Track, ...]
    spans: Sequence[Span]
    steps: tuple[Step, ...]
    memory: Sequence[MemorySample] = ()
    peaks: tuple[MemoryPeak, ...] = ()
    out_of_memory: tuple[OutOfMemory, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def end_ns(self) -> int:
        return max((span.end_ns for span in self.distinct_spans()), default=0)

    def own_spans(self) -> dict[int, OwnSpans]:
        """The spans of every rank."""
        if isinstance(self.spans, RankSpans):
            return {part.rank: OwnSpans(part.items, part.items) for part in self.spans.parts}
        return {rank: OwnSpans([self.spans[i] for i in at], self.spans) for rank, at in self.span_places().items()}

    def span_places(self) -> dict[int, Sequence[int]]:
        """Where the spans of every rank are in ``spans``."""
        if isinstance(self.spans, RankSpans):
            return {info.rank: self.spans.places(info.rank) for info in self.ranks}
        places: dict[int, list[int]] = {info.rank: [] for info in self.ranks}
        rank_of = [track.rank for track in self.tracks]
        for i, span in enumerate(self.spans):
            places[rank_of[span.track]].append(i)
        return {**places}

    def own_memory(self) -> dict[int, Sequence[MemorySample]]:
        """The memory samples of every rank that has some; ranks that do the same share them, whosoever they are."""
        if isinstance(self.memory, RankSamples):
            return {part.rank: part.items for part in self.memory.parts if part.items}
        samples: dict[int, list[MemorySample]] = {}
        for sample in self.memory:
            samples.setdefault(sample.rank, []).append(sample)
        return {**samples}

    def distinct_spans(self) -> Iterator[Span]:
        """The spans of all ranks, those that several ranks share once: what their extents and names tell."""
        if not isinstance(self.spans, RankSpans):
            yield from self.spans
            return
        for items in {id(part.items): part.items for part in self.spans.parts}.values():
            yield from items

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
