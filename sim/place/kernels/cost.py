"""Costs and the registry: which formula prices which aten op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from sim.ops import TensorMeta, Work
from sim.timeline import DurationSource
from sim.topology.abilities import Abilities, abilities_of
from sim.topology.device import DeviceProfile
from sim.units import ns_from_us

Bound = Literal["compute", "memory", "floor"]


class KernelCost(msgspec.Struct, frozen=True):
    """Nanoseconds of one kernel, what bounds it, and where the number is from.

    ``source``: "profile" where the device itself is calibrated for it, "roofline" where the data sheet and another
    device's calibration (``lender``) made it, "estimate" where nobody registered the op.
    """

    ns: int
    bound: Bound
    source: DurationSource
    lender: str = ""


Formula = Callable[[Work, Abilities], KernelCost]
_FORMULAS: dict[str, Formula] = {}


class UnreadableWorkError(Exception):
    """The shapes that a formula needs are not there: a trace without them, or a list in a tensor's place."""


def register(*ops: str) -> Callable[[Formula], Formula]:
    """Make a function the formula of these aten ops; registering an op twice is an error."""

    def add(formula: Formula) -> Formula:
        for op in ops:
            assert op not in _FORMULAS, f"{op} has two formulas"
            _FORMULAS[op] = formula
        return formula

    return add


def is_known(op: str) -> bool:
    """Whether the registry has a formula for this op."""
    return op in _FORMULAS


def has_shapes(work: Work) -> bool:
    """Whether the work says any tensor at all; a trace recorded without shapes does not."""
    return bool(work.inputs or work.outputs)


def kernel_cost(work: Work, device: DeviceProfile) -> KernelCost:
    """Cost of one kernel; an op without a formula, or without the shapes it needs, is an estimate by bytes."""
    abilities = abilities_of(device)
    formula = _FORMULAS.get(work.op)
    if formula is not None:
        try:
            return formula(work, abilities)
        except UnreadableWorkError:
            pass
    from sim.place.kernels.memory import bytes_cost

    guess = bytes_cost(sum(t.nbytes for t in (*work.inputs, *work.outputs)), abilities)
    return KernelCost(guess.ns, "memory", "estimate", guess.lender)


def priced(us: float, floor: float, bound: Bound, lender: str = "") -> KernelCost:
    """A cost of ``us`` microseconds, at least ``floor``; ``lender`` is empty where the calibration is the device's."""
    return KernelCost(
        ns_from_us(max(us, floor)), bound if us > floor else "floor", "roofline" if lender else "profile", lender
    )


def tensor(work: Work, index: int) -> TensorMeta:
    """The input of that index; UnreadableWorkError where it is not there."""
    if index >= len(work.inputs):
        raise UnreadableWorkError(work.op)
    return work.inputs[index]


def outputs_of(work: Work) -> tuple[TensorMeta, ...]:
    """What an elementwise op writes; a trace does not record it, so then it is the first input of an op in place, or
    the largest."""
    if work.outputs or not work.inputs:
        return work.outputs
    if work.op.endswith("_"):
        return work.inputs[:1]
    return (max(work.inputs, key=lambda t: t.elements),)
