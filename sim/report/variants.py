"""What-if rows: what a what-if found out, as plain values, and the JSON of ``whatif --json``.

Times are decimal milliseconds a step (the mean over the run's steps), sizes bytes.  The parts of a critical path add
up to the step, so the changes of a ledger add up to the change of the step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from sim.errors import UserError
from sim.files import write_whole
from sim.report.summary import Breakdown

Value = bool | int | float | str | None


class PathItem(msgspec.Struct, frozen=True):
    """Time on the critical path that went into one name: ``count`` operations a step of ``of`` that there are.

    ``part`` is one of compute, communication, copy, host, launch, gap and contention; ``of`` is known for
    communication (of one rank that takes part).
    """

    part: str
    name: str
    ms: float
    count: float
    of: float | None = None


class LedgerLine(msgspec.Struct, frozen=True):
    """Where milliseconds of the critical path went: one part, or one kind and size of collective."""

    part: str
    name: str
    base_ms: float
    ms: float
    change_ms: float
    base_count: float
    count: float
    of: float | None = None


class Bound(msgspec.Struct, frozen=True):
    """What decides a step: the part with most of the critical path, and its dearest operation.

    ``share`` is the part's of the path, 0 to 1; ``links`` are the classes of links that bound its transfers.
    """

    part: str
    ms: float
    share: float
    op: str
    op_ms: float
    links: tuple[str, ...] = ()


class NextBound(msgspec.Struct, frozen=True):
    """What would decide the step if ``without`` took no time at all: the step then, and its bound."""

    without: str
    step_ms: float
    bound_by: Bound


class Variant(msgspec.Struct, frozen=True):
    """One machine: the values that set it apart from the base, and the step on it.

    ``speedup`` is the base's step / this step; its 80 % interval is that of pairs of draws, so what both machines have
    in common is wrong on both alike.  ``unchanged_because`` says why a change changed nothing.
    """

    topology: str
    values: dict[str, Value]
    step_ms: float
    step_ms_p10: float | None
    step_ms_p90: float | None
    speedup: float
    speedup_p10: float | None
    speedup_p90: float | None
    exposed_communication_ms: float
    breakdown_ms: Breakdown
    host_ms: float
    energy_j: float | None
    energy_from: Literal["estimate"] | None
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    memory_bytes: int | None
    out_of_memory: bool
    bound_by: Bound
    next_bottleneck: NextBound | None
    critical_path: tuple[PathItem, ...]
    ledger: tuple[LedgerLine, ...] = ()
    unchanged_because: str | None = None
    warnings: tuple[str, ...] = ()


class WhatIf(msgspec.Struct, frozen=True):
    """The base (the topology as it is, after ``--set``) and a row for each change."""

    name: str
    base: Variant
    rows: tuple[Variant, ...]
    warnings: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise UserError with the first law that does not hold."""
        for row in (self.base, *self.rows):
            tolerance = 1e-9 * max(1.0, row.step_ms, self.base.step_ms)
            if abs(sum(item.ms for item in row.critical_path) - row.step_ms) > tolerance:
                raise UserError(f"{self.name}: {row.values}: the critical path does not add up to the step")
            change = row.step_ms - self.base.step_ms
            if row.ledger and abs(sum(line.change_ms for line in row.ledger) - change) > tolerance:
                raise UserError(f"{self.name}: {row.values}: the ledger does not add up to the change of the step")


class Tried(msgspec.Struct, frozen=True):
    """One value that a search tried, and what the target's measure was there."""

    value: float
    measure: float


class Solution(msgspec.Struct, frozen=True):
    """The answer to an inverse question.

    ``value`` reaches the target (None: no value does, and ``bound_by`` at ``limit_value``, the best of all tried, says
    what stands in the way).  ``monotone``: whether what was tried moved one way only.
    """

    name: str
    topology: str
    path: str
    measure: str
    target: float
    base_value: float
    base_measure: float
    value: float | None
    reached: float
    limit_value: float
    step_ms: float
    bound_by: Bound
    next_bottleneck: NextBound | None
    monotone: bool
    tried: tuple[Tried, ...]
    warnings: tuple[str, ...] = ()


def encode(told: WhatIf | Solution) -> bytes:
    """The JSON of ``whatif --json``, for people to read too."""
    return msgspec.json.format(msgspec.json.encode(told), indent=2) + b"\n"


def write(told: WhatIf | Solution, path: Path) -> None:
    """Write the JSON, whole or not at all."""
    write_whole(path, encode(told))
