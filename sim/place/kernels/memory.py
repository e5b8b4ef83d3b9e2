"""Bytes through L2 and DRAM: the time that moving them takes.

Tensors that fit into the L2 beside each other are still there from the kernel before; tensors of twice its size come
from DRAM.  Data sheets give an A100's and an H100's L2 in two halves that hold each other's data twice, so half of it
counts.  Ignored: sharing of DRAM with copies that run at the same time, and partly used sectors.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sim.place.curves import curve_us
from sim.place.kernels.cost import Bound, KernelCost, priced
from sim.topology.abilities import Abilities, abilities_of
from sim.topology.device import DeviceProfile

Floats = NDArray[np.float64]

DEFAULT_FLOOR_US = 1.5
# An L4 softmax over 25 MB in and 25 MB out, its L2 48 MiB: 80 us beside 8 us of call are 2.7 times the DRAM rate, layer
# norm 2.1 times (fp32_elementwise, the only rows of that set that fit into an L2).
L2_OVER_DRAM = 2.5
# How arithmetic of elementwise kernels and their bytes add up (a p-norm): fitted with the constants of layout.py.
BESIDE = 2.58
# NVIDIA A100 whitepaper, "L2 cache is divided into two partitions", each caching data for its own SMs; H100 likewise.
SPLIT_L2 = ((8, 0), (9, 0))


def floor_us(device: DeviceProfile) -> float:
    """The shortest a kernel lasts."""
    launch = device.launch
    return DEFAULT_FLOOR_US if launch is None or launch.kernel_floor_us is None else launch.kernel_floor_us


def l2_bytes(device: DeviceProfile) -> float:
    """How much of the L2 one tensor can use."""
    return device.l2_mib * (1 << 20) * (0.5 if device.capability in SPLIT_L2 else 1.0)


def dram_gb_s(abilities: Abilities) -> float:
    """The bandwidth that large streams reach."""
    return abilities.profile.memory_bandwidth_gb_s * abilities.memory.fit.efficiency


def memory_us(nbytes: Floats, abilities: Abilities) -> Floats:
    """Microseconds to read and write ``nbytes`` in all, the kernel's floor included."""
    device = abilities.profile
    floor = floor_us(device)
    hit = np.clip(2.0 - nbytes / l2_bytes(device), 0.0, 1.0)
    dram = _dram_us(nbytes, abilities)
    speedup = abilities.memory.fit.cache_speedup or L2_OVER_DRAM
    return floor + dram * (1.0 - hit) + hit * nbytes / (dram_gb_s(abilities) * speedup * 1e3)


def _dram_us(nbytes: Floats, abilities: Abilities) -> Floats:
    """Without the floor: from the measured copies where the profile has them, at the bandwidth that it has now."""
    line = nbytes / (dram_gb_s(abilities) * 1e3)
    curve = abilities.profile.measured.copy_
    if curve is None or len(curve.us) < 2:
        return line
    measured = abilities.profile.as_measured
    floor, faster = floor_us(measured), abilities.profile.memory_bandwidth_gb_s / measured.memory_bandwidth_gb_s
    pair = curve_us(nbytes * curve.copies, curve.bytes_moved, curve.us, floor * curve.copies) / curve.copies
    # Below the second point nothing was measured but calls; there the bandwidth of the line goes on.
    return np.where(nbytes * curve.copies >= curve.bytes_moved[1], (pair - floor) / faster, line)


def beside(moving_us: Floats, working_us: Floats | float) -> Floats:
    """Moving bytes and computing, which partly hide behind each other."""
    if not np.any(working_us):
        return moving_us
    return np.asarray((moving_us**BESIDE + working_us**BESIDE) ** (1.0 / BESIDE))


def element_us(op: str, elements: Floats | float, abilities: Abilities) -> Floats | float:
    """What a CPU computes for so many elements of an op, without its bytes; 0 where that was not measured."""
    if abilities.profile.kind != "cpu" or not abilities.memory.own:
        return 0.0
    return elements * abilities.memory.fit.element_ns.get(op, 0.0) / abilities.profile.sms / 1e3


def op_us(op: str, abilities: Abilities) -> float:
    """What a CPU's call of an elementwise op takes beyond the shortest; 0 where that was not measured."""
    return abilities.memory.fit.op_us.get(op, 0.0) if abilities.profile.kind == "cpu" and abilities.memory.own else 0.0


def bytes_cost(nbytes: float, abilities: Abilities, working_us: float = 0.0, beyond_us: float = 0.0) -> KernelCost:
    """Time to read and write ``nbytes`` in all, beside ``working_us`` of arithmetic that partly hides behind it, and
    ``beyond_us`` that nothing hides."""
    floor = floor_us(abilities.profile)
    us = float(memory_us(np.asarray([nbytes], dtype=np.float64), abilities)[0]) if nbytes > 0 else 0.0
    moving = max(us - floor, 0.0)
    if working_us > 0:
        us = floor + float(beside(np.asarray(moving), working_us))
    bound: Bound = "compute" if working_us > moving else "memory"
    return priced(us + beyond_us, floor, bound, "" if abilities.memory.own else abilities.memory.device)


def memory_cost(nbytes: float, device: DeviceProfile) -> KernelCost:
    """Time to read and write ``nbytes`` in all on a device."""
    return bytes_cost(nbytes, abilities_of(device))
