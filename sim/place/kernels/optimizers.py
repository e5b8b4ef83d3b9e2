"""Optimizers: one fused kernel over all parameters, or foreach kernels over lists of tensors.

A list's kernels run over chunks of all its tensors, so bytes alone decide; a list of very many tensors takes several
launches (ignored).
"""

from __future__ import annotations

from sim.ops import Work
from sim.place.kernels.cost import KernelCost, register
from sim.place.kernels.memory import bytes_cost
from sim.topology.abilities import Abilities

UNARY = (
    "sqrt", "rsqrt", "neg", "abs", "exp", "log", "reciprocal", "sign", "erf", "tanh", "sigmoid", "floor", "ceil",
    "round", "frac", "sin", "cos", "zero",
)  # fmt: skip
BINARY = ("add", "sub", "mul", "div", "pow", "maximum", "minimum", "clamp_max", "clamp_min", "copy")
TERNARY = ("addcmul", "addcdiv")
FOREACH = (*UNARY, *BINARY, *TERNARY, "lerp", "max")
WRITTEN_ONLY = ("aten::_foreach_zero_", "aten::_foreach_copy_")


def _lists(work: Work) -> int:
    """How many lists of tensors lie behind each other in the inputs: self alone, self and other, self and two others.

    A binary op has one list where it has a number for the other; without one, where its halves differ.
    """
    name = work.op.removeprefix("aten::_foreach_").removesuffix("_")
    if name in TERNARY:
        return 3
    if name == "lerp":
        return 2
    shapes = [t.shape for t in work.inputs if t.shape]
    number = work.scalar("scalar")
    number = work.scalar("arg1") if number is None else number
    half, odd = divmod(len(shapes), 2)
    alike = not odd and half > 0 and shapes[:half] == shapes[half:]
    return 2 if name in BINARY and number is None and alike else 1


@register(*(f"aten::_foreach_{name}_" for name in FOREACH))
def _in_place(work: Work, abilities: Abilities) -> KernelCost:
    """Every list is read and the first written; zeros are only written, copies only read from the second."""
    total = sum(t.nbytes for t in work.inputs)
    if work.op in WRITTEN_ONLY:
        return bytes_cost(total, abilities)
    return bytes_cost(total + total / _lists(work), abilities)


@register(*(f"aten::_foreach_{name}" for name in FOREACH if name not in ("copy", "zero")))
def _out_of_place(work: Work, abilities: Abilities) -> KernelCost:
    total = sum(t.nbytes for t in work.inputs)
    written = sum(t.nbytes for t in work.outputs) or total / _lists(work)
    return bytes_cost(total + written, abilities)


@register("aten::_amp_foreach_non_finite_check_and_unscale_")
def _unscale(work: Work, abilities: Abilities) -> KernelCost:
    return bytes_cost(2 * sum(t.nbytes for t in work.inputs), abilities)


def _fused(lists: int, written: int, *ops: str) -> None:
    """A fused step reads ``lists`` lists (parameter, gradient, states) and writes ``written`` of them."""

    def formula(work: Work, abilities: Abilities) -> KernelCost:
        big = sum(t.nbytes for t in work.inputs if len(t.shape) > 0)
        return bytes_cost(big * (1 + written / lists), abilities)

    register(*ops)(formula)


_fused(4, 3, "aten::_fused_adam_", "aten::_fused_adamw_", "aten::_fused_adam", "aten::_fused_adamw")
_fused(3, 2, "aten::_fused_sgd_", "aten::_fused_sgd", "aten::_fused_adagrad_", "aten::_fused_adagrad")
