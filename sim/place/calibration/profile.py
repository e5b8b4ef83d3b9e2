"""A device profile from measurements: the data sheet where a shipped profile knows the device, what the driver says
where none does, and everything measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import yaml

from sim.errors import UnknownNameError
from sim.measurements import Device, Machine, Measurements, Sample
from sim.place.calibration.fit import Judged, fit
from sim.topology.device import DeviceProfile, find_device, read_device, validate_device
from sim.units import GIB, MIB

Data = dict[str, Any]

# Dense operations a clock of one SM: float32 lanes x 2, and tensor cores with float32 accumulation (NVIDIA's
# architecture whitepapers of V100, T4, A100, GA102, AD102, H100: the data-sheet rates of topologies/devices are these
# times SMs and boost clock).
LANE_FLOPS = {(7, 0): 128, (7, 5): 128, (8, 0): 128, (8, 6): 256, (8, 9): 256, (9, 0): 256}
HALF_FLOPS = {(7, 0): 1024, (7, 5): 1024, (8, 0): 2048, (8, 6): 1024, (8, 9): 1024, (9, 0): 4096}
ARCHITECTURES = {(7, 0): "Volta", (7, 5): "Turing", (8, 0): "Ampere", (8, 6): "Ampere", (8, 9): "Ada", (9, 0): "Hopper"}
LEAST_CURVE = 3


class Profiled(NamedTuple):
    """The profile, as plain data and checked, and how near its models come to samples that no fit saw."""

    data: Data
    profile: DeviceProfile
    judged: tuple[Judged, ...]


def profile_of(taken: Measurements, name: str) -> Profiled:
    """The profile named ``name``.  The same measurements give the same profile."""
    source = provenance(taken.machine)
    data = _device(taken, name, source)
    bare = validate_device(data, name)
    fitted = fit(bare, taken, source)
    if fitted.block:
        data["calibration"] = fitted.block
    return Profiled(data, validate_device(data, name), fitted.judged)


def provenance(machine: Machine) -> str:
    """On what, with what and when, in one line."""
    device, versions = machine.device, machine.versions
    with_what = [f"torch {versions.get('torch', '?')}"]
    with_what += [f"{key} {versions[key]}" for key in ("cuda", "driver", "nccl") if key in versions]
    timer = "device events" if device.kind == "gpu" else "CPU time" if machine.threads == 1 else "perf_counter_ns"
    host = f" in a host with {machine.cpus} CPUs {machine.cpu_name}" if device.kind == "gpu" else ""
    idle = f", load average before {machine.load:g}" if device.kind == "cpu" else ""
    clocks = f", {machine.clocks}" if machine.clocks else ""
    return (
        f"measured on {device.full_name}{host}, {', '.join(with_what)}, {machine.date}, medians by {timer}"
        f"{idle}{clocks}: {machine.command}"
    )


def as_yaml(data: Mapping[str, Any], head: str) -> str:
    """Plain data as a file that people read, after a comment."""
    text: str = yaml.safe_dump(dict(data), sort_keys=False, width=112, default_flow_style=None, allow_unicode=True)
    return f"# {head}\n{text}"


# The device ----------------------------------------


def _device(taken: Measurements, name: str, source: str) -> Data:
    known = _data_sheet(taken.machine.device)
    data = known if known is not None else _described(taken, source)
    data |= {"name": name}
    for measured in ("launch", "measured", "calibration"):
        data.pop(measured, None)
    launch = _launch(taken, source)
    if launch is not None:
        data["launch"] = launch
    curves = {"gemm": _squares(taken, source), "copy": _copies(taken, source)}
    data["measured"] = {key: curve for key, curve in curves.items() if curve is not None}
    return data


def _data_sheet(device: Device) -> Data | None:
    """Of the shipped profile that says it is this device; its name in CUDA is kept."""
    if device.kind == "cpu":
        return None
    try:
        shipped = find_device(device.full_name)
    except UnknownNameError:
        return None
    data, _ = read_device(shipped.name)
    rest = [alias for alias in (shipped.full_name, *shipped.aliases) if alias != device.full_name]
    return {**data, "full_name": device.full_name, "aliases": rest}


def _described(taken: Measurements, source: str) -> Data:
    """Of a device that no data sheet is here for: what its driver says, and no less than what was measured."""
    device = taken.machine.device
    rates, how = _rates(taken)
    bandwidth, streams = _bandwidth(taken)
    data: Data = {
        "name": "",
        "full_name": device.full_name,
        "kind": device.kind,
        "architecture": _architecture(taken.machine),
        "chip": device.full_name,
        "source": source,
        "note": f"no data sheet: tflops {how}; memory_bandwidth_gb_s {streams}",
        "sms": device.units,
        "memory_gib": round(device.memory_bytes / GIB, 2),
        "memory_bandwidth_gb_s": bandwidth,
        "l2_mib": round(max(device.l2_bytes, MIB) / MIB, 2),
        "tflops": rates,
    }
    if device.capability is not None:
        data["compute_capability"] = f"{device.capability[0]}.{device.capability[1]}"
    if device.power_limit_w:
        data["tdp_w"] = device.power_limit_w
    if device.pcie_generation and device.pcie_lanes:
        data["pcie"] = {"generation": device.pcie_generation, "lanes": device.pcie_lanes}
    return data


def _architecture(machine: Machine) -> str:
    device = machine.device
    if device.kind == "cpu":
        return machine.cpu_vendor
    capability = device.capability or (0, 0)
    return ARCHITECTURES.get(capability, f"compute capability {capability[0]}.{capability[1]}")


def _rates(taken: Measurements) -> tuple[dict[str, float], str]:
    """Dense TFLOP/s by dtype: SMs x clock x operations a clock where they are known, and what was measured if more."""
    device = taken.machine.device
    best = {dtype: max(map(_tflops, taken.of("gemm", dtype))) for dtype in taken.whats("gemm")}
    nominal: dict[str, float] = {}
    if device.clock_mhz and device.capability in HALF_FLOPS:
        sm_tflops = device.units * device.clock_mhz / 1e6
        nominal = {
            "float32": LANE_FLOPS[device.capability] * sm_tflops,
            "float16": HALF_FLOPS[device.capability] * sm_tflops,
        }
        if device.capability >= (8, 0):
            nominal |= {"bfloat16": nominal["float16"], "tfloat32": nominal["float16"] / 2}
    rates = {dtype: max(nominal.get(dtype, 0.0), best.get(dtype, 0.0)) for dtype in (*nominal, *best)}
    if not rates:  # products were not measured: something must stand here, and the note says what
        return {"float32": 1.0}, "stands for nothing, products were not measured (--only)"
    how = "SMs x clock x operations a clock, or measured where that is more" if nominal else "the highest measured"
    return {dtype: _up(rate) for dtype, rate in rates.items()}, how


def _tflops(sample: Sample) -> float:
    return 2.0 * float(np.prod([float(size) for size in sample.sizes])) / sample.us / 1e6


def _bandwidth(taken: Measurements) -> tuple[float, str]:
    """GB/s of the memory: clock x width where the driver tells, else the fastest stream measured beyond the cache."""
    device = taken.machine.device
    if device.memory_clock_mhz and device.bus_bits:
        return _up(
            2 * device.memory_clock_mhz * 1e6 * device.bus_bits / 8 / 1e9
        ), "memory clock x bus width, twice a clock"
    streams = [(4.0 * s.sizes[1] * (3 if s.what == "add" else 2), s.us) for s in taken.of("elementwise")]
    streams += [(2.0 * s.sizes[0], s.us) for s in taken.of("copy", "d2d")]
    long = [(nbytes, us) for nbytes, us in streams if nbytes >= 2 * device.l2_bytes] or streams[-1:]
    if not long:
        return 10.0, "stands for nothing, no stream was measured (--only)"
    return _up(
        max(nbytes / us for nbytes, us in long) / 1e3
    ), "the fastest stream measured of more than the cache holds"


def _up(value: float) -> float:
    """Three figures, rounded up: a share of it is never above 1."""
    if value <= 0:
        return 1e-3
    digits = 2 - int(np.floor(np.log10(value)))
    return float(np.round(np.ceil(value * 10.0**digits) / 10.0**digits, max(digits, 0)))


# What was measured ----------------------------------------


def _launch(taken: Measurements, source: str) -> Data | None:
    if taken.machine.device.kind == "cpu":
        floor = taken.us("host", "call elementwise")
        if floor is None:
            return None
        what = (
            "a CPU computes in the call: kernel_floor_us is that of an add of 64 elements; there is nothing around it"
        )
        return {
            "source": f"{source}; {what}",
            "kernel_floor_us": _round(floor),
            "launch_latency_us": 0.0,
            "kernel_gap_us": 0.0,
        }
    times = {what: taken.us("launch", what) for what in ("floor", "latency", "gap")}
    names = {"floor": "kernel_floor_us", "latency": "launch_latency_us", "gap": "kernel_gap_us"}
    told = {names[what]: _round(max(us, 0.0)) for what, us in times.items() if us is not None}
    return {"source": f"{source}; small kernels under torch.profiler", **told} if told else None


def _squares(taken: Measurements, source: str) -> Data | None:
    """The sides that every dtype was measured at."""
    by_dtype = {
        dtype: {s.sizes[1]: s.us for s in taken.of("gemm", dtype) if s.sizes[0] == 1 and len(set(s.sizes[1:])) == 1}
        for dtype in taken.whats("gemm")
    }
    sides = sorted(set.intersection(*(set(times) for times in by_dtype.values()))) if by_dtype else []
    if len(sides) < LEAST_CURVE:
        return None
    return {
        "source": source,
        "what": "square torch.mm, the second operand transposed; medians of batches of calls",
        "flops": [2 * side**3 for side in sides],
        "us": {dtype: [_round(times[side]) for side in sides] for dtype, times in by_dtype.items()},
    }


def _copies(taken: Measurements, source: str) -> Data | None:
    copies = taken.of("copy", "d2d")
    if len(copies) < LEAST_CURVE:
        return None
    return {
        "source": source,
        "what": "clones of a tensor, read plus written; medians of batches of calls",
        "bytes_moved": [2 * s.sizes[0] for s in copies],
        "us": [_round(s.us) for s in copies],
    }


def _round(us: float) -> float:
    return float(f"{us:.5g}")


def rounded(values: Iterable[float]) -> list[float]:
    """Five figures each."""
    return [_round(value) for value in values]
