"""The interval of a device that nobody measured, from the errors on devices that were left out whole.

What sets devices apart is known from few of them, so the interval of the next one is wider than theirs: between
devices the variance counts (1 + 1/n) times, at Student's t with n - 1 degrees of freedom in place of the normal
distribution's quantile (the prediction interval of one more observation); within a device it counts as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, sqrt
from typing import Any

import numpy as np

# Student's t at 0.9 by degrees of freedom (any table), and the normal distribution's.
T90 = {1: 3.078, 2: 1.886, 3: 1.638, 4: 1.533, 5: 1.476, 6: 1.440, 7: 1.415, 8: 1.397}
NORMAL90 = 1.2816
GRID = np.linspace(0.0025, 0.9975, 200)  # quantiles that stand for a device's shapes: every device weighs the same


def new_device_interval(ratios: Sequence[np.ndarray[Any, np.dtype[np.float64]]]) -> tuple[float, float]:
    """(p10, p90) of measured over predicted on one device more; an array of ratios for each of two devices or more."""
    errors = [np.log(each) for each in ratios]
    count = len(errors)
    assert count > 1, "one device tells nothing about how devices differ"
    between = float(np.var([error.mean() for error in errors], ddof=1))
    within = float(np.mean([error.var() for error in errors]))
    reach = T90[min(count - 1, max(T90))] / NORMAL90
    wider = sqrt((between * reach**2 * (1 + 1 / count) + within) / (between * (1 - 1 / count) + within))
    pooled = np.concatenate([np.quantile(error, GRID) for error in errors])
    low, middle, high = (float(q) for q in np.quantile(pooled, [0.1, 0.5, 0.9]))
    return exp(middle + (low - middle) * wider), exp(middle + (high - middle) * wider)


def by_device(judged: Sequence[tuple[str, np.ndarray[Any, np.dtype[np.float64]]]]) -> dict[str, Any]:
    """The ratios of each device together."""
    found: dict[str, list[Any]] = {}
    for device, ratio in judged:
        found.setdefault(device, []).append(ratio)
    return {device: np.concatenate(parts) for device, parts in found.items()}
