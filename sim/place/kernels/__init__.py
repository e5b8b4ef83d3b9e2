"""What one kernel costs alone on one device: pure functions of shapes and a device profile, in a registry by aten op.

A kernel takes the larger of what its arithmetic, its bytes and the board's power limit need, not less than the
device's kernel floor.  Each bound is the data sheet's figure times what was measured on the device, or on the nearest
one that was (docs/kernels.md).  An op that nobody registered is counted by the bytes of its tensors ("estimate") and
named in the report.
"""

from __future__ import annotations

# Importing a module of formulas registers them.
from sim.place.kernels import convolution as convolution
from sim.place.kernels import indexing as indexing
from sim.place.kernels import normalization as normalization
from sim.place.kernels import optimizers as optimizers
from sim.place.kernels import pointwise as pointwise
from sim.place.kernels import products as products
from sim.place.kernels.attention import attention_flops
from sim.place.kernels.cost import Bound, KernelCost, has_shapes, is_known, kernel_cost, register
from sim.place.kernels.memory import floor_us, memory_cost

__all__ = [
    "Bound", "KernelCost", "attention_flops", "floor_us", "has_shapes", "is_known", "kernel_cost", "memory_cost",
    "register",
]  # fmt: skip
