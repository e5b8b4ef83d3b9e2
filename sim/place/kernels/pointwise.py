"""Ops that only move bytes: elementwise, reductions, copies, dropout, pooling, random numbers."""

from __future__ import annotations

from collections.abc import Sequence

from sim.ops import TensorMeta, Work
from sim.place.kernels import layout
from sim.place.kernels.cost import KernelCost, outputs_of, register
from sim.place.kernels.memory import bytes_cost, element_us, op_us
from sim.topology.abilities import Abilities


def _aten(*names: str) -> list[str]:
    """Each name with ``aten::``."""
    return [f"aten::{name}" for name in names]


def _with_in_place(*names: str) -> list[str]:
    """Each op and the one that does it in place."""
    return _aten(*names, *(f"{name}_" for name in names))


UNARY = (
    "neg", "pow", "sqrt", "rsqrt", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "tanh",
    "sinh", "cosh", "asin", "acos", "atan", "erf", "erfc", "erfinv", "abs", "sign", "sgn", "reciprocal", "square",
    "clamp", "clamp_min", "clamp_max", "relu", "relu6", "gelu", "silu", "mish", "elu", "celu", "selu", "sigmoid",
    "logit", "leaky_relu", "hardtanh", "hardsigmoid", "hardswish", "softplus", "softshrink", "hardshrink", "threshold",
    "floor", "ceil", "round", "trunc", "frac", "nan_to_num", "logical_not", "bitwise_not", "positive",
)  # fmt: skip
BINARY = (
    "add", "sub", "rsub", "mul", "div", "true_divide", "floor_divide", "remainder", "fmod", "atan2", "maximum",
    "minimum", "fmax", "fmin", "where", "masked_fill", "lerp", "addcmul", "addcdiv", "eq", "ne", "lt", "le", "gt",
    "ge", "logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor", "xlogy", "copysign",
    "hypot", "dropout", "alpha_dropout", "float_power", "__and__", "__or__", "__lshift__", "__rshift__",
)  # fmt: skip
BACKWARD = tuple(f"{name}_backward" for name in (
    "threshold", "gelu", "silu", "tanh", "sigmoid", "elu", "hardtanh", "hardswish", "hardsigmoid", "leaky_relu",
    "softplus", "mish", "logit", "native_dropout", "mse_loss", "smooth_l1_loss", "huber_loss",
    "binary_cross_entropy", "_prelu_kernel", "glu", "log_sigmoid", "max_pool2d_with_indices", "avg_pool2d",
    "_adaptive_avg_pool2d", "adaptive_max_pool2d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d",
    "reflection_pad2d", "select", "slice", "diagonal", "cumsum", "masked_select", "value_selecting_reduction",
    "unfold",
))  # fmt: skip
MOVING = (
    "stack", "repeat", "tile", "roll", "flip", "constant_pad_nd",
    "reflection_pad2d", "tril", "triu", "cumsum", "cumprod", "native_dropout", "_fused_dropout", "_prelu_kernel",
    "prelu", "glu", "log_sigmoid_forward", "max_pool2d_with_indices", "avg_pool2d", "avg_pool3d",
    "_adaptive_avg_pool2d", "adaptive_max_pool2d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d",
    "im2col", "col2im", "grid_sampler_2d", "unfold_copy", "masked_select", "nonzero",
    "repeat_interleave", "isnan", "isinf", "isfinite", "isin", "bucketize", "searchsorted", "one_hot", "bincount",
    "_chunk_cat", "chunk_cat", "split_with_sizes_copy", "all_gather_copy_in", "view_copy", "expand_copy",
    "_weight_norm_interface", "complex", "polar", "angle", "conj_physical",
)  # fmt: skip
REDUCTIONS = (
    "sum", "mean", "prod", "amax", "amin", "aminmax", "max", "min", "all", "any", "argmax", "argmin", "var", "std",
    "var_mean", "std_mean", "count_nonzero", "logsumexp", "nansum", "equal",
    "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "kl_div", "_local_scalar_dense",
    "trace", "median", "_is_all_true", "_is_any_true",
)  # fmt: skip


