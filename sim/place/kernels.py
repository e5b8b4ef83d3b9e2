"""What one kernel costs alone on one device: pure functions of shapes and a device profile, in a registry by aten op.

Everything is a roofline: the larger of compute and memory time, not less than the device's kernel floor.  GEMM time
and memory time come from curves measured on the device where its profile has them ("profile"), otherwise from the
data sheet at stated efficiencies ("roofline").  An op that nobody registered is counted by the bytes of its tensors
("estimate") and named in the report.

Ignored: L2 hits between kernels, tile and wave quantization of GEMMs (the square curve's own is in it), clocks that
fall under load beyond what the curve saw, and reads that a reduction makes twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import msgspec

from sim.ops import TensorMeta, Work
from sim.place.curves import kernel_us
from sim.timeline import DurationSource
from sim.topology.device import DeviceProfile
from sim.units import ns_from_us

# Shares of the data sheet that a device without curves is taken to reach: those of the one calibrated device,
# the RTX A5000 (topologies/devices/rtx-a5000.yaml): 684 of 768 GB/s in copies of 1 GB and more, and 73 of
# 111.1 TFLOP/s in float16 GEMMs of 4096^3 to 16384^3.
MEMORY_EFFICIENCY = 684 / 768
GEMM_EFFICIENCY = 73 / 111.1
# FlashAttention-2 reaches 50 to 73 % of an A100's data sheet and is 1.7 to 3.0 times as fast as what was there
# before it, memory-efficient attention among it (Dao, arXiv 2307.08691, abstract and section 4.1).  Taken at the
# lower ends: heads of 64 and sequences around 1,000, as in most of this project's workloads, are at the lower end.
FLASH_EFFICIENCY = 0.50
MEMORY_EFFICIENT_ATTENTION_EFFICIENCY = 0.50 / 1.7
DEFAULT_FLOOR_US = 1.5

Bound = Literal["compute", "memory", "floor"]


class KernelCost(msgspec.Struct, frozen=True):
    """Nanoseconds of one kernel, what bounds it, and where the number is from."""

    ns: int
    bound: Bound
    source: DurationSource


Formula = Callable[[Work, DeviceProfile], KernelCost]
_FORMULAS: dict[str, Formula] = {}


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


def kernel_cost(work: Work, device: DeviceProfile) -> KernelCost:
    """Cost of one kernel; an op without a formula is an estimate by bytes."""
    if work.op in _FORMULAS:
        return _FORMULAS[work.op](work, device)
    return KernelCost(memory_cost(_tensor_bytes(work), device).ns, "memory", "estimate")


# What the device can do ----------------------------------------


def floor_us(device: DeviceProfile) -> float:
    """The shortest a kernel lasts."""
    launch = device.launch
    return DEFAULT_FLOOR_US if launch is None or launch.kernel_floor_us is None else launch.kernel_floor_us


def memory_cost(nbytes: float, device: DeviceProfile) -> KernelCost:
    """Time to read and write ``nbytes`` in all."""
    floor = floor_us(device)
    curve = device.measured.copy_
    if curve is None:
        us = floor + nbytes / (device.memory_bandwidth_gb_s * MEMORY_EFFICIENCY) / 1e3
        return _cost(us, floor, "memory", "roofline")
    pair_us = kernel_us(nbytes * curve.copies, curve.bytes_moved, curve.us, floor * curve.copies)
    return _cost(pair_us / curve.copies, floor, "memory", "profile")


def gemm_cost(flops: float, nbytes: float, dtype: str, device: DeviceProfile) -> KernelCost:
    """Time of a matrix product of that many operations, or of moving its operands, whichever is longer."""
    floor = floor_us(device)
    curve = device.measured.gemm
    if curve is not None and dtype in curve.us:
        compute = _cost(kernel_us(flops, curve.flops, curve.us[dtype], floor), floor, "compute", "profile")
    else:
        compute = _cost(
            floor + flops / (peak_tflops(dtype, device) * GEMM_EFFICIENCY) / 1e6, floor, "compute", "roofline"
        )
    return max(compute, memory_cost(nbytes, device), key=lambda cost: cost.ns)


def peak_tflops(dtype: str, device: DeviceProfile) -> float:
    """The data sheet's dense rate; a dtype without a rate of its own runs at float32's."""
    return device.tflops.get(dtype) or device.tflops.get("float32") or max(device.tflops.values())


def _cost(us: float, floor: float, bound: Bound, source: DurationSource) -> KernelCost:
    return KernelCost(ns_from_us(max(us, floor)), bound if us > floor else "floor", source)


# Matrix products ----------------------------------------


def _product(left: TensorMeta, right: TensorMeta, work: Work, device: DeviceProfile) -> KernelCost:
    """[..., m, k] times [..., k, n]."""
    flops = 2 * left.elements * right.shape[-1]
    return gemm_cost(flops, _tensor_bytes(work), left.dtype, device)


@register("aten::mm", "aten::bmm")
def _mm(work: Work, device: DeviceProfile) -> KernelCost:
    return _product(work.inputs[0], work.inputs[1], work, device)


@register("aten::addmm", "aten::baddbmm", "aten::addmm_", "aten::baddbmm_")
def _addmm(work: Work, device: DeviceProfile) -> KernelCost:
    return _product(work.inputs[1], work.inputs[2], work, device)


@register("aten::convolution", "aten::cudnn_convolution", "aten::_convolution")
def _convolution(work: Work, device: DeviceProfile) -> KernelCost:
    """Every output element is a dot product over the weight's [in / groups, *kernel]."""
    weight = work.inputs[1]
    flops = 2 * work.outputs[0].elements * math.prod(weight.shape[1:])
    return gemm_cost(flops, _tensor_bytes(work), weight.dtype, device)


