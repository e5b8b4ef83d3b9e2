"""Kernels with one block of threads a row (softmax, layer norm): rows in flight, passes over a row, readings of it.

Besides moving its bytes, a row costs its block a setup and one pass of all threads over each stretch of the row.  The
row is read more than once: softmax three times (maximum, sum, result) where it is longer than a warp holds, layer
norm twice.  Later readings hit the L2 while the rows in flight fit into it.

How many threads a block has follows PyTorch: SoftMax_getBlockSize and SoftMaxForward_getBlockSize
(aten/src/ATen/native/cuda/PersistentSoftmax.cuh, SoftMax.cu: a power of two up to a 16th of 16 bytes of the row),
softmax of at most 1024 elements in one warp, and 128 threads a row for the vectorized layer norm
(layer_norm_kernel.cu).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sim.place.kernels.cost import KernelCost, priced
from sim.place.kernels.memory import dram_gb_s, floor_us, l2_bytes, memory_us
from sim.topology.abilities import Abilities

Floats = NDArray[np.float64]
RowOp = Literal["softmax", "layer_norm"]

READINGS: dict[RowOp, int] = {"softmax": 3, "layer_norm": 2}
WARP_SOFTMAX = 1024  # longest row that PyTorch's softmax keeps in one warp's registers
LAYER_NORM_THREADS = 128
BLOCKS_AN_SM = 16
VECTOR_BYTES = 16


def threads_an_sm(capability: tuple[int, int]) -> int:
    """Most resident threads of an SM (CUDA C++ programming guide, technical specifications by compute capability)."""
    return {(7, 5): 1024, (8, 6): 1536, (8, 7): 1536, (8, 9): 1536}.get(capability, 2048)


def rows_us(op: RowOp, rows: Floats, columns: Floats, size: int, abilities: Abilities, tensors: int = 1) -> Floats:
    """Microseconds to read ``tensors`` of [rows, columns] elements of ``size`` bytes and write one."""
    device, fit = abilities.profile, abilities.rows[op].fit
    if device.kind == "cpu":
        return _by_cores(op, rows, columns, size, abilities, tensors)
    vector = VECTOR_BYTES // size
    threads = np.full(columns.shape, float(LAYER_NORM_THREADS))
    short = np.zeros(columns.shape, dtype=np.bool_)
    if op == "softmax":
        threads, short = _softmax_threads(columns, vector), columns <= WARP_SOFTMAX
    in_flight = device.sms * np.minimum(threads_an_sm(device.capability) / threads, BLOCKS_AN_SM)
    once = rows * columns * size
    missing = np.clip(
        (in_flight * columns * size * (tensors + 1) / l2_bytes(device) - fit.miss_from) / fit.miss_span, 0.0, 1.0
    )
    again = np.where(short, 0.0, missing * (READINGS[op] - 1) * tensors)
    moving = memory_us((tensors + 1) * once, abilities) + again * once / (dram_gb_s(abilities) * 1e3)
    passes = np.ceil(columns / (vector * threads)) * READINGS[op]
    working = np.ceil(rows / in_flight) * (fit.setup_us + fit.pass_us * passes)
    working = np.where(short, 0.0, working)
    return _beside(moving, working, fit.overlap)


def _by_cores(op: RowOp, rows: Floats, columns: Floats, size: int, abilities: Abilities, tensors: int) -> Floats:
    """On a CPU each core takes its share of the rows, one after another, 16 bytes of a row at a time."""
    device, fit = abilities.profile, abilities.rows[op].fit
    moving = memory_us((tensors + 1) * rows * columns * size, abilities)
    steps = np.ceil(columns * size / VECTOR_BYTES) * READINGS[op]
    return _beside(moving, np.ceil(rows / device.sms) * (fit.setup_us + fit.pass_us * steps), fit.overlap)


def _beside(moving: Floats, working: Floats, overlap: float) -> Floats:
    """The larger of the two, or a little more where they are alike: the p-norm."""
    larger, smaller = np.maximum(moving, working), np.minimum(moving, working)
    return np.asarray(larger * (1.0 + (smaller / larger) ** overlap) ** (1.0 / overlap))


def _softmax_threads(columns: Floats, vector: int) -> Floats:
    """The smallest power of two from half of the row's vectors on, at least a warp, at most half of 1024."""
    vectors = np.minimum(np.maximum(columns / vector, 1.0), 1024.0)
    return np.asarray(np.maximum(2.0 ** np.ceil(np.log2(vectors / 2.0)), 32.0))


def rows_cost(op: RowOp, rows: float, columns: float, size: int, abilities: Abilities, tensors: int = 1) -> KernelCost:
    """Cost of one such kernel."""
    if rows * columns <= 0:
        return priced(0.0, floor_us(abilities.profile), "memory")
    us = rows_us(op, np.array([float(rows)]), np.array([float(columns)]), size, abilities, tensors)
    lent = abilities.rows[op]
    return priced(float(us[0]), floor_us(abilities.profile), "memory", "" if lent.own else lent.device)
