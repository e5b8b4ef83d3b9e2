"""Measured curves: time against work, read between the points.

A microbenchmark's time per call holds a constant besides the kernel: event records and launch latency.  The
smallest point of a curve, where there is nearly no work, shows it; it is taken off every point, because the
replay models the launch itself.  On the A5000 the constant is 10 to 14 us for one GEMM and for two copies alike, and
with it taken off the copies keep one bandwidth from 25 MB to 17 GB, which is what says that it is a constant.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def kernel_us(work: float, points: Sequence[float], times_us: Sequence[float], floor_us: float) -> float:
    """Time of ``work`` (flops or bytes) on a curve in microseconds, never below ``floor_us``.

    Between points it is a straight line in logarithms; beyond the last point the last rate goes on.
    """
    overhead = max(times_us[0] - floor_us, 0.0)
    net = np.maximum(np.asarray(times_us) - overhead, floor_us)
    if work >= points[-1]:
        return float(net[-1] * work / points[-1])
    if work <= points[0]:
        return floor_us
    return float(np.exp(np.interp(np.log(work), np.log(points), np.log(net))))