# Attention ----------------------------------------


def attention_flops(query: TensorMeta, key: TensorMeta, causal: bool) -> int:
    """Two products of [queries, keys] with the head size for every head; half of it where causal.

    query [batch, heads, queries, head_dim], key [batch, key heads, keys, head_dim].
    """
    flops = 4 * query.elements * key.shape[-2]
    return flops // 2 if causal else flops


def _attention(efficiency: float) -> Formula:
    def formula(work: Work, device: DeviceProfile) -> KernelCost:
        query, key = work.inputs[0], work.inputs[1]
        flops = attention_flops(query, key, work.scalar("is_causal") is True)
        floor = floor_us(device)
        us = floor + flops / (peak_tflops(query.dtype, device) * efficiency) / 1e6
        compute = _cost(us, floor, "compute", "roofline")
        return max(compute, memory_cost(_tensor_bytes(work), device), key=lambda cost: cost.ns)

    return formula


register("aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_cudnn_attention",
         "aten::_flash_attention_forward")(_attention(FLASH_EFFICIENCY))  # fmt: skip
register("aten::_scaled_dot_product_efficient_attention", "aten::_efficient_attention_forward")(
    _attention(MEMORY_EFFICIENT_ATTENTION_EFFICIENCY)
)


# Ops that move bytes ----------------------------------------


def _tensor_bytes(work: Work) -> int:
    return sum(t.nbytes for t in work.inputs) + sum(t.nbytes for t in work.outputs)


@register(*("aten::" + name for name in (
    "add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "neg", "neg_", "pow", "pow_", "sqrt", "sqrt_", "rsqrt",
    "exp", "log", "sin", "cos", "tanh", "erf", "abs", "sign", "reciprocal", "clamp", "clamp_", "maximum", "minimum",
    "relu", "relu_", "gelu", "silu", "silu_", "sigmoid", "softplus", "leaky_relu", "hardtanh", "threshold_backward",
    "gelu_backward", "silu_backward", "tanh_backward", "sigmoid_backward", "addcmul", "addcdiv", "addcmul_", "addcdiv_",
    "lerp", "lerp_", "where", "masked_fill", "masked_fill_", "tril", "triu", "eq", "ne", "lt", "le", "gt", "ge",
    "logical_not", "logical_and", "logical_or", "bitwise_and", "bitwise_or", "bitwise_not", "isnan", "isinf",
    "clone", "_to_copy", "cat", "stack", "constant_pad_nd", "repeat", "roll", "flip", "cumsum", "contiguous",
    "sum", "mean", "amax", "amin", "max", "min", "all", "any", "argmax", "linalg_vector_norm", "var_mean",
    "_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data",
    "native_layer_norm", "_fused_rms_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit",
    "cudnn_batch_norm", "native_dropout", "native_dropout_backward", "bernoulli_", "max_pool2d_with_indices",
    "avg_pool2d", "_adaptive_avg_pool2d", "topk", "sort",
)))  # fmt: skip
def _read_inputs_write_outputs(work: Work, device: DeviceProfile) -> KernelCost:
    """Each input is read once, each output written once."""
    return memory_cost(_tensor_bytes(work), device)


@register("aten::copy_", "aten::fill_", "aten::zero_", "aten::normal_", "aten::uniform_")
def _overwrite(work: Work, device: DeviceProfile) -> KernelCost:
    """The first argument is written and not read; a source is read."""
    return memory_cost(sum(t.nbytes for t in work.inputs), device)


@register("aten::embedding", "aten::index_select", "aten::gather", "aten::index")
def _pick(work: Work, device: DeviceProfile) -> KernelCost:
    """Only what is picked is read: as much as is written, and the indices."""
    indices = sum(t.nbytes for t in work.inputs if t.dtype.startswith("int"))
    return memory_cost(2 * sum(t.nbytes for t in work.outputs) + indices, device)


@register("aten::nll_loss_forward")
def _nll_loss(work: Work, device: DeviceProfile) -> KernelCost:
    """One log-probability a row is read; a DRAM sector is 32 bytes."""
    rows = work.inputs[1].elements
    return memory_cost(rows * 32 + work.inputs[1].nbytes, device)
