"""Summary: what one timeline says as numbers, exactly the object that ``replay --json`` promises.

:mod:`sim.report.summarize` makes it and says how each number is defined.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from sim.errors import UserError
from sim.files import write_whole
from sim.ops import Category, CollectiveKind


class Breakdown(msgspec.Struct, frozen=True):
    """Where the time of a step goes, in milliseconds; the parts add up to the step (see ``sim.report.steps.Split``)."""

    compute: float
    exposed_communication: float
    exposed_memcpy: float
    idle: float

    @property
    def total(self) -> float:
        return self.compute + self.exposed_communication + self.exposed_memcpy + self.idle


class RankSummary(msgspec.Struct, frozen=True):
    """One rank.  Peaks and memory are bytes, and None where nothing is known of them; ``outside_bytes`` is what of the
    memory is taken outside PyTorch's allocator, by name (an estimate)."""

    rank: int
    device: str
    device_name: str
    step_ms: float
    measured_step_ms: float | None
    busy_ms: float
    waiting_ms: float
    kernel_ms: float
    breakdown_ms: Breakdown
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    memory_bytes: int | None
    outside_bytes: dict[str, int]


class CollectiveRow(msgspec.Struct, frozen=True):
    """Collectives of the run that are alike."""

    kind: CollectiveKind
    bytes: int
    ranks: int
    algorithm: str
    protocol: str
    count: int
    total_ms: float
    transfer_ms: float


class DurationsFrom(msgspec.Struct, frozen=True):
    """How many pieces of device work took their duration from where."""

    measured: int
    profile: int
    roofline: int
    estimate: int


class OpRow(msgspec.Struct, frozen=True):
    """An op name with its cost on the busiest rank; ``share`` is the part of that rank's device work, 0 to 1."""

    name: str
    count: int
    total_ms: float
    share: float


class StepRow(msgspec.Struct, frozen=True):
    """One step of the job: its slowest rank, and the measured step of the same place; ``error`` is
    predicted / measured - 1."""

    name: str
    rank: int
    step_ms: float
    measured_ms: float | None
    error: float | None
    breakdown_ms: Breakdown
    host_ms: float


class PeakRow(msgspec.Struct, frozen=True):
    """The instant of a rank at which the most was allocated, what asked, and what was alive; ``fragmentation`` is the
    share of the reserved memory that was not allocated then."""

    rank: int
    time_ms: float
    allocated_bytes: int
    reserved_bytes: int
    op: str
    by_category: dict[Category, int]
    by_module: dict[str, int]
    fragmentation: float


class OutOfMemoryRow(msgspec.Struct, frozen=True):
    """The first request of a rank that did not fit; ``short_bytes`` is what was missing beyond the reserved memory."""

    rank: int
    device: str
    device_name: str
    time_ms: float
    op: str
    requested_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    capacity_bytes: int
    short_bytes: int


class RemedyRow(msgspec.Struct, frozen=True):
    """A cure for a job that does not fit, as tried: the option that makes it, and what came of it.

    ``step_ms`` is a step of the changed job: with a smaller ``--batch`` alone it does less.
    """

    option: str
    fits: bool
    peak_reserved_bytes: int
    step_ms: float


class DoubtRow(msgspec.Struct, frozen=True):
    """A source of error, its share of the step's variance (0 to 1), and what would settle it."""

    source: str
    share: float
    cure: str


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """A timeline as numbers: times in decimal milliseconds, sizes in bytes; :mod:`sim.report.summarize` defines them.

    What has a default is added by those who know it: the ranges, the energy and the remedies of ``sim.whatif``.
    ``ranks_replayed``: of ranks that provably do the same one is replayed and told for all (``sim.replay.folding``).
    ``step_ms_p10`` to ``step_ms_p90`` (and ``kernel_ms``) is the 80 % interval that sim.whatif.ranges draws, None where
    nobody asked; ``doubt`` tells what it is made of.  ``energy_j`` is an estimate of what the GPUs of all ranks use a
    step, None where their power is not known.  ``measured_on`` is the device that was measured; on another one there is
    no error to speak of.  What was reserved when a recording began is in its measured peak and not in the predicted
    one: nothing says which blocks those were.
    """

    name: str
    step_ms: float
    step_ms_p10: float | None = None
    step_ms_p90: float | None = None
    steps_ms: tuple[float, ...]
    kernel_ms: float
    kernel_ms_p10: float | None = None
    kernel_ms_p90: float | None = None
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    out_of_memory: bool
    measured_step_ms: float | None
    measured_steps_ms: tuple[float, ...] | None
    measured_trace_ms: float | None
    measured_on: str | None
    measured_peak_allocated_bytes: int | None
    measured_peak_reserved_bytes: int | None
    step_error: float | None
    breakdown_ms: Breakdown
    host_ms: float
    ranks: tuple[RankSummary, ...]
    collectives: tuple[CollectiveRow, ...]
    durations_from: DurationsFrom
    doubt: tuple[DoubtRow, ...] = ()
    energy_j: float | None = None
    energy_j_per_token: float | None = None
    energy_from: Literal["estimate"] | None = None
    top_ops: tuple[OpRow, ...]
    per_step: tuple[StepRow, ...]
    memory_peaks: tuple[PeakRow, ...]
    out_of_memory_at: tuple[OutOfMemoryRow, ...]
    remedies: tuple[RemedyRow, ...] = ()
    ranks_replayed: int
    ops: int
    replay_seconds: float | None
    warnings: tuple[str, ...]

    def check(self) -> None:
        """Raise UserError with the first law that does not hold."""
        tolerance = 1e-9 * max(1.0, self.step_ms)
        if not self.steps_ms or abs(sum(self.steps_ms) / len(self.steps_ms) - self.step_ms) > tolerance:
            raise UserError(f"{self.name}: step_ms is not the mean of steps_ms")
        if abs(self.breakdown_ms.total - self.step_ms) > tolerance:
            raise UserError(f"{self.name}: breakdown_ms does not add up to step_ms")
        for rank in self.ranks:
            if abs(rank.breakdown_ms.total - rank.step_ms) > tolerance:
                raise UserError(f"{self.name}: ranks[{rank.rank}].breakdown_ms does not add up to its step_ms")
            if rank.step_ms > max(self.steps_ms) + tolerance:
                raise UserError(f"{self.name}: ranks[{rank.rank}].step_ms is longer than any step of the job")
        if self.out_of_memory != bool(self.out_of_memory_at):
            raise UserError(f"{self.name}: out_of_memory does not say what out_of_memory_at says")


def encode(summary: Summary) -> bytes:
    """The JSON object of ``replay --json``, indented, with a newline at its end.  Nothing is rounded."""
    return msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n"


def decode(content: bytes) -> Summary:
    """What ``encode`` wrote; UserError where it is not that."""
    try:
        return msgspec.json.decode(content, type=Summary)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"not a summary ({error}); write one with `tracesim replay ... --json FILE`") from None


def write(summary: Summary, path: Path) -> None:
    """Write the JSON file, whole or not at all."""
    write_whole(path, encode(summary))
