"""Fitting a few numbers of a model: coordinate descent on a loss, the same every time; and calibrations put into a
profile for a try."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.topology.calibration import Calibration
from sim.topology.device import DeviceProfile

Floats = NDArray[np.float64]

HELD_OUT = 5
ROUNDS = 24
FIRST_STEP, SHRINKING = 0.4, 0.82


def held_out(*sizes: object) -> bool:
    """Whether a shape is left out of every fit: one in five, by the CRC-32 of its sizes."""
    return _crc(sizes) % HELD_OUT == 0


def folds(groups: Sequence[tuple[object, ...]]) -> NDArray[np.int64]:
    """Which fifth each sample is in: samples of one group together, the groups dealt out by their CRC-32."""
    dealt = {group: i % HELD_OUT for i, group in enumerate(sorted(set(groups), key=lambda g: (_crc(g), g)))}
    return np.array([dealt[group] for group in groups], dtype=np.int64)


def _crc(sizes: Sequence[object]) -> int:
    return zlib.crc32(",".join(map(str, sizes)).encode())


def holding(ratios: Floats, share: float) -> tuple[float, float]:
    """Between which two of so many ratios one more of their kind lies with that probability, half of the rest on either
    side: the ends are drawn from n + 1 places and not from n (conformal prediction: Vovk, Gammerman and Shafer,
    Algorithmic Learning in a Random World, 2005)."""
    ordered, tail = np.sort(ratios), (1 - share) / 2
    place = max(tail * (len(ordered) + 1) - 1, 0.0)  # from either end, the first is 0; between two where it falls so
    places = np.arange(len(ordered))
    return float(np.interp(place, places, ordered)), float(np.interp(len(ordered) - 1 - place, places, ordered))


def errors(predicted: Floats, measured: Floats) -> Floats:
    """Relative errors, without their signs."""
    return np.asarray(np.abs(predicted / measured - 1.0))


def descend(
    start: Mapping[str, float], loss: Callable[[dict[str, float]], float], limits: Mapping[str, tuple[float, float]]
) -> dict[str, float]:
    """One number after another up or down by a step that shrinks, as long as the loss falls; three figures."""
    best, values, step = loss(dict(start)), dict(start), FIRST_STEP
    for _ in range(ROUNDS):
        for name, (low, high) in limits.items():
            for factor in (1 + step, 1 / (1 + step)):
                tried = {**values, name: min(max(values[name] * factor, low), high)}
                value = loss(tried)
                if value < best:
                    best, values = value, tried
        step *= SHRINKING
    return {name: float(f"{value:.3g}") for name, value in values.items()}


def with_block(profile: DeviceProfile, **sections: Any) -> DeviceProfile:
    """A profile with sections of its calibration replaced (plain data, checked)."""
    data = profile.calibration.model_dump()
    for section, value in sections.items():
        data[section] = {**data[section], **value} if isinstance(data.get(section), dict) else value
    return profile.model_copy(update={"calibration": Calibration.model_validate(data)})
