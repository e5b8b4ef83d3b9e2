"""Matrix products by shape: tiles over SMs in waves, split k, operand traffic, and the board's power limit.

A library computes the output in tiles.  An SM takes ceil(tiles / SMs) of them one after another; a tile takes its
products at the SM's rate, the loading of its operands, and a begin and an end.  Of the tile shapes and splits of k
that the libraries have, the fastest is taken.  The whole takes no less than its operands through DRAM.  A board at its
power limit lowers the clock of all its SMs, so whole turns take longer, those that leave SMs idle too.  Where the
device's profile has a curve of measured squares, the time of the arithmetic is scaled so that squares lie on the curve.

Ignored: DRAM traffic beyond reading each operand once (tiles in flight share their operands in the L2), and the
libraries' choices where they are not the fastest.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.ops import DTYPE_BYTES
from sim.place.curves import net_us
from sim.place.kernels.cost import Bound, KernelCost, priced
from sim.place.kernels.memory import dram_gb_s, floor_us, memory_us
from sim.topology.abilities import Abilities, abilities_of
from sim.topology.calibration import GemmFit
from sim.topology.device import DeviceProfile

Floats = NDArray[np.float64]

# From this k on cuBLAS chose its sliced kernels for float32 on V100 and A100 (fp32_gemm, kernel names: k = 32768 and
# more at sliced tiles, k = 30522 and less not).
LONG_K = 32768
LONG_BESIDE_CALL = 10.0  # calls; an A5000's first point is 15.3 us in float16, 12.1 in bfloat16, for the same kernel
# In float32 cuBLAS takes one tile for every batch from Ampere on: all 4,373 kernel names of batches in fp32_gemm on
# A100 and on L4.  Before Ampere it chooses among all tiles.
BATCHED_TILES, BATCHED_SINCE = ((128, 128),), (8, 0)
CPU_VECTOR_BYTES = 64  # of AVX-512; half as wide ones come in pairs
ALIGNMENT_BYTES = 16  # the widest load of a thread; tensor-core kernels without it read in halves


class Products(NamedTuple):
    """Many products [batch] x [m, k] x [k, n]: one value for each in every array.  ``extra_bytes``: of a bias or an
    added matrix; ``aligned``: rows begin at 16 bytes."""

    batch: Floats
    m: Floats
    n: Floats
    k: Floats
    aligned: NDArray[np.bool_]
    extra_bytes: Floats

    @property
    def flops(self) -> Floats:
        """Operations of each product."""
        return 2.0 * self.batch * self.m * self.n * self.k

    def part(self, chosen: NDArray[np.bool_]) -> Products:
        """Those that are chosen."""
        sizes = (column[chosen] for column in (self.batch, self.m, self.n, self.k))
        batch, m, n, k = sizes
        return Products(batch, m, n, k, self.aligned[chosen], self.extra_bytes[chosen])


# A board at its power limit, beside what it computes for a joule.  The first three are round numbers for all boards,
# chosen on all that were measured; with 3.5 to 14, 0.125 to 0.4, 10 to 40 ms in place of one of them GPUs left out are
# wrong by 13.3 to 14.4 % on average, with these by 13.6.
OPERAND_ENERGY = 7.0  # rows of operands whose way to the lanes takes the energy of one row of products
BOOST = 0.25  # by how much a short call alone, on a cool device, exceeds what lasts
BOOST_US = 20_000.0  # the duration at which half of it is left
LARGE_TILE = 128  # a board's operations a joule are of tiles as wide and as high
# Micron's comparison of graphics memories: 7.5 pJ a bit of GDDR6, 6.0 of HBM2E, in the devices alone.
PJ_PER_BYTE = {"hbm": 48.0}
PJ_PER_BYTE_OF_GDDR = 60.0


class Times(NamedTuple):
    """Microseconds of each product, and whether its arithmetic (or power) or its operands took longer."""

    us: Floats
    computing: NDArray[np.bool_]


def products(
    batch: object, m: object, n: object, k: object, dtype: str, extra_bytes: object = 0.0, aligned: object = None
) -> Products:
    """Arrays of products; where ``aligned`` is not said it follows from n and k (row-major operands)."""
    arrays = (np.atleast_1d(np.asarray(value, dtype=np.float64)) for value in (batch, m, n, k, extra_bytes))
    b, rows, columns, depth, extra = np.broadcast_arrays(*arrays)
    if aligned is None:
        whole = ALIGNMENT_BYTES // min(DTYPE_BYTES[dtype], ALIGNMENT_BYTES)
        aligned = (columns % whole == 0) & (depth % whole == 0)
    flags = np.broadcast_to(np.atleast_1d(np.asarray(aligned, dtype=np.bool_)), b.shape)
    return Products(b, rows, columns, depth, flags, extra)


def products_us(shapes: Products, dtype: str, abilities: Abilities, alone: bool = False) -> Times:
    """Time of each product.  ``alone``: a single call on a cool device, which may run faster than its power limit
    allows for long."""
    fit = abilities.gemm(dtype).fit
    tiled = _tiled(shapes, dtype, abilities, fit)
    compute = _limited_us(tiled, shapes, dtype, abilities, alone) * _by_curve(shapes, dtype, abilities)
    return Times(_norm(compute, tiled.memory_us, fit.overlap) + fit.fixed_us, compute >= tiled.memory_us)


class _Tiled(NamedTuple):
    """Of each product, at the tiles and the split of k that take least: the time of its arithmetic at full clocks and
    of its operands, and the operations that its energy on the SMs is worth."""

    compute_us: Floats
    memory_us: Floats
    spent: Floats


def _tiled(shapes: Products, dtype: str, abilities: Abilities, fit: GemmFit) -> _Tiled:
    if abilities.profile.kind == "cpu":
        return _by_cores(shapes, dtype, abilities, fit)
    batched = (shapes.batch > 1) & _has_one_batched_tile(dtype, abilities)
    merged = _Tiled(*(np.empty(batched.shape) for _ in _Tiled._fields))
    for tiles, chosen in ((fit.tiles, ~batched), (BATCHED_TILES, batched)):
        if chosen.any():
            for column, found in zip(merged, _fastest(shapes.part(chosen), tiles, dtype, abilities, fit), strict=True):
                column[chosen] = found
    return merged


def _has_one_batched_tile(dtype: str, abilities: Abilities) -> bool:
    return abilities.family(dtype) == "float32" and abilities.profile.capability >= BATCHED_SINCE


def _fastest(
    shapes: Products, tiles: Sequence[tuple[int, int]], dtype: str, abilities: Abilities, fit: GemmFit
) -> _Tiled:
    grid = [(float(wide), float(high), float(split)) for wide, high in tiles for split in fit.splits]
    wide, high, split = (np.array(column)[:, None] for column in zip(*grid, strict=True))
    sms = abilities.profile.sms
    queue = np.ceil(shapes.batch * np.ceil(shapes.n / wide) * np.ceil(shapes.m / high) * split / sms) + fit.tail
    compute = queue * _tile_us(shapes, wide, high, split, dtype, abilities, fit)
    compute = compute + np.where(split > 1, fit.split_us, 0.0) + _stores_us(shapes, dtype, abilities, fit)
    memory = _operands_us(shapes, split, dtype, abilities, fit)
    spent = queue * sms * _tile_energy(wide, high) * (shapes.k / split + fit.prologue_k)
    both = _norm(compute, memory, fit.overlap)
    at = both.argmin(axis=0), np.arange(both.shape[1])
    return _Tiled(compute[at], memory[at], spent[at])


def _tile_energy(wide: Floats, high: Floats) -> Floats:
    """What a step of k in a tile takes, in operations of large tiles."""
    large = 1.0 + OPERAND_ENERGY * 2 / LARGE_TILE
    return 2.0 * (wide * high + OPERAND_ENERGY * (wide + high)) / large


def _by_cores(shapes: Products, dtype: str, abilities: Abilities, fit: GemmFit) -> _Tiled:
    """On a CPU: cores share the work, and the whole of their output is one tile: a library packs both operands once,
    computes in vectors of columns, and writes results whose pages may be new, as a copy's are."""
    vector = CPU_VECTOR_BYTES // DTYPE_BYTES[dtype]
    wide = np.ceil(shapes.n / vector) * vector
    one = np.ones_like(wide)
    compute = shapes.batch * _tile_us(shapes, wide, shapes.m, one, dtype, abilities, fit) / abilities.profile.sms
    written = 2.0 * DTYPE_BYTES[dtype] * shapes.batch * shapes.m * shapes.n
    compute = compute + fit.store_exposed * (memory_us(written, abilities) - floor_us(abilities.profile))
    return _Tiled(compute, _operands_us(shapes, one, dtype, abilities, fit), shapes.flops)


