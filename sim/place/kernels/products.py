"""Formulas of matrix products: mm, addmm, bmm and what else is one product."""

from __future__ import annotations

from sim.ops import TensorMeta, Work
from sim.place.kernels.cost import KernelCost, UnreadableWorkError, register, tensor
from sim.place.kernels.gemm import ALIGNMENT_BYTES, gemm_cost, products
from sim.topology.abilities import Abilities


def product_cost(
    left: TensorMeta, right: TensorMeta, abilities: Abilities, extra: tuple[TensorMeta, ...] = (), dtype: str = ""
) -> KernelCost:
    """[..., m, k] times [..., k, n]; a [k, n] on the right of more dimensions makes one product of all rows.  ``dtype``
    is computed in, if not that of the tensors."""
    if not left.shape or not right.shape:
        raise UnreadableWorkError("a product of scalars")
    k = left.shape[-1]
    n = right.shape[-1] if len(right.shape) > 1 else 1
    batched = len(right.shape) > 2
    batch = left.elements // max(left.shape[-2] * k, 1) if batched else 1
    rows = left.shape[-2] if batched else left.elements // max(k, 1)
    if min(k, n, batch, rows) <= 0:
        raise UnreadableWorkError("an empty product")
    aligned = all(_aligned(t) for t in (left, right)) and (n * right.nbytes // right.elements) % ALIGNMENT_BYTES == 0
    added = sum(t.nbytes for t in extra)
    dtype = dtype or left.dtype
    return gemm_cost(products(batch, rows, n, k, dtype, added, aligned), dtype, abilities)


def _computed_in(work: Work, left: TensorMeta, abilities: Abilities) -> str:
    """float32 runs in TF32 where it may (``allow_tf32``) and the device can."""
    tf32 = work.scalar("allow_tf32") is True and left.dtype == "float32" and "tfloat32" in abilities.profile.tflops
    return "tfloat32" if tf32 else left.dtype


def _aligned(t: TensorMeta) -> bool:
    """Whether every row (along the dimension of stride 1) begins at a multiple of 16 bytes."""
    if t.elements == 0:
        return True
    width = t.nbytes // t.elements if t.stride is None else max(t.nbytes // t.elements, 1)
    length = t.shape[-1]
    if t.stride is not None and len(t.stride) == len(t.shape):
        steps = [s for s in t.stride if s > 1]
        length = min(steps) if steps else length
    return (length * width) % ALIGNMENT_BYTES == 0


@register("aten::mm", "aten::bmm", "aten::mv", "aten::dot", "aten::_int_mm")
def _mm(work: Work, abilities: Abilities) -> KernelCost:
    left = tensor(work, 0)
    return product_cost(left, tensor(work, 1), abilities, dtype=_computed_in(work, left, abilities))


@register(
    "aten::addmm", "aten::baddbmm", "aten::addmm_", "aten::baddbmm_", "aten::addbmm", "aten::addmv",
    "aten::_addmm_activation",
)  # fmt: skip
def _addmm(work: Work, abilities: Abilities) -> KernelCost:
    left = tensor(work, 1)
    added, dtype = (tensor(work, 0),), _computed_in(work, left, abilities)
    return product_cost(left, tensor(work, 2), abilities, added, dtype)


@register("aten::linear")
def _linear(work: Work, abilities: Abilities) -> KernelCost:
    """The weight is [n, k]."""
    weight = tensor(work, 1)
    return product_cost(
        tensor(work, 0), TensorMeta(weight.dtype, weight.shape[::-1], (1, *weight.shape[-1:])), abilities,
        work.inputs[2:],
    )  # fmt: skip
