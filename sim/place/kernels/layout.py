"""How an elementwise kernel walks its tensors: as one run of elements in wide loads, or element by element.

PyTorch's TensorIterator orders and merges the dimensions of all operands (TensorIteratorBase::reorder_dimensions,
coalesce_dimensions).  What is left as one dimension of stride 1 goes to the vectorized kernel and costs bytes alone.
Of anything else, transposed, sliced or broadcast, every thread computes each element's offsets, a division for each
dimension (aten/src/ATen/cuda/detail/OffsetCalculator.cuh); a dtype that the kernel converts while loading costs a
switch an element (MemoryAccess.cuh, LoadWithCast).  That work is integer arithmetic: SMs have 64 integer lanes from
Volta to Hopper (CUDA C++ programming guide, arithmetic throughput), so it takes the same clocks an SM on all of them.

Ignored: 64-bit indexing, and threads left idle by small tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

from sim.ops import TensorMeta, Work
from sim.topology.device import DeviceProfile

# Clocks of one SM an element, fitted by tools/fit_layout.py to the elementwise kernels of an H100 trace (PyTorch 2.6,
# TraceLens tests, Qwen1.5-0.5B forward, bfloat16, MIT licence); strided kernels left out of the fit are predicted
# within 7 %.  docs/kernels.md, "Strided, broadcast and converting kernels".
CLOCKS = 0.157
CLOCKS_A_DIM = 0.101
CLOCKS_AN_OPERAND = 0.0991
CONVERTING_CLOCKS = 0.664
CAT_CLOCKS = 1.15
PICKING_CLOCKS = 1.43  # an index_select of 8,944 rows of 1,024
SPECIAL_CLOCKS = 0.197  # a division and an exponential an element (silu)

# float32 lanes of an SM (CUDA C++ programming guide): with the data sheet's rate they give the clock.
LANES = {(6, 0): 64, (7, 0): 64, (7, 5): 64, (8, 0): 64}
OTHER_LANES = 128
NARROW = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


def sm_clocks_us(clocks: float, device: DeviceProfile) -> float:
    """Microseconds of so many clocks of one SM, spread over all; 0 where the clock is not known."""
    rate = device.tflops.get("float32")
    if device.kind != "gpu" or rate is None:
        return 0.0
    lanes = LANES.get(device.capability, OTHER_LANES)
    return clocks * 2 * lanes / (rate * 1e6)


def walking_clocks(operands: Sequence[TensorMeta]) -> float:
    """Clocks an element of a kernel over these operands, the written one first; 0 where loads can be wide."""
    operands = [t for t in operands if t.elements > 1] or list(operands[:1])
    dims = merged_dims(operands)
    if dims <= 1:
        return 0.0
    return CLOCKS + CLOCKS_A_DIM * dims + CLOCKS_AN_OPERAND * len(operands)


def merged_dims(operands: Sequence[TensorMeta]) -> int:
    """Dimensions left when all that lie behind each other in every operand are merged; 0 where everything is dense."""
    if not operands:
        return 0
    shape = max((t.shape for t in operands), key=len)
    shape = tuple(max(_size(t.shape, i - len(shape)) for t in operands) for i in range(len(shape)))
    strides = [_strides(t, shape) for t in operands]
    order = sorted(
        (i for i in range(len(shape)) if shape[i] > 1),
        key=lambda i: ([s[i] or _beyond(shape) for s in strides], -i),
    )
    merged: list[tuple[int, tuple[int, ...]]] = []
    for i in order:
        steps = tuple(s[i] for s in strides)
        if merged:
            size, inner = merged[-1]
            if all(size * a == b for a, b in zip(inner, steps, strict=True)):
                merged[-1] = (size * shape[i], inner)
                continue
        merged.append((shape[i], steps))
    dense = len(merged) <= 1 and all(step == 1 for _, steps in merged for step in steps)
    return 0 if dense else max(len(merged), 2)


def _beyond(shape: tuple[int, ...]) -> int:
    """Beyond every stride of a dense tensor of that shape: where a broadcast dimension sorts."""
    end = 1
    for size in shape:
        end *= size
    return end + 1


def _size(shape: tuple[int, ...], i: int) -> int:
    return shape[i] if -i <= len(shape) else 1


def _strides(t: TensorMeta, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in the common shape; 0 where the tensor is broadcast."""
    own = t.stride or _dense(t.shape)
    missing = len(shape) - len(t.shape)
    return tuple(
        0 if i < missing or (t.shape[i - missing] == 1 and size > 1) else own[i - missing]
        for i, size in enumerate(shape)
    )


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    step, strides = 1, []
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def converts(work: Work, written: TensorMeta) -> bool:
    """Whether the kernel converts a dtype while it loads or stores.

    float32 to a narrower one has kernels of its own (float16_copy_kernel_cuda in Copy.cu); booleans are what
    comparisons write and masks are, natively.
    """
    read = [t.dtype for t in work.inputs if t.shape and t.dtype != "bool"]
    if work.op.removesuffix("_") in ("aten::copy", "aten::_to_copy"):
        source = read[-1:]
        return any(d != written.dtype and not (d == "float32" and written.dtype in NARROW) for d in source)
    return len(set(read)) > 1 or (written.dtype != "bool" and any(d != written.dtype for d in read))
