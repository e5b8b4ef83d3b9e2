"""Abilities: what a device reaches of its data sheet, where it is not calibrated itself lent by the nearest that is.

The nearest is, for each kind of number alone: a device of the same chip, then one of the same design (for products the
same architecture with SMs of a similar rate: a GA102 has twice the float32 lanes of a GA100, though both are Ampere;
for bytes the same kind of memory); then for float32 products one whose lanes are likewise their own or shared with
integers, a board with HBM for one with HBM (others hide their lanes behind a power limit), and one before Ampere for
one before Ampere (whose kernels the libraries keep); then the one that offers its SMs the most similar rate (operations
an SM for products, bytes an SM for memory), because that is what decides how well an SM can be kept busy.  Who lent
what is said with every cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from statistics import median
from typing import Generic, TypeVar

import msgspec

from sim.topology.calibration import AttentionFit, Calibration, CallTime, GemmFit, MemoryFit, PowerFit, RowFit, Spread
from sim.topology.device import DeviceProfile, load_device, shipped_devices

T = TypeVar("T")

# Energy per operation falls as (process / process)^0.61: the long float32 products of T4 (12 nm), A100 PCIe (7 nm) and
# L4 (4 nm) settle at their power limits (the power blocks of their profiles) at 54, 70 and 106 GFLOP/J: 0.61 from the
# first to the last, 0.47 and 0.74 between neighbours.  docs/kernels.md, "Power".
PROCESS_EXPONENT = 0.61
# Rates of SMs this near (as a ratio) count as one design.
SIMILAR_RATE = math.log(1.5)
# NVIDIA Ampere GA102 and Ada whitepapers: one of an SM's two datapaths does float32 or integers.
SHARED_LANES = ((8, 6), (8, 7), (8, 9))
# Measured over predicted where nothing of its kind was ever measured: assumed, nobody knows.
UNKNOWN = (0.5, 2.0)
# The families of dtypes that run on the same units, and so on the same kernels.
FAMILY = {"bfloat16": "float16", "tfloat32": "float16", "float8_e4m3fn": "float16", "float8_e5m2": "float16"}


class Lent(msgspec.Struct, Generic[T], frozen=True):
    """Numbers of a calibration and the device they were fitted on; ``own`` where it is the very device."""

    fit: T
    device: str
    own: bool


class Abilities(msgspec.Struct, frozen=True):
    """A device profile and all calibrations that apply to it, its own or lent."""

    profile: DeviceProfile
    products: dict[str, Lent[GemmFit]]
    powers: dict[str, Lent[PowerFit]]
    rows: dict[str, Lent[RowFit]]
    spreads: dict[str, Lent[Spread]]
    memory: Lent[MemoryFit]
    attention: Lent[AttentionFit]
    call: Lent[CallTime]

    def gemm(self, dtype: str) -> Lent[GemmFit]:
        """For products of that dtype; float32's where its family is not calibrated at all or the device lacks it."""
        return self.products.get(self.family(dtype)) or self.products["float32"]

    def power(self, dtype: str) -> Lent[PowerFit] | None:
        """The power limit's rate for that dtype."""
        return self.powers.get(self.family(dtype))

    def family(self, dtype: str) -> str:
        """The dtype whose kernels compute it here: float32 where the data sheet has no rate for it."""
        return family(dtype) if dtype in self.profile.tflops else "float32"

    def interval(self, name: str) -> tuple[float, float, bool]:
        """Measured over predicted of a class of kernels (a key of ``spreads``), 10th and 90th percentile, and whether
        the device's own level is measured: then what is left is how shapes differ, on it or on its nearest kin."""
        lent = self.spreads[name]
        known = lent.own or self._measured_itself(name)
        if not known and self.profile.kind == "cpu":  # all that lend are GPUs
            return (*UNKNOWN, False)
        low, high = (lent.fit.p10, lent.fit.p90) if known else (lent.fit.borrowed_p10, lent.fit.borrowed_p90)
        return low, high, known

    def _measured_itself(self, name: str) -> bool:
        """Whether a curve or fit of the device itself sets the level of that class."""
        dtype = name.removeprefix("gemm_")
        if dtype != name:
            curve = self.profile.measured.gemm
            own = dtype in self.products and self.products[dtype].own
            return own or (curve is not None and any(family(each) == dtype for each in curve.us))
        return self.memory.own if name == "elementwise" else False

    def tflops(self, dtype: str) -> float:
        """The data sheet's dense rate; a dtype without a rate of its own runs at float32's."""
        rates = self.profile.tflops
        return rates.get(dtype) or rates.get("float32") or max(rates.values())


def family(dtype: str) -> str:
    """The dtype whose kernels are calibrated: float16 for tensor-core dtypes, float32 for the rest."""
    name = FAMILY.get(dtype, dtype)
    return name if name == "float16" else "float32"


@lru_cache(maxsize=128)
def abilities_of(profile: DeviceProfile) -> Abilities:
    """A profile's abilities, with the shipped calibrated devices as lenders."""
    return resolve(profile, shipped_lenders())


@lru_cache(maxsize=1)
def shipped_lenders() -> tuple[DeviceProfile, ...]:
    """The shipped profiles that are calibrated, in the order of their names."""
    profiles = (load_device(name) for name in shipped_devices())
    return tuple(p for p in profiles if p.calibration != Calibration())