# Ops of one kernel of the elementwise kind, by name.
POINTWISE = frozenset((*UNARY, *BINARY, "clone", "_to_copy", "copy"))
# Functions whose arithmetic shows beside their bytes: an exponential and a division.
SPECIAL = frozenset(_aten("silu", "silu_", "gelu", "gelu_", "silu_backward", "gelu_backward", "mish", "tanh", "erf"))


@register(*_with_in_place(*UNARY, *BINARY), *_aten("clone", "_to_copy"))
def _elementwise(work: Work, abilities: Abilities) -> KernelCost:
    """Each input is read once, each output written once; walked element by element where they are not all dense."""
    written = outputs_of(work)
    return _walked(work, (*written, *work.inputs), _read(work) + sum(t.nbytes for t in written), abilities)


def is_walked(work: Work) -> bool:
    """Whether the kernel of a pointwise op goes element by element, or converts: not all that it touches is dense."""
    operands = (*outputs_of(work), *work.inputs)
    return bool(operands) and (layout.walking_clocks(operands) > 0 or layout.converts(work, operands[0]))


def _walked(work: Work, operands: Sequence[TensorMeta], nbytes: float, abilities: Abilities) -> KernelCost:
    if not operands:
        return bytes_cost(nbytes, abilities)
    clocks = layout.walking_clocks(operands)
    if layout.converts(work, operands[0]):
        clocks = max(clocks, layout.CONVERTING_CLOCKS)
    if work.op in SPECIAL:
        clocks += layout.SPECIAL_CLOCKS
    elements = max(t.elements for t in operands)
    name = work.op.removeprefix("aten::").removesuffix("_")
    if name == "mul" and len(work.inputs) == 1:
        name = "mulu"  # by a number, which becomes a tensor first
    working = layout.sm_clocks_us(clocks * elements, abilities.profile) + float(element_us(name, elements, abilities))
    return bytes_cost(nbytes, abilities, working, op_us(name, abilities))


@register("aten::cat")
def _cat(work: Work, abilities: Abilities) -> KernelCost:
    """Dense tensors are copied in wide loads, others element by element."""
    joined = work.outputs or work.inputs
    nbytes = _read(work) + sum(t.nbytes for t in (work.outputs or work.inputs))
    strided = any(t.stride is not None and layout.merged_dims([t]) > 1 for t in work.inputs)
    clocks = layout.CAT_CLOCKS * sum(t.elements for t in joined) if strided else 0.0
    return bytes_cost(nbytes, abilities, layout.sm_clocks_us(clocks, abilities.profile))


@register(
    *_aten(*BACKWARD, *MOVING), "aten::binary_cross_entropy_with_logits", "fsdp::all_gather_copy_in",
    "fsdp::split_with_sizes_copy", "fsdp::chunk_cat", "fsdp::copy_",
)  # fmt: skip
def _read_inputs_write_outputs(work: Work, abilities: Abilities) -> KernelCost:
    """Each input is read once, each output written once."""
    return bytes_cost(_read(work) + sum(t.nbytes for t in outputs_of(work)), abilities)


@register(*_aten(*REDUCTIONS))
def _reduce(work: Work, abilities: Abilities) -> KernelCost:
    """Each input is read once; what a trace does not say is written is small."""
    return bytes_cost(_read(work) + sum(t.nbytes for t in work.outputs), abilities)


@register("aten::copy_")
def _copy(work: Work, abilities: Abilities) -> KernelCost:
    """(target, source): the target is written and not read."""
    return _walked(work, work.inputs[:2], _read(work), abilities)


@register(*_aten(
    "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "exponential_", "random_", "trunc_normal_",
    "log_normal_", "cauchy_", "geometric_", "detach_copy", "fill", "copy", "bernoulli",
    "multinomial", "randperm", "rand", "randn", "randint", "rand_like", "randn_like", "randint_like", "arange",
    "linspace", "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full",
    "eye", "scalar_tensor", "tril_indices", "triu_indices",
))  # fmt: skip
def _overwrite(work: Work, abilities: Abilities) -> KernelCost:
    """The first argument is written and not read; a source is read."""
    if work.op.endswith("_") or not work.outputs:
        return bytes_cost(_read(work), abilities)
    return bytes_cost(_read(work) + sum(t.nbytes for t in work.outputs), abilities)


def _read(work: Work) -> int:
    return sum(t.nbytes for t in work.inputs)
