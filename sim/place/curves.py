"""Measured curves: time against work, read between the points.

A microbenchmark's time per call holds a constant besides the kernel: event records and launch latency.  The
smallest point of a curve, where there is nearly no work, shows it; it is taken off every point, because the
replay models the launch itself.  On the A5000 the constant is 10 to 14 us for one GEMM and for two copies alike, and
with it taken off the copies keep one bandwidth from 25 MB to 17 GB, which is what says that it is a constant.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def net_us(times_us: Sequence[float], floor_us: float) -> Floats:
    """The times without the constant that the smallest point shows, never below ``floor_us``."""
    overhead = max(times_us[0] - floor_us, 0.0)
    return np.maximum(np.asarray(times_us, dtype=np.float64) - overhead, floor_us)


def curve_us(work: Floats, points: Sequence[float], times_us: Sequence[float], floor_us: float) -> Floats:
    """Time of each ``work`` (flops or bytes) on a curve in microseconds, never below ``floor_us``.

    Between points it is a straight line in logarithms; beyond the last point the last rate goes on.
    """
    net = net_us(times_us, floor_us)
    inside = np.exp(np.interp(np.log(np.maximum(work, 1e-9)), np.log(points), np.log(net)))
    beyond = net[-1] * work / points[-1]
    return np.where(work >= points[-1], beyond, np.where(work <= points[0], floor_us, inside))


def kernel_us(work: float, points: Sequence[float], times_us: Sequence[float], floor_us: float) -> float:
    """``curve_us`` of one work."""
    return float(curve_us(np.asarray([work], dtype=np.float64), points, times_us, floor_us)[0])
