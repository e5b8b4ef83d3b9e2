"""Convolutions as the matrix products that they are: output places by output channels, over the weight's products.

PyTorch lets cuDNN compute float32 convolutions in TF32 where the device has it (torch.backends.cudnn.allow_tf32 is
True by default; products are not).  Its tensor-core kernels want channels last: other tensors are turned around
before and after, a kernel each, but for windows of one place without a stride, which are plain products.
cuDNN's kernels reach a share of what a product of the same shape does.
Ignored: Winograd and FFT algorithms, which need fewer operations, and what cuDNN's search would find.
"""

from __future__ import annotations

import math

from sim.ops import TensorMeta, Work
from sim.place.kernels.cost import KernelCost, UnreadableWorkError, register, tensor
from sim.place.kernels.gemm import gemm_cost, products
from sim.place.kernels.memory import bytes_cost
from sim.topology.abilities import Abilities, abilities_of
from sim.topology.device import DeviceProfile

# Of a product's speed, forward and backward: ResNet50's 53 convolutions of 32 images, modelled as products over
# measured.  On tensor cores an A100 trace (HolisticTraceAnalysis tests, TF32: 3.73 of 4.41 ms, 7.47 of 10.10, without
# turning); on float32 lanes two V100 traces (19.3 of 18.0 and 21.1 ms; 38.5 of 42.2 and 45.5).
TENSOR_CORES_SHARE = (0.85, 0.74)
LANES_SHARE = (1.0, 0.88)


def _forward(
    data: TensorMeta, weight: TensorMeta, output: TensorMeta, abilities: Abilities, transposed: bool = False,
    turning: bool = True, backward: bool = False,
) -> KernelCost:  # fmt: skip
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
    dtype = _computed_in(data.dtype, abilities)
    shapes = products(groups, places, weight.shape[0] // groups, k, dtype, 0.0)
    unrolled = shapes.m * shapes.k + shapes.k * shapes.n + shapes.m * shapes.n
    # The windows overlap and are read through the caches: what moves is the tensors, not the unrolled matrix.
    width = data.nbytes // max(data.elements, 1)
    extra = moved - groups * unrolled * width
    if not shapes.m[0] or not shapes.k[0]:
        return bytes_cost(moved, abilities)
    cost = gemm_cost(shapes._replace(extra_bytes=extra), dtype, abilities)
    share = (TENSOR_CORES_SHARE if _on_tensor_cores(dtype, abilities) else LANES_SHARE)[backward]
    ns = round(cost.ns / share) + (_turning_ns(data, weight, output, abilities) if turning else 0)
    return KernelCost(ns, cost.bound, cost.source, cost.lender)


def products_of(work: Work, device: DeviceProfile) -> KernelCost:
    """The cost of a forward convolution without turning its tensors around."""
    data, weight = tensor(work, 0), tensor(work, 1)
    return _forward(data, weight, _output_of(work, data, weight), abilities_of(device), turning=False)


def turning_ns(work: Work, device: DeviceProfile) -> int:
    """What turning the tensors of a forward convolution around costs on that device."""
    data, weight = tensor(work, 0), tensor(work, 1)
    return _turning_ns(data, weight, _output_of(work, data, weight), abilities_of(device))


def _computed_in(dtype: str, abilities: Abilities) -> str:
    return "tfloat32" if dtype == "float32" and "tfloat32" in abilities.profile.tflops else dtype


def _turning_ns(data: TensorMeta, weight: TensorMeta, output: TensorMeta, abilities: Abilities) -> int:
    """The tensors are brought into channels-last order and back for tensor-core kernels."""
    plain = math.prod(weight.shape[2:]) == 1 and data.shape[2:] == output.shape[2:]
    if plain or _channels_last(data) or not _on_tensor_cores(_computed_in(data.dtype, abilities), abilities):
        return 0
    return sum(bytes_cost(2 * t.nbytes, abilities).ns for t in (data, weight, output))


def _on_tensor_cores(dtype: str, abilities: Abilities) -> bool:
    device = abilities.profile
    return device.kind == "gpu" and dtype not in ("float32", "float64") and dtype in device.tflops


def _channels_last(t: TensorMeta) -> bool:
    return t.stride is not None and len(t.stride) > 1 and t.stride[1] == 1 and t.shape[1] > 1


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
    one = _forward(data, weight, gradient, abilities, work.scalar("transposed") is True, backward=True)
    wanted = {out.shape for out in work.outputs} if work.outputs else {data.shape, weight.shape}
    count = max((data.shape in wanted) + (weight.shape in wanted), 1)
    return KernelCost(one.ns * count, one.bound, one.source, one.lender)


@register("aten::cudnn_convolution_backward_input", "aten::cudnn_convolution_transpose_backward_input")
def _backward_input(work: Work, abilities: Abilities) -> KernelCost:
    """(gradient, weight): the data is as large as the gradient, times what the stride left out."""
    gradient, weight = tensor(work, 0), tensor(work, 1)
    if len(gradient.shape) < 3 or len(weight.shape) < 2:
        raise UnreadableWorkError("a convolution without its shapes")
    data = TensorMeta(gradient.dtype, (gradient.shape[0], weight.shape[1], *gradient.shape[2:]))
    return _forward(data, weight, gradient, abilities, backward=True)
