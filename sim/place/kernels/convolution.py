"""Convolutions as the matrix products that they are: output places by output channels, over the weight's products.

Ignored: Winograd and FFT algorithms, which need fewer operations, and what cuDNN's search would find.
"""

from __future__ import annotations

import math

from sim.ops import TensorMeta, Work
from sim.place.kernels.cost import KernelCost, UnreadableWorkError, register, tensor
from sim.place.kernels.gemm import gemm_cost, products
from sim.place.kernels.memory import bytes_cost
from sim.topology.abilities import Abilities


def _forward(
    data: TensorMeta, weight: TensorMeta, output: TensorMeta, abilities: Abilities, transposed: bool = False
) -> KernelCost:
    """One product for each group: [batch x places, in / groups x kernel] by [.., out / groups]."""
    if len(weight.shape) < 3 or len(data.shape) != len(weight.shape) or 0 in weight.shape:
        raise UnreadableWorkError("a convolution without its shapes")
    if transposed:  # the product of the gradient with respect to the data: from output to input
        data, output = output, data
    groups = max(data.shape[1] // weight.shape[1], 1)
    if weight.shape[1] == 1 and groups > 1:  # depthwise: no product to share operands in, so bytes decide
        return bytes_cost(data.nbytes + weight.nbytes + output.nbytes, abilities)
    places = output.shape[0] * math.prod(output.shape[2:])
    k = math.prod(weight.shape[1:])
    moved = data.nbytes + output.nbytes + weight.nbytes
    shapes = products(groups, places, weight.shape[0] // groups, k, data.dtype, 0.0)
    unrolled = shapes.m * shapes.k + shapes.k * shapes.n + shapes.m * shapes.n
    # The windows overlap and are read through the caches: what moves is the tensors, not the unrolled matrix.
    width = data.nbytes // max(data.elements, 1)
    extra = moved - groups * unrolled * width
    cost = gemm_cost(shapes._replace(extra_bytes=extra), data.dtype, abilities)
    return cost if shapes.m[0] and shapes.k[0] else bytes_cost(moved, abilities)


def _output_of(work: Work, data: TensorMeta, weight: TensorMeta) -> TensorMeta:
    """The first output; a trace records none, so there it is taken to be as large as the data (stride 1, padded)."""
    if work.outputs:
        return work.outputs[0]
    if len(data.shape) < 3 or not weight.shape:
        raise UnreadableWorkError("a convolution without its shapes")
    return TensorMeta(data.dtype, (data.shape[0], weight.shape[0], *data.shape[2:]))


@register(
    "aten::convolution", "aten::cudnn_convolution", "aten::_convolution", "aten::convolution_overrideable",
    "aten::cudnn_convolution_relu", "aten::_conv_depthwise2d", "aten::conv_depthwise3d", "aten::conv2d", "aten::conv1d",
    "aten::_slow_conv2d_forward", "aten::thnn_conv2d",
)  # fmt: skip
def _convolution(work: Work, abilities: Abilities) -> KernelCost:
    data, weight = tensor(work, 0), tensor(work, 1)
    return _forward(data, weight, _output_of(work, data, weight), abilities, work.scalar("transposed") is True)


@register("aten::cudnn_convolution_transpose")
def _transposed(work: Work, abilities: Abilities) -> KernelCost:
    data, weight = tensor(work, 0), tensor(work, 1)
    return _forward(data, weight, _output_of(work, data, weight), abilities, transposed=True)


@register("aten::convolution_backward", "aten::_slow_conv2d_backward", "aten::convolution_backward_overrideable")
def _backward(work: Work, abilities: Abilities) -> KernelCost:
    """The gradients of data and weight, each as many products as forward; ``outputs`` says which were wanted."""
    gradient, data, weight = (tensor(work, i) for i in range(3))
    forward = _forward(data, weight, gradient, abilities, work.scalar("transposed") is True)
    wanted = {out.shape for out in work.outputs} if work.outputs else {data.shape, weight.shape}
    count = max((data.shape in wanted) + (weight.shape in wanted), 1)
    return KernelCost(forward.ns * count, forward.bound, forward.source, forward.lender)


@register("aten::cudnn_convolution_backward_input", "aten::cudnn_convolution_transpose_backward_input")
def _backward_input(work: Work, abilities: Abilities) -> KernelCost:
    """(gradient, weight): the data is as large as the gradient, times what the stride left out."""
    gradient, weight = tensor(work, 0), tensor(work, 1)
    if len(gradient.shape) < 3 or len(weight.shape) < 2:
        raise UnreadableWorkError("a convolution without its shapes")
    data = TensorMeta(gradient.dtype, (gradient.shape[0], weight.shape[1], *gradient.shape[2:]))
    return _forward(data, weight, gradient, abilities)
