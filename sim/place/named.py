"""Kernels by the class of their name: what decides their time where a trace does not say what they computed.

cuBLAS, cuDNN and CUTLASS say in a kernel's name that it is a product and in which arithmetic (volta_sgemm_64x64_nt,
cutlass_80_tensorop_s1688gemm: TF32, ampere_fp16_s16816gemm: half); attention kernels are called flash or fmha; what is
left moves bytes.  Each class is carried over by the cost model's ratio for one typical piece of work, beyond the
kernel's floor.  A convolution in float32 runs in TF32 on a device that has it, and has its tensors turned around there
(sim/place/kernels/convolution.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

from sim.ops import TensorMeta, Work
from sim.place.kernels import floor_us, kernel_cost, memory_cost
from sim.place.kernels.convolution import products_of, turning_ns
from sim.topology.device import DeviceProfile

NameClass = Literal["products", "convolutions", "attention", "bytes"]

HOW: dict[NameClass, str] = {
    "products": "carried over by their names as matrix products",
    "convolutions": "carried over by their names as convolutions",
    "attention": "carried over by their names as fused attention",
    "bytes": "carried over by memory bandwidth",
}
ATTENTION = ("flash_fwd", "flash_bwd", "fmha", "flash_attn", "attention_kernel")
# Parts of products that only move data: partial sums, layouts, Winograd's transforms, and PyTorch's own kernels.
MOVING = (
    "at::native::", "splitkreduce", "reducesplitk", "reduce_wgrad", "winogradforward", "winogradwgrad",
    "generatewinograd", "nchwtonhwc", "nhwctonchw", "im2col", "col2im", "offsetskernel", "scalepackedtensor", "convert",
    "gemv2", "gemvnsp", "gemvx", "cub::", "depthwise", "bn_fw", "bn_bw", "batchnorm", "pooling", "softmax",
)  # fmt: skip
CONVOLUTIONS = ("conv", "scudnn", "hcudnn", "winograd", "wgrad", "dgrad", "fprop")
PRODUCTS = ("gemm", "cutlass", "xmma", "_mma", *CONVOLUTIONS)
HALF = ("fp16", "bf16", "f16", "half", "bfloat", "h884", "h1688", "h16816", "hgemm", "s884", "s16816", "hcudnn", "e4m3")
TF32 = re.compile(r"tf32|s1688")

NAMED = 5
BRIEF = 48
LARGE_BYTES = 1 << 28  # a stream far larger than any L2


def class_of(name: str, op: str = "") -> NameClass:
    """What a kernel of that name does; ``op`` is the aten op that launched it, where it is known."""
    lower = name.lower().replace("fbgemm", "")  # a library of embeddings
    if any(part in lower for part in ATTENTION):
        return "attention"
    if any(part in lower for part in MOVING) or not any(part in lower for part in PRODUCTS):
        return "bytes"
    return "convolutions" if "conv" in op or any(part in lower for part in CONVOLUTIONS) else "products"


def dtype_of(name: str) -> str:
    """The arithmetic of a product of that name."""
    lower = name.lower()
    if "tf32" in lower:
        return "tfloat32"
    if any(part in lower for part in HALF):
        return "float16"
    return "tfloat32" if TF32.search(lower) else "float32"


def carried_over_ns(measured_ns: int, kind: NameClass, dtype: str, source: DeviceProfile, target: DeviceProfile) -> int:
    """A duration measured on one device, on another: the floor by its floor, the rest by the ratio of its class."""
    floor, there = round(1e3 * floor_us(source)), round(1e3 * floor_us(target))
    if measured_ns <= floor:
        return round(measured_ns * there / floor) if floor else measured_ns
    return round(there + (measured_ns - floor) * ratio(kind, dtype, source, target))


@lru_cache(maxsize=256)
def ratio(kind: NameClass, dtype: str, source: DeviceProfile, target: DeviceProfile) -> float:
    """How much longer work of a class takes on ``target``."""
    if kind == "bytes":
        return memory_cost(LARGE_BYTES, target).ns / memory_cost(LARGE_BYTES, source).ns
    if kind == "convolutions" and dtype != "float16":
        here = sum(products_of(work, target).ns for work in TYPICAL_CONVOLUTIONS)
        there = sum(products_of(work, source).ns for work in TYPICAL_CONVOLUTIONS)
        # A trace of a device that turns tensors around has the kernels that do so.
        turning = 0 if dtype == "tfloat32" else sum(turning_ns(work, target) for work in TYPICAL_CONVOLUTIONS)
        return (here + turning) / there
    typical = _attention if kind == "attention" else _product
    return kernel_cost(typical(_on(dtype, target)), target).ns / kernel_cost(typical(_on(dtype, source)), source).ns


def _on(dtype: str, device: DeviceProfile) -> str:
    """Arithmetic that a device lacks is done in float32."""
    return dtype if dtype in device.tflops else "float32"


def _product(dtype: str) -> Work:
    left, right = TensorMeta(dtype, (4096, 1024)), TensorMeta(dtype, (1024, 4096))
    return Work("aten::mm", (left, right), (TensorMeta(dtype, (4096, 4096)),))


def _attention(dtype: str) -> Work:
    heads = TensorMeta(dtype, (16, 16, 1024, 64))
    return Work("aten::_scaled_dot_product_flash_attention", (heads, heads, heads), (heads,))


def _convolution(channels: int, out: int, window: int, side: int) -> Work:
    data, weight = (TensorMeta("float32", s) for s in ((32, channels, side, side), (out, channels, window, window)))
    return Work("aten::convolution", (data, weight), (TensorMeta("float32", (32, out, side, side)),))


# Of the four stages of ResNet50 (He et al., arXiv 1512.03385, table 1), 32 images: a bottleneck's three convolutions.
TYPICAL_CONVOLUTIONS = tuple(
    work
    for width, side in ((64, 56), (128, 28), (256, 14), (512, 7))
    for work in (
        _convolution(4 * width, width, 1, side),
        _convolution(width, width, 3, side),
        _convolution(width, 4 * width, 1, side),
    )
)


class Unexplained:
    """Counts the kernels whose work no formula explains, by how they were estimated and by name."""

    def __init__(self) -> None:
        self._counts: dict[str, dict[str, int]] = {}

    def add(self, how: str, name: str) -> None:
        """One more kernel of that name, estimated in that way."""
        names = self._counts.setdefault(how, {})
        names[name] = names.get(name, 0) + 1

    def told(self, everything: bool = False) -> tuple[str, ...]:
        """A sentence for each way of estimating, with the names most frequent, or all."""
        return tuple(
            f"{sum(names.values())} kernels {how}: {_most_frequent(names, len(names) if everything else NAMED)}"
            for how, names in self._ordered()
        )

    def _ordered(self) -> list[tuple[str, dict[str, int]]]:
        return sorted(self._counts.items(), key=lambda item: (-sum(item[1].values()), item[0]))


def _most_frequent(names: Mapping[str, int], count: int) -> str:
    ordered = sorted(names.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{_brief(name)} ({often})" for name, often in ordered[:count])
    return shown + (f" and {len(ordered) - count} names more" if len(ordered) > count else "")


def _brief(kernel: str) -> str:
    """A C++ kernel's name without the words that all have, cut where it gets long."""
    name = kernel.removeprefix("void ").replace("at::native::", "").replace("(anonymous namespace)::", "")
    return name if len(name) <= BRIEF else f"{name[:BRIEF]}..."
