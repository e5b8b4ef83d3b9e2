"""Abilities: what a device reaches of its data sheet, where it is not calibrated itself lent by the nearest that is.

The nearest is, for each kind of number alone: a device of the same chip, then one of the same design (for products the
same architecture with SMs of a similar rate: a GA102 has twice the float32 lanes of a GA100, though both are Ampere;
for bytes the same kind of memory); then the one that offers its SMs the most similar rate (operations an SM for
products, bytes an SM for memory), because that is what decides how well an SM can be kept busy.  For float32 products,
and for the power that limits them, nobody is near whose chip is another: there the median of all counts that were
measured (of kernels, whose lanes are likewise their own or shared with integers).  Who lent what is said with every
cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from statistics import median
from typing import Generic, TypeVar

import msgspec

from sim.topology.calibration import AttentionFit, Calibration, CallTime, GemmFit, MemoryFit, PowerFit, RowFit, Spread
from sim.topology.device import DeviceProfile, load_device, shipped_devices

T = TypeVar("T")

# Energy per operation falls as (process / process)^0.67: the slope of float32 operations a second and watt in the data
# sheets of the 17 GPUs of topologies/devices (0.69 among those with HBM).  No measurement is in it.
PROCESS_EXPONENT = 0.67
# Rates of SMs this near (as a ratio) count as one design.
SIMILAR_RATE = math.log(1.5)
# NVIDIA Ampere GA102 and Ada whitepapers: one of an SM's two datapaths does float32 or integers.
SHARED_LANES = ((8, 6), (8, 7), (8, 9))
# NVIDIA Volta, Turing, Ampere and Hopper whitepapers: these have 32 float32 lanes a scheduler, which take one of its
# instructions every clock; V100, T4 and A100 have 16, which leave every second clock to loads and addresses.  A thread
# of the libraries' kernels has 64 multiply-adds beside 4 loads from shared memory and some 3 instructions more a step.
FULL_SCHEDULERS = (*SHARED_LANES, (9, 0), (10, 0), (12, 0))
FULL_SCHEDULER_SHARE = 0.9
# What of float32 products a median is taken of; the others are set, not measured.
PRODUCT_NUMBERS = ("efficiency", "operand_elements", "prologue_k", "tail", "split_us", "long_k_efficiency")
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
    products = by_key(lambda c: c.gemm, True)
    return Abilities(
        profile=profile,
        products={**products, "float32": _lanes(profile, everyone)},
        powers=_powers(profile, everyone),
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


_Order = tuple[bool, bool, bool, float, str]
_Distance = Callable[[DeviceProfile, DeviceProfile], _Order]


def _get(section: Callable[[Calibration], Mapping[str, T]], key: str, calibration: Calibration) -> T | None:
    return section(calibration).get(key)


def _products_distance(dtype: str, profile: DeviceProfile, other: DeviceProfile) -> _Order:
    apart = abs(math.log(_products_rate(dtype, other) / _products_rate(dtype, profile)))
    alike = other.architecture == profile.architecture and apart < SIMILAR_RATE
    return (other is not profile, other.chip != profile.chip, not alike, apart, other.name)


def _shares_lanes(profile: DeviceProfile) -> bool:
    """Whether half of an SM's float32 lanes compute integers too, so that loops take them from products."""
    return profile.capability in SHARED_LANES


def _memory_distance(profile: DeviceProfile, other: DeviceProfile) -> _Order:
    ours, theirs = (p.memory_bandwidth_gb_s / p.sms for p in (profile, other))
    alike = profile.memory_kind is not None and other.memory_kind == profile.memory_kind
    return (other is not profile, other.chip != profile.chip, not alike, abs(math.log(theirs / ours)), other.name)


def _products_rate(dtype: str, profile: DeviceProfile) -> float:
    rates = profile.tflops
    return (rates.get(dtype) or rates.get("float32") or max(rates.values())) / profile.sms


def _lanes(profile: DeviceProfile, everyone: Sequence[DeviceProfile]) -> Lent[GemmFit]:
    """Numbers of float32 products: the device's own, or what its chip has on another board.

    Else, of all that were measured and share their lanes with integers as it does (or do not), the median of each: a
    power limit hides part of what a kernel can, on one board more than on another.
    """
    known = [p for p in everyone if "float32" in p.calibration.gemm]
    nearest = min(known, key=partial(_products_distance, "float32", profile))
    fit = nearest.calibration.gemm["float32"]
    if nearest.chip == profile.chip:
        return Lent(fit, nearest.name, nearest is profile)
    alike = [p for p in known if _shares_lanes(p) == _shares_lanes(profile)] or [nearest]
    fits = [p.calibration.gemm["float32"] for p in alike]
    numbers = {name: median(getattr(each, name) for each in fits) for name in PRODUCT_NUMBERS}
    if profile.capability in FULL_SCHEDULERS and not any(p.capability in FULL_SCHEDULERS for p in alike):
        numbers["efficiency"] *= FULL_SCHEDULER_SHARE
    return Lent(fit.model_copy(update=numbers), _listed(p.name for p in alike), False)


def _listed(names: Iterable[str]) -> str:
    *others, last = sorted(names)
    return f"{', '.join(others)} and {last}" if others else last


def _powers(profile: DeviceProfile, everyone: Sequence[DeviceProfile]) -> dict[str, Lent[PowerFit]]:
    """The power limits by dtype."""
    dtypes = sorted({dtype for p in everyone for dtype in p.calibration.power})
    found = {dtype: _power(dtype, profile, everyone) for dtype in dtypes}
    return {dtype: power for dtype, power in found.items() if power is not None}


def _power(dtype: str, profile: DeviceProfile, everyone: Sequence[DeviceProfile]) -> Lent[PowerFit] | None:
    """The device's own limit, or what its chip has on another board.

    Else boards differ by more than their shapes tell, so the median of all that were measured counts, at the
    borrower's process: bounds among them, as long as somebody shows a limit.  Where nobody does, the nearest bound.
    """
    known = {p.name: p for p in everyone if dtype in p.calibration.power}
    if profile.name in known:
        return Lent(profile.calibration.power[dtype], profile.name, True)
    if not known or profile.kind == "cpu":  # all that lend are GPUs
        return None
    fits = {name: _at_process(p.calibration.power[dtype], p, profile) for name, p in known.items()}
    nearest = min(known.values(), key=partial(_products_distance, dtype, profile))
    if nearest.chip == profile.chip or all(fit.lower_bound for fit in fits.values()):
        return Lent(fits[nearest.name], nearest.name, False)
    rate = median(fit.gflop_per_joule for fit in fits.values())
    return Lent(PowerFit(source="median", data=_listed(fits), gflop_per_joule=rate), _listed(fits), False)


def _at_process(fit: PowerFit, lender: DeviceProfile, profile: DeviceProfile) -> PowerFit:
    """A lent power limit, with the energy of an operation at the borrower's manufacturing process."""
    if not lender.process_nm or not profile.process_nm:
        return fit
    scale = (lender.process_nm / profile.process_nm) ** PROCESS_EXPONENT
    return fit.model_copy(update={"gflop_per_joule": fit.gflop_per_joule * scale})