def _tile_us(
    shapes: Products, wide: Floats, high: Floats, split: Floats, dtype: str, abilities: Abilities, fit: GemmFit
) -> Floats:
    """One tile on one SM, which has it to itself."""
    efficiency = fit.efficiency * np.where(shapes.aligned, 1.0, fit.unaligned_efficiency)
    efficiency = efficiency * np.where(shapes.k >= LONG_K, fit.long_k_efficiency, 1.0)
    sm_flop_per_us = abilities.tflops(dtype) * 1e6 / abilities.profile.sms * efficiency
    per_k = 2.0 * (wide * high + fit.operand_elements * (wide + high)) / sm_flop_per_us
    return np.asarray(per_k * (shapes.k / split + fit.prologue_k))


def _operands_us(shapes: Products, split: Floats, dtype: str, abilities: Abilities, fit: GemmFit) -> Floats:
    """Operands read once, the output written once; a split of k writes its parts and reads them again."""
    size = DTYPE_BYTES[dtype]
    output = shapes.m * shapes.n * np.where(split > 1, 1.0 + 2.0 * split, 1.0)
    nbytes = size * shapes.batch * (shapes.m * shapes.k + shapes.k * shapes.n + output) + shapes.extra_bytes
    return np.asarray(nbytes / (dram_gb_s(abilities) * 1e3 * fit.memory_efficiency))


