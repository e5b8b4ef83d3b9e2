"""Fused attention: flash, memory-efficient with and without a mask, and math, forward and backward.

Two products of queries with keys and of weights with values forward; five of the same size backward, the first of
them done again.  Both sequences count in whole tiles.  Beside the products every score costs its exponential, its
scaling and its share in the sums: half of that follows the head size (rescaling the output), half does not.  A mask
is loaded, converted and added score by score.  Ignored: sequences too short to fill the SMs.
"""

from __future__ import annotations

import math

import numpy as np

from sim.ops import TensorMeta, Work
from sim.place.kernels.cost import Formula, KernelCost, UnreadableWorkError, priced, register, tensor
from sim.place.kernels.gemm import gemm_cost, products
from sim.place.kernels.layout import sm_clocks_us
from sim.place.kernels.memory import Floats, bytes_cost, floor_us
from sim.place.kernels.rows import rows_cost
from sim.topology.abilities import Abilities

BACKWARD_PRODUCTS = 5 / 2  # FlashAttention-2 (Dao, arXiv 2307.08691), section 4.1 counts the same
# The head size that profiles' shares are of.  Heads of 128 beside it on an A100 (forward, 1,024 tokens): what is no
# product grows 1.6 times in the memory-efficient kernel (xformers issue 712: 786 and 1337 us), 1.35 in flash.
USUAL_HEAD = 64
# Queries and keys of a tile: flash_fwd_launch_template.h (Dao-AILab/flash-attention) and kernel_forward.h (xformers).
TILES = {False: (128, 64), True: (64, 64)}  # by memory-efficient
# Clocks of an SM a score that a mask costs: some ten instructions of a thread (global load, shared store and load,
# bounds, conversion, scale, add: kernel_forward.h, "apply attention bias"), 128 threads issue in a clock.
MASK_CLOCKS = 10 / 128


def attention_flops(query: TensorMeta, key: TensorMeta, causal: bool) -> int:
    """Two products of [queries, keys] with the head size for every head; half of it where causal.

    query [batch, heads, queries, head_dim], key [batch, key heads, keys, head_dim].
    """
    flops = 4 * query.elements * key.shape[-2]
    return flops // 2 if causal else flops


def _fused(efficient: bool, backward: bool, heads_first: bool = True) -> Formula:
    first = 1 if backward else 0  # backward ops take the gradient of the output first

    def formula(work: Work, abilities: Abilities) -> KernelCost:
        query, key = (_heads_first(tensor(work, first + i), heads_first) for i in (0, 1))
        causal = work.scalar("is_causal") is True or _causal_argument(work, efficient)
        batch, heads, queries, size = query.shape
        masked = efficient and not backward and len(work.inputs) > 3 and _is_mask(work.inputs[3], queries)
        floor = floor_us(abilities.profile)
        us = floor + float(
            fused_us(batch * heads, queries, key.shape[-2], size, query.dtype, abilities, efficient, backward, masked)
        ) * (0.5 if causal else 1.0)
        lent = abilities.attention
        compute = priced(us, floor, "compute", "" if lent.own else lent.device)
        return max(compute, bytes_cost(_attention_bytes(work, query, backward), abilities), key=lambda cost: cost.ns)

    return formula


def fused_us(
    heads: Floats | int, queries: Floats | int, keys: Floats | int, size: Floats | int, dtype: str,
    abilities: Abilities, efficient: bool, backward: bool, masked: bool = False,
) -> Floats:  # fmt: skip
    """Microseconds of the arithmetic of fused attention over ``heads`` heads of all sequences, without a floor."""
    fit = abilities.attention.fit
    shares = (fit.flash, fit.flash_backward, fit.efficient, fit.efficient_backward)
    tall, wide = TILES[efficient]
    scores = heads * (np.ceil(np.asarray(queries) / tall) * tall) * (np.ceil(np.asarray(keys) / wide) * wide)
    flops = 4.0 * scores * size * (BACKWARD_PRODUCTS if backward else 1.0)
    beside = (1.0 / shares[2 * efficient + backward] - 1.0) * (0.5 + 0.5 * USUAL_HEAD / np.asarray(size))
    us = flops / abilities.tflops(dtype) / 1e6 * (1.0 + beside)
    return np.asarray(us + (sm_clocks_us(MASK_CLOCKS, abilities.profile) * scores if masked else 0.0))


