"""Measurements: what microbenchmarks of a machine showed, as plain frozen data; the rooms that take and use them
know each other only by this.

A sample is one thing timed: ``section`` and ``what`` name it (``gemm``, ``float32``), ``sizes`` are its sizes
(batch, m, n, k), ``us`` is the median microseconds of a call and ``us_p10`` and ``us_p90`` the spread of its
repeats.  The journal, a file of one JSON line a sample, is both the partial result of a run that was killed and the
round trip of the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import msgspec

from sim.errors import InputError

FORMAT = "tracesim.measurements/1"

# What can be measured, and chosen by --only; links only with --links.
SECTIONS: dict[str, str] = {
    "host": "what the CPU takes to issue an operator, and to call one",
    "launch": "shortest kernel, launch latency, turn-around of the stream",
    "gemm": "matrix products over a grid of shapes and dtypes",
    "copy": "copies on the device, to and from the host, and between devices",
    "elementwise": "elementwise operators by bytes",
    "softmax": "softmax by rows and columns",
    "layer_norm": "layer norm by rows and columns",
    "attention": "fused attention, forward and backward",
    "links": "collectives over 2 to all devices",
}


class Sample(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing timed: median of ``repeats`` batches of ``calls`` calls each, in microseconds a call.

    ``disturbed``: batches beside these in which another process took a CPU from this one.
    """

    section: str
    what: str
    sizes: tuple[int, ...]
    us: float
    us_p10: float
    us_p90: float
    repeats: int = 1
    calls: int = 1
    disturbed: int = 0

    @property
    def key(self) -> tuple[str, str, tuple[int, ...]]:
        """What it is a measurement of."""
        return self.section, self.what, self.sizes


class Device(msgspec.Struct, frozen=True, omit_defaults=True):
    """A device as its driver (or the operating system) describes it; None where it does not say."""

    kind: Literal["gpu", "cpu"]
    full_name: str
    count: int
    units: int
    """SMs, or cores."""
    memory_bytes: int
    l2_bytes: int
    capability: tuple[int, int] | None = None
    clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    bus_bits: int | None = None
    power_limit_w: float | None = None
    pcie_generation: int | None = None
    pcie_lanes: int | None = None


class Machine(msgspec.Struct, frozen=True, omit_defaults=True):
    """What was measured, with what, when: the provenance of every number.

    ``topology``: what ``nvidia-smi topo -m`` printed; ``load``: the operating system's one-minute load average before
    anything was measured (more than a few tenths: others were using the machine).
    """

    device: Device
    cpu_name: str
    cpus: int
    cpu_vendor: Literal["intel", "amd", "arm", "unknown"]
    versions: dict[str, str]
    command: str
    date: str
    load: float
    threads: int = 1
    topology: str = ""
    clocks: str = ""
    gpus: tuple[int, ...] = ()
    """What nvidia-smi calls the GPUs, in CUDA's order; nothing where it is not known."""
    others: tuple[str, ...] = ()
    """GPUs of other names, which are left out."""

    def same_as(self, other: Machine) -> bool:
        """Whether measurements of both may stand in one profile: the same device, host and software."""
        return (self.device, self.cpu_name, self.versions, self.threads) == (
            other.device, other.cpu_name, other.versions, other.threads,
        )  # fmt: skip


class Measurements(msgspec.Struct, frozen=True):
    """A machine and all samples of it, by key, in the order they were taken."""

    machine: Machine
    samples: tuple[Sample, ...]

    def of(self, section: str, what: str | None = None) -> tuple[Sample, ...]:
        """The samples of a section (and of one thing in it), by sizes."""
        chosen = (s for s in self.samples if s.section == section and what in (None, s.what))
        return tuple(sorted(chosen, key=lambda s: (s.what, s.sizes)))

    def whats(self, section: str) -> tuple[str, ...]:
        """What a section holds samples of."""
        return tuple(sorted({s.what for s in self.samples if s.section == section}))

    def us(self, section: str, what: str, sizes: tuple[int, ...] = ()) -> float | None:
        """The median of one sample, or None where it was not taken."""
        return next((s.us for s in self.samples if s.key == (section, what, sizes)), None)


class _Header(msgspec.Struct, frozen=True):
    format: str
    machine: Machine


def header_line(machine: Machine) -> bytes:
    """The first line of a journal."""
    return msgspec.json.encode(_Header(FORMAT, machine)) + b"\n"


def sample_lines(samples: Iterable[Sample]) -> bytes:
    """Lines of a journal."""
    return b"".join(msgspec.json.encode(sample) + b"\n" for sample in samples)


def read(path: Path) -> Measurements:
    """A journal; a last line that a kill cut off is left out.  InputError where it is none."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})") from None
    if not lines:
        raise InputError(path, "holds no measurements: it is empty; remove it")
    try:
        header = msgspec.json.decode(lines[0], type=_Header)
    except msgspec.DecodeError as error:
        raise InputError(path, f"line 1: holds no measurements ({error}); remove it") from None
    if header.format != FORMAT:
        raise InputError(path, f"line 1: is of format {header.format!r}, this version reads {FORMAT!r}; remove it")
    return Measurements(header.machine, tuple(_samples(path, lines[1:])))


def _samples(path: Path, lines: list[bytes]) -> Iterator[Sample]:
    for number, line in enumerate(lines, start=2):
        try:
            yield msgspec.json.decode(line, type=Sample)
        except msgspec.DecodeError as error:
            if number == len(lines) + 1 and not line.endswith(b"\n"):
                return
            raise InputError(path, f"line {number}: is no measurement ({error}); remove the file") from None
