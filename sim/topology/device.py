"""Device profiles: what one GPU (or CPU) can do, from its data sheet and, where there are any, from measurements.

A profile is ``topologies/devices/NAME.yaml``.  GB is 10^9 bytes, GiB is 2^30, rates are dense (no sparsity), link
rates are totals over a device's links in one direction.  Every block of numbers carries its source.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from sim.errors import InputError, UnknownNameError
from sim.topology.calibration import Calibration
from sim.topology.fields import Count, Dtype, FileModel, Positive, Text, Time
from sim.topology.problems import problems_of
from sim.topology.yaml_file import read_named, shipped_names
from sim.yaml_text import parse_yaml

__all__ = [
    "Count", "DeviceProfile", "FileModel", "Positive", "Text", "Time", "check_length", "check_rising", "find_device",
    "load_device", "read_device", "shipped_devices", "validate_device",
]  # fmt: skip


class Pcie(FileModel):
    """The slot: generation and lanes."""

    generation: Annotated[int, Field(ge=1, le=7)]
    lanes: Count


class Nvlink(FileModel):
    """NVLink ports.  ``bandwidth_gb_s`` is the total over all links in one direction.

    ``fabric``: what the ports can be joined to (a bridge joins two cards, sxm boards reach an NVSwitch or a mesh).
    """

    links: Count
    bandwidth_gb_s: Positive
    fabric: Literal["bridge", "sxm"]


class Launch(FileModel):
    """Times around one kernel, in microseconds.

    ``kernel_floor_us``: the shortest a kernel lasts; ``launch_latency_us``: from the begin of the launching call to
    the kernel's begin on an idle stream; ``kernel_gap_us``: the stream's own turn-around between queued kernels.
    """

    source: Text
    kernel_floor_us: Time | None = None
    launch_latency_us: Time | None = None
    kernel_gap_us: Time | None = None


class GemmCurve(FileModel):
    """Measured times of square matrix products: ``us[dtype][i]`` for ``flops[i]`` (2 N^3) floating-point operations."""

    source: Text
    what: str = ""
    shape: Literal["square"] = "square"
    flops: tuple[Positive, ...]
    us: dict[Dtype, tuple[Positive, ...]]

    @model_validator(mode="after")
    def _same_length(self) -> GemmCurve:
        check_rising("flops", self.flops)
        for dtype, times in self.us.items():
            check_length(f"us.{dtype}", times, len(self.flops))
        return self


class CopyCurve(FileModel):
    """Measured copies on the device: ``us[i]`` for ``bytes_moved[i]`` bytes read plus written by ``copies`` copies."""

    source: Text
    what: str = ""
    copies: Count = 1
    bytes_moved: tuple[Positive, ...]
    us: tuple[Positive, ...]

    @model_validator(mode="after")
    def _same_length(self) -> CopyCurve:
        check_rising("bytes_moved", self.bytes_moved)
        check_length("us", self.us, len(self.bytes_moved))
        return self


def check_rising(key: str, values: tuple[float, ...]) -> None:
    """A curve needs at least one point, and its places must rise."""
    if not values:
        raise ValueError(f"{key} must have at least one value")
    if any(b <= a for a, b in pairwise(values)):
        raise ValueError(f"{key} must rise from value to value")


def check_length(key: str, values: tuple[float, ...], length: int) -> None:
    """A curve has a value for each of its places."""
    if len(values) != length:
        raise ValueError(f"{key} must have {length} values, found {len(values)}")


class Measured(FileModel):
    """Curves measured on this very device."""

    gemm: GemmCurve | None = None
    copy_: CopyCurve | None = Field(default=None, alias="copy")


class DeviceProfile(FileModel):
    """One device.  ``tflops`` are dense data-sheet rates by torch dtype; tensor-core dtypes accumulate in float32.

    ``memory_kind``: HBM carries its error correction beside the data; server cards with GDDR switch on one that takes
    part of the bandwidth, workstation and consumer cards do not.  ``process_nm`` is the family of the manufacturing
    process; energy per operation follows it.
    """

    name: Text
    full_name: Text
    kind: Literal["gpu", "cpu"] = "gpu"
    aliases: tuple[Text, ...] = ()
    architecture: Text
    chip: Text
    compute_capability: Annotated[str, Field(pattern=r"^\d+\.\d+$")] | None = None
    source: Text
    note: str = ""
    sms: Count
    memory_gib: Annotated[Positive, Field(le=1e6)]
    memory_bandwidth_gb_s: Positive
    memory_kind: Literal["hbm", "gddr", "gddr with ecc"] | None = None
    l2_mib: Positive
    tflops: Annotated[dict[Dtype, Positive], Field(min_length=1)]
    tdp_w: Positive | None = None
    process_nm: Positive | None = None
    pcie: Pcie | None = None
    pcie_p2p: bool = True
    nvlink: Nvlink | None = None
    launch: Launch | None = None
    measured: Measured = Measured()
    calibration: Calibration = Calibration()
    _before: DeviceProfile | None = PrivateAttr(default=None)

    def changed_from(self, before: DeviceProfile) -> DeviceProfile:
        """This profile, which remembers what it was before some of its values were replaced."""
        made = self.model_copy()
        made._before = before
        return made

    @property
    def as_measured(self) -> DeviceProfile:
        """The device that the measured curves are of: this one, without the values that were replaced."""
        return self if self._before is None else self._before.model_copy(update={"measured": self.measured})

    def __hash__(self) -> int:
        """By name and source; equality compares everything, so what is computed from a profile can be kept."""
        return hash((self.name, self.source))

    @property
    def memory_bytes(self) -> int:
        """Device memory in bytes."""
        return round(self.memory_gib * (1 << 30))

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability as numbers; (0, 0) for a CPU."""
        if self.compute_capability is None:
            return (0, 0)
        major, minor = self.compute_capability.split(".")
        return int(major), int(minor)


def shipped_devices() -> tuple[str, ...]:
    """Names of the device profiles that ship with the project."""
    return shipped_names("devices")


def load_device(name: str, changes: Mapping[str, object] | None = None) -> DeviceProfile:
    """The profile of that name (or in that file), with top-level keys replaced by ``changes``.

    UnknownNameError with the nearest names; InputError with every problem of the file.
    """
    data, where = read_device(name)
    return validate_device({**data, **(changes or {})}, where)


def read_device(name: str) -> tuple[dict[str, object], str]:
    """The raw mapping of a profile, and what to call its file."""
    text, where = read_named("device", name, "devices")
    return parse_yaml(text, where), where


def validate_device(data: Mapping[str, object], where: str) -> DeviceProfile:
    """The mapping as a profile; InputError with every problem at once."""
    try:
        return DeviceProfile.model_validate(data)
    except ValidationError as error:
        raise InputError(where, "; ".join(problems_of(error, DeviceProfile))) from None


@cache
def _devices_by_full_name() -> dict[str, str]:
    names: dict[str, str] = {}
    for name in shipped_devices():
        profile = load_device(name)
        for full_name in (profile.full_name, *profile.aliases):
            names[full_name] = name
    return names


@cache
def find_device(full_name: str) -> DeviceProfile:
    """The shipped profile of a device as CUDA names it ("NVIDIA RTX A5000"), or by its profile name.

    UnknownNameError where no profile says that it is this device: an unknown GPU never becomes another one.
    """
    if full_name in shipped_devices():
        return load_device(full_name)
    by_name = _devices_by_full_name()
    if full_name in by_name:
        return load_device(by_name[full_name])
    raise UnknownNameError("device", full_name, by_name, "a profile's `aliases` may name it")