def _is_mask(t: TensorMeta, queries: int) -> bool:
    """A trace leaves out what is None: then the fourth tensor is another one."""
    return len(t.shape) >= 2 and t.shape[-2] in (1, queries)


def _heads_first(t: TensorMeta, heads_first: bool) -> TensorMeta:
    """[batch, heads, sequence, size]; the underlying ops take [batch, sequence, heads, size]."""
    if len(t.shape) != 4:
        raise UnreadableWorkError("attention without four dimensions")
    batch, second, third, size = t.shape
    return t if heads_first else TensorMeta(t.dtype, (batch, third, second, size))


def _causal_argument(work: Work, efficient: bool) -> bool:
    """A trace names arguments by place: is_causal is the one after dropout_p of the flash ops."""
    if efficient:
        return False
    return any(value is True for name, value in work.scalars if name.startswith("arg"))


def _attention_bytes(work: Work, query: TensorMeta, backward: bool) -> int:
    """Each tensor once; a trace does not record outputs, which are as large as the query (three gradients backward)."""
    written = sum(t.nbytes for t in work.outputs) or query.nbytes * (3 if backward else 1)
    return sum(t.nbytes for t in work.inputs) + written


for _op in ("_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention"):
    register(f"aten::{_op}")(_fused(efficient=False, backward=False))
    register(f"aten::{_op}_backward")(_fused(efficient=False, backward=True))
register("aten::_scaled_dot_product_fused_attention_overrideable")(_fused(efficient=False, backward=False))
register("aten::_scaled_dot_product_flash_attention_for_cpu")(_fused(efficient=False, backward=False))
register("aten::_scaled_dot_product_flash_attention_for_cpu_backward")(_fused(efficient=False, backward=True))
register("aten::_scaled_dot_product_efficient_attention")(_fused(efficient=True, backward=False))
register("aten::_scaled_dot_product_efficient_attention_backward")(_fused(efficient=True, backward=True))
register("aten::_flash_attention_forward")(_fused(efficient=False, backward=False, heads_first=False))
register("aten::_flash_attention_backward")(_fused(efficient=False, backward=True, heads_first=False))
register("aten::_efficient_attention_forward")(_fused(efficient=True, backward=False, heads_first=False))
register("aten::_efficient_attention_backward")(_fused(efficient=True, backward=True, heads_first=False))


@register("aten::_scaled_dot_product_attention_math", "aten::_scaled_dot_product_attention_math_for_mps")
def _math(work: Work, abilities: Abilities) -> KernelCost:
    """Scaled queries, the product, the mask, softmax, the product: each a kernel of its own."""
    query, key = tensor(work, 0), tensor(work, 1)
    if len(query.shape) < 3 or len(key.shape) < 3:
        raise UnreadableWorkError("attention without heads")
    *outer, queries, size = query.shape
    keys, batch = key.shape[-2], math.prod(outer)
    scores = TensorMeta(query.dtype, (batch, queries, keys))
    width = scores.nbytes // max(scores.elements, 1)
    parts = [
        gemm_cost(products(batch, queries, keys, size, query.dtype), query.dtype, abilities),
        rows_cost("softmax", batch * queries, keys, width, abilities),
        gemm_cost(products(batch, queries, size, keys, query.dtype), query.dtype, abilities),
        bytes_cost(2 * query.nbytes, abilities),
    ]
    if len(work.inputs) > 3 or work.scalar("is_causal") is True:
        parts.append(bytes_cost(3 * scores.nbytes, abilities))
    longest = max(parts, key=lambda cost: cost.ns)
    return KernelCost(sum(p.ns for p in parts), longest.bound, longest.source, longest.lender)
