"""What is measured: the device as its driver describes it, the host, the versions, and who else uses the machine."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from sim.measurements import Device, Machine
from sim.workload.capture.about import asked, cpu_name, topology, versions, without_secrets

Vendor = Literal["intel", "amd", "arm", "unknown"]


def this_machine(command: Sequence[str]) -> Machine:
    """The machine this runs on; its GPUs where it has any, else its CPU."""
    device = _gpu() if torch.cuda.is_available() else _cpu()
    told = {name: str(version) for name, version in versions().items() if version is not None}
    name = cpu_name()
    return Machine(
        device=device,
        cpu_name=name,
        cpus=cpus(),
        cpu_vendor=vendor(name),
        versions=told,
        command=" ".join(without_secrets(command)),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        load=round(os.getloadavg()[0], 2),
        threads=torch.get_num_threads(),
        topology=topology() or "" if device.kind == "gpu" else "",
        clocks=clocks() if device.kind == "gpu" else "",
    )


def cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def vendor(name: str) -> Vendor:
    """Who made a CPU of that name."""
    known: dict[str, Vendor] = {"intel": "intel", "amd": "amd", "arm": "arm", "neoverse": "arm", "aarch64": "arm"}
    return next((maker for word, maker in known.items() if word in name.lower()), "unknown")


def _gpu() -> Device:
    found = torch.cuda.get_device_properties(0)
    smi = _queried("power.limit", "pcie.link.gen.max", "pcie.link.width.max", "clocks.max.sm")
    power, generation, lanes, clock = (_number(word) for word in smi)
    return Device(
        kind="gpu",
        full_name=found.name,
        count=torch.cuda.device_count(),
        units=found.multi_processor_count,
        memory_bytes=found.total_memory,
        l2_bytes=getattr(found, "L2_cache_size", 0),
        capability=(found.major, found.minor),
        clock_mhz=_mhz(found, "clock_rate") or clock,  # the boost clock; nvidia-smi's maximum lies above it
        memory_clock_mhz=_mhz(found, "memory_clock_rate"),
        bus_bits=getattr(found, "memory_bus_width", None),
        power_limit_w=power,
        pcie_generation=None if generation is None else int(generation),
        pcie_lanes=None if lanes is None else int(lanes),
    )


def _mhz(properties: Any, name: str) -> float | None:
    """CUDA tells clocks in kHz."""
    khz = getattr(properties, name, None)
    return khz / 1e3 if khz else None


def _queried(*fields: str) -> list[str]:
    told = asked(f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "--id=0")
    words = [word.strip() for word in told.splitlines()[0].split(",")] if told and told.strip() else []
    return words if len(words) == len(fields) else [""] * len(fields)


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:  # nvidia-smi: [N/A]
        return None


def clocks() -> str:
    """What the first GPU does now: clocks, power and temperature, in words."""
    sm, memory, watts, degrees = _queried("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
    return f"SM {sm} MHz, memory {memory} MHz, {watts} W, {degrees} C" if sm else ""


def _cpu() -> Device:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Device(
        kind="cpu",
        full_name=f"{cpu_name()}, {torch.get_num_threads()} threads",
        count=1,
        units=torch.get_num_threads(),
        memory_bytes=pages,
        l2_bytes=_last_level_cache(),
    )


_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def _last_level_cache(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the largest cache that cpu0 has; 0 where the system does not say."""
    sizes = [0]
    for file in sorted(folder.glob("index*/size")):
        found = re.fullmatch(r"(\d+)([KMG]?)", file.read_text().strip())
        if found:
            sizes.append(int(found[1]) * _UNITS.get(found[2], 1))
    return max(sizes)
