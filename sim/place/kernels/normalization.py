"""Softmax, cross-entropy and normalizations, forward and backward."""

from __future__ import annotations

import math

from sim.ops import TensorMeta, Work
from sim.place.kernels.cost import KernelCost, UnreadableWorkError, register, tensor
from sim.place.kernels.memory import bytes_cost, floor_us, l2_bytes
from sim.place.kernels.rows import rows_cost
from sim.topology.abilities import Abilities
from sim.units import ns_from_us

SECTOR_BYTES = 32  # the least that DRAM gives
DRAM_WAIT_US = 0.6  # of one access on an idle device (Ampere: about 0.5 us and a miss of the TLB)


def _width(t: TensorMeta) -> int:
    return t.nbytes // t.elements if t.elements and t.stride is None else max(t.nbytes // max(t.elements, 1), 1)


def _last_dim(work: Work, t: TensorMeta) -> bool:
    dim = work.scalar("dim")
    dim = work.scalar("arg1") if dim is None else dim
    return not isinstance(dim, int) or isinstance(dim, bool) or dim in (-1, len(t.shape) - 1)


@register("aten::_softmax", "aten::_log_softmax", "aten::softmax", "aten::log_softmax", "aten::_safe_softmax")
def _softmax(work: Work, abilities: Abilities) -> KernelCost:
    data = tensor(work, 0)
    if not data.shape:
        raise UnreadableWorkError(work.op)
    columns = data.shape[-1]
    if not _last_dim(work, data):
        return bytes_cost(2 * data.nbytes, abilities)
    return rows_cost("softmax", data.elements // max(columns, 1), columns, _width(data), abilities)


@register("aten::_softmax_backward_data", "aten::_log_softmax_backward_data", "aten::_masked_softmax_backward")
def _softmax_backward(work: Work, abilities: Abilities) -> KernelCost:
    """Gradient and result are read, for the sum and again for the gradient."""
    data = tensor(work, 0)
    if not data.shape:
        raise UnreadableWorkError(work.op)
    columns = data.shape[-1]
    return rows_cost("softmax", data.elements // max(columns, 1), columns, _width(data), abilities, tensors=2)


def _normalized(work: Work, data: TensorMeta) -> tuple[int, int]:
    """Rows and columns: the weight tells how much is normalized together, else it is the last dimension."""
    if not data.shape or not data.elements:
        raise UnreadableWorkError(work.op)
    weight = next((t for t in work.inputs[1:] if t.shape and t.shape == data.shape[-len(t.shape) :]), None)
    columns = weight.elements if weight is not None and weight.elements < data.elements else data.shape[-1]
    return data.elements // columns, columns


@register("aten::native_layer_norm", "aten::_fused_rms_norm", "aten::rms_norm", "aten::layer_norm")
def _layer_norm(work: Work, abilities: Abilities) -> KernelCost:
    data = tensor(work, 0)
    return rows_cost("layer_norm", *_normalized(work, data), _width(data), abilities)


@register("aten::native_layer_norm_backward", "aten::_fused_rms_norm_backward")
def _layer_norm_backward(work: Work, abilities: Abilities) -> KernelCost:
    """One kernel reads gradient and data for the data's gradient, another reads both for those of weight and bias."""
    data = tensor(work, 1)
    rows, columns = _normalized(work, TensorMeta(data.dtype, data.shape))
    first = rows_cost("layer_norm", rows, columns, _width(data), abilities, tensors=2)
    second = bytes_cost(2 * data.nbytes, abilities)
    return KernelCost(first.ns + second.ns, first.bound, first.source, first.lender)


def _channels(data: TensorMeta, once: int, again: int, abilities: Abilities) -> KernelCost:
    """``once`` tensors moved, ``again`` of them read a second time, from DRAM where they exceed the L2."""
    extra = data.nbytes * again if data.nbytes * again > l2_bytes(abilities.profile) else 0
    return bytes_cost(data.nbytes * once + extra, abilities)


@register(
    "aten::native_batch_norm", "aten::_native_batch_norm_legit", "aten::cudnn_batch_norm", "aten::native_group_norm",
    "aten::_native_batch_norm_legit_functional", "aten::_batch_norm_with_update", "aten::miopen_batch_norm",
    "aten::batch_norm_stats", "aten::batch_norm_elemt",
)  # fmt: skip
def _batch_norm(work: Work, abilities: Abilities) -> KernelCost:
    """Read for mean and variance, read again and written; in evaluation the statistics are there already."""
    training = work.scalar("training")
    return _channels(tensor(work, 0), 2, 0 if training is False else 1, abilities)


@register("aten::_native_batch_norm_legit_no_training")
def _batch_norm_evaluated(work: Work, abilities: Abilities) -> KernelCost:
    return _channels(tensor(work, 0), 2, 0, abilities)


@register(
    "aten::native_batch_norm_backward", "aten::cudnn_batch_norm_backward", "aten::native_group_norm_backward",
    "aten::batch_norm_backward", "aten::miopen_batch_norm_backward",
)  # fmt: skip
def _batch_norm_backward(work: Work, abilities: Abilities) -> KernelCost:
    """Data and gradient are read for the sums and again for the data's gradient."""
    return _channels(tensor(work, 0), 3, 2, abilities)


@register("aten::nll_loss_forward", "aten::nll_loss2d_forward")
def _nll_loss(work: Work, abilities: Abilities) -> KernelCost:
    """One block of threads reads every row's target, then its log-probability: two waits for DRAM a round
    (nll_loss_threads in aten/src/ATen/native/cuda/Loss.cu: a power of two near a sixteenth of the rows)."""
    rows = tensor(work, 1).elements
    threads = 2 ** min(max(round(math.log2(max(rows / 16, 1))), 5), 10)
    us = floor_us(abilities.profile) + 2 * DRAM_WAIT_US * math.ceil(rows / threads)
    moved = bytes_cost(rows * SECTOR_BYTES + tensor(work, 1).nbytes, abilities)
    return KernelCost(max(moved.ns, ns_from_us(us)), moved.bound, moved.source, moved.lender)


@register("aten::nll_loss_backward", "aten::nll_loss2d_backward")
def _nll_loss_backward(work: Work, abilities: Abilities) -> KernelCost:
    """The gradient is filled with zeros, then one value a row is written."""
    data, target = tensor(work, 1), tensor(work, 2)
    return bytes_cost(data.nbytes + 2 * target.elements * SECTOR_BYTES + target.nbytes, abilities)


@register("aten::linalg_vector_norm", "aten::norm", "aten::_foreach_norm", "aten::frobenius_norm")
def _norm(work: Work, abilities: Abilities) -> KernelCost:
    """Everything is read once; the norms themselves are small."""
    return bytes_cost(math.fsum(t.nbytes for t in work.inputs), abilities)
