"""What a device borrows: of kernels that its own profile is not calibrated for, whose efficiencies price them; and of
products in a dtype that its profile has no rate for, that float32's is taken."""

from __future__ import annotations

from collections import Counter

from sim.ops import Work
from sim.place.doubt import NAMES, op_class
from sim.topology.abilities import family
from sim.topology.device import DeviceProfile

# Classes of kernels whose arithmetic runs at the rate of a dtype.
RATED = ("gemm_float16", "gemm_float32", "attention", "convolution")


class Borrowed:
    """Counts kernels by device: by who lends it the efficiencies and by their class, and by a dtype without a rate."""

    def __init__(self) -> None:
        self._lent: dict[DeviceProfile, Counter[tuple[str, str]]] = {}
        self._unrated: dict[DeviceProfile, Counter[str]] = {}

    def add(self, profile: DeviceProfile, lender: str, work: Work) -> None:
        """One more kernel.  ``lender``: empty where the device's own calibration prices it."""
        kernels = op_class(work)
        dtype = next((t.dtype for t in work.inputs if t.dtype), "float32")
        if kernels in RATED and dtype not in profile.tflops:
            self._unrated.setdefault(profile, Counter())[dtype] += 1
            kernels = kernels.replace(family(dtype), "float32")
        if lender:
            self._lent.setdefault(profile, Counter())[lender, kernels] += 1

    def told(self) -> tuple[str, ...]:
        """A sentence for each device and kind of borrowing, what most kernels are priced by first."""
        return (*(_lent(*item) for item in self._lent.items()), *(_unrated(*item) for item in self._unrated.items()))


def _lent(profile: DeviceProfile, counts: Counter[tuple[str, str]]) -> str:
    lenders: dict[str, Counter[str]] = {}
    for (lender, kernels), count in counts.items():
        lenders.setdefault(lender, Counter())[NAMES[kernels]] += count
    ordered = sorted(lenders.items(), key=lambda item: (-item[1].total(), item[0]))
    parts = (f"from {lender} for {_listed(kernels)}" for lender, kernels in ordered)
    unlike = "; a GPU's say little of a CPU: `tracesim calibrate` measures this one" if profile.kind == "cpu" else ""
    return f"{profile.full_name} borrows efficiencies {'; '.join(parts)}{unlike}"


def _unrated(profile: DeviceProfile, counts: Counter[str]) -> str:
    return f"{profile.full_name} has no rate in its profile for kernels of {_listed(counts)}: estimated as float32"


def _listed(kernels: Counter[str]) -> str:
    ordered = sorted(kernels.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} ({count})" for name, count in ordered)