def resolve(profile: DeviceProfile, lenders: Sequence[DeviceProfile]) -> Abilities:
    """All calibrations that apply to ``profile``: its own first, else those of the nearest of ``lenders``."""
    everyone = [profile, *(lender for lender in lenders if lender.name != profile.name)]

    def lent(section: Callable[[Calibration], T | None], distance: _Distance) -> Lent[T] | None:
        able = [(p, found) for p in everyone if (found := section(p.calibration)) is not None]
        if not able:
            return None
        lender, fit = min(able, key=lambda pair: distance(profile, pair[0]))
        return Lent(fit, lender.name, lender is profile)

    def by_key(section: Callable[[Calibration], Mapping[str, T]], of_products: bool) -> dict[str, Lent[T]]:
        found: dict[str, Lent[T]] = {}
        for key in sorted({key for p in everyone for key in section(p.calibration)}):
            distance = partial(_products_distance, key) if of_products else _memory_distance
            one = lent(partial(_get, section, key), distance)
            assert one is not None
            found[key] = one
        return found

    memory = lent(lambda c: c.memory, _memory_distance)
    attention = lent(lambda c: c.attention, partial(_products_distance, "float16"))
    assert memory and attention, "the shipped profiles calibrate memory and attention"
    limits = {key for p in everyone for key, fit in p.calibration.power.items() if not fit.lower_bound}

    def power_limits(calibration: Calibration) -> Mapping[str, PowerFit]:
        """Limits that showed; lower bounds only where none did, or where they are the device's own."""
        mine = calibration is profile.calibration
        return {k: fit for k, fit in calibration.power.items() if mine or not fit.lower_bound or k not in limits}

    powers = by_key(power_limits, True)
    return Abilities(
        profile=profile,
        products=by_key(lambda c: c.gemm, True),
        powers={dtype: _at_process(power, profile, lenders) for dtype, power in powers.items()},
        rows=by_key(lambda c: c.rows, False),
        spreads=by_key(lambda c: c.spread, False),
        memory=memory,
        attention=attention,
        call=_call(profile, lenders),
    )


def _call(profile: DeviceProfile, lenders: Sequence[DeviceProfile]) -> Lent[CallTime]:
    """The host's part of a timed call: no GPU is near another in it, so what was not measured with this device is the
    median of all hosts that were measured."""
    own = profile.calibration.call
    others = [p.calibration.call for p in lenders if p.calibration.call is not None and p.name != profile.name]
    medians: dict[str, float] = {}
    for name in ("elementwise", "softmax", "layer_norm", "linear", "bmm"):
        times = [time for call in others if (time := getattr(call, name)) is not None]
        if times and (own is None or getattr(own, name) is None):
            medians[name] = median(times)
    assert own or others, "the shipped profiles calibrate calls"
    if own is None and profile.kind == "cpu":  # there the kernel is the call
        return Lent(CallTime(source="none", data="none", elementwise=0, softmax=0, layer_norm=0), profile.name, False)
    if own is not None:
        return Lent(own.model_copy(update=medians), profile.name, True)
    return Lent(others[0].model_copy(update=medians), "median", False)


_Order = tuple[bool, bool, bool, int, float, str]
_Distance = Callable[[DeviceProfile, DeviceProfile], _Order]


def _get(section: Callable[[Calibration], Mapping[str, T]], key: str, calibration: Calibration) -> T | None:
    return section(calibration).get(key)


def _products_distance(dtype: str, profile: DeviceProfile, other: DeviceProfile) -> _Order:
    apart = abs(math.log(_products_rate(dtype, other) / _products_rate(dtype, profile)))
    alike = other.architecture == profile.architecture and apart < SIMILAR_RATE
    unlike = 0
    if family(dtype) == "float32":
        tests = (_shares_lanes, _has_hbm, _before_ampere)  # what matters most first
        unlike = sum(weight * (test(profile) != test(other)) for weight, test in zip((4, 2, 1), tests, strict=True))
    return (other is not profile, other.chip != profile.chip, not alike, unlike, apart, other.name)


def _shares_lanes(profile: DeviceProfile) -> bool:
    """Whether half of an SM's float32 lanes compute integers too, so that loops take them from products."""
    return profile.capability in SHARED_LANES


def _has_hbm(profile: DeviceProfile) -> bool:
    return profile.memory_kind == "hbm"


def _before_ampere(profile: DeviceProfile) -> bool:
    """The libraries' kernels for these cannot copy to shared memory beside products (cp.async)."""
    return profile.capability < (8, 0)


def _memory_distance(profile: DeviceProfile, other: DeviceProfile) -> _Order:
    ours, theirs = (p.memory_bandwidth_gb_s / p.sms for p in (profile, other))
    alike = profile.memory_kind is not None and other.memory_kind == profile.memory_kind
    return (other is not profile, other.chip != profile.chip, not alike, 0, abs(math.log(theirs / ours)), other.name)


def _products_rate(dtype: str, profile: DeviceProfile) -> float:
    rates = profile.tflops
    return (rates.get(dtype) or rates.get("float32") or max(rates.values())) / profile.sms


def _at_process(power: Lent[PowerFit], profile: DeviceProfile, lenders: Sequence[DeviceProfile]) -> Lent[PowerFit]:
    """A lent power limit, with the energy of an operation at the borrower's manufacturing process."""
    lender = next((p for p in lenders if p.name == power.device), profile)
    if power.own or not lender.process_nm or not profile.process_nm:
        return power
    scale = (lender.process_nm / profile.process_nm) ** PROCESS_EXPONENT
    fit = power.fit.model_copy(update={"gflop_per_joule": power.fit.gflop_per_joule * scale})
    return Lent(fit, power.device, False)