def _stores_us(shapes: Products, dtype: str, abilities: Abilities, fit: GemmFit) -> Floats:
    """What the output's way to DRAM adds to the products."""
    nbytes = DTYPE_BYTES[dtype] * shapes.batch * shapes.m * shapes.n
    return np.asarray(fit.store_exposed * nbytes / (dram_gb_s(abilities) * 1e3))


def _limited_us(tiled: _Tiled, shapes: Products, dtype: str, abilities: Abilities, alone: bool) -> Floats:
    """The arithmetic's time, as far as the board's power allows; where nothing is known about that, as it is."""
    power, watts = abilities.power(dtype), abilities.profile.tdp_w
    if power is None or watts is None:
        return tiled.compute_us
    fit = power.fit
    if fit.lower_bound:
        bound = shapes.flops / (watts * fit.gflop_per_joule * 1e3)
        # Kernels for rows that begin anywhere do more for the same operations, in energy as in time.
        bound = bound / np.where(shapes.aligned, 1.0, abilities.gemm(dtype).fit.unaligned_efficiency)
        least = np.maximum(tiled.compute_us, bound)
        # A borrower's limit lies between a lender's bound and none, and is taken half way (as a ratio).
        return least if power.own else np.sqrt(tiled.compute_us * least)
    us = (tiled.spent / (fit.gflop_per_joule * 1e3) + _operand_uj(shapes, dtype, abilities)) / watts
    return np.maximum(tiled.compute_us, us / (1.0 + BOOST / (1.0 + us / BOOST_US)) if alone else us)


def _operand_uj(shapes: Products, dtype: str, abilities: Abilities) -> Floats:
    """Energy of the operands' and the output's way through DRAM, in microjoules."""
    elements = shapes.batch * (shapes.m * shapes.k + shapes.k * shapes.n + shapes.m * shapes.n)
    pj = PJ_PER_BYTE.get(abilities.profile.memory_kind or "", PJ_PER_BYTE_OF_GDDR)
    return np.asarray(DTYPE_BYTES[dtype] * elements * pj * 1e-6)


def _norm(left: Floats, right: Floats, power: float) -> Floats:
    """The larger of the two, or a little more where they are alike: the p-norm."""
    larger, smaller = np.maximum(left, right), np.minimum(left, right)
    return np.asarray(larger * (1.0 + (smaller / larger) ** power) ** (1.0 / power))


# The device's own measured squares ----------------------------------------


class _Correction(NamedTuple):
    """Measured over modelled time of squares, by the logarithm of their operations; ``smooth``: without outliers."""

    log_flops: Floats
    ratio: Floats
    smooth: Floats


NO_CORRECTION = _Correction(np.zeros(1), np.ones(1), np.ones(1))


def _by_curve(shapes: Products, dtype: str, abilities: Abilities) -> Floats:
    """What the measured squares say that the model does not: 1 without a curve.

    Shapes whose rows begin at 16 bytes get what squares of such sides showed, the others what the others did.  A
    square gets the curve as it was measured.  One square of 30 took 40 % longer than its neighbours on an A5000
    (N = 18136): other shapes take the median of the three points nearest.
    """
    curve = abilities.profile.measured.gemm
    if curve is None or dtype not in curve.us:
        return np.ones_like(shapes.flops)
    known = _corrections(abilities.profile, dtype)
    at = np.log(shapes.flops)
    sides = np.stack(np.broadcast_arrays(shapes.m, shapes.n, shapes.k))
    square = (sides.max(axis=0) < 1.5 * sides.min(axis=0)) & (shapes.batch == 1)
    exact, smooth = (
        np.where(shapes.aligned, *(np.interp(at, part.log_flops, part[column]) for part in known)) for column in (1, 2)
    )
    return np.where(square, exact, smooth)


@lru_cache(maxsize=64)
def _corrections(device: DeviceProfile, dtype: str) -> tuple[_Correction, _Correction]:
    """Of aligned squares and of the others, by the model of the device that was measured: a changed one is told by its
    own model, times what the model of the measured one misses."""
    device = device.as_measured
    curve = device.measured.gemm
    assert curve is not None
    without = device.model_copy(update={"measured": device.measured.model_copy(update={"gemm": None})})
    flops = np.array(curve.flops)
    side = np.round((flops / 2.0) ** (1.0 / 3.0))
    squares = products(np.ones_like(side), side, side, side, dtype)
    measured = net_us(curve.us[dtype], floor_us(device))
    ratio = measured / products_us(squares, dtype, abilities_of(without)).us
    # What is taken off for the call is known to some microseconds: short points show it, not the product.
    long = measured > LONG_BESIDE_CALL * (curve.us[dtype][0] - floor_us(device))
    aligned, others = (
        _correction(np.log(flops), ratio, long & chosen) for chosen in (squares.aligned, ~squares.aligned)
    )
    return aligned or others or NO_CORRECTION, others or aligned or NO_CORRECTION


def _correction(at: Floats, ratio: Floats, chosen: NDArray[np.bool_]) -> _Correction | None:
    if not chosen.any():
        return None
    ratio = ratio[chosen]
    first = np.clip(np.arange(len(ratio)) - 1, 0, max(len(ratio) - 3, 0))
    smooth = np.array([np.median(ratio[i : i + 3]) for i in first])
    return _Correction(at[chosen], ratio, smooth)


def gemm_cost(shapes: Products, dtype: str, abilities: Abilities) -> KernelCost:
    """Cost of the first product of ``shapes``, and who lent its calibration."""
    times = products_us(shapes, dtype, abilities)
    bound: Bound = "compute" if bool(times.computing[0]) else "memory"
    return priced(float(times.us[0]), floor_us(abilities.profile), bound, product_lender(dtype, abilities))


def call_us(shapes: Products, dtype: str, abilities: Abilities) -> Floats:
    """What device events around one call show besides the kernel: for float32, whose data are such calls."""
    call = abilities.call.fit
    if abilities.family(dtype) != "float32":
        return np.zeros_like(shapes.flops)
    return np.where(shapes.batch > 1, call.bmm or 0.0, call.linear or 0.0)


def product_lender(dtype: str, abilities: Abilities) -> str:
    """Which device lent the numbers of products in that dtype; empty where they are the device's own."""
    lent, curve = abilities.gemm(dtype), abilities.profile.measured.gemm
    own = lent.own or (curve is not None and dtype in curve.us)
    return "" if own else lent.device
