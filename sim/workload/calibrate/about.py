"""What is measured: the device as its driver describes it, the host, the versions, and who else uses the machine."""

from __future__ import annotations

import datetime
import math
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
    gpus = like_gpus() if device.kind == "gpu" else 0
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
        gpus=_numbers(gpus),
        others=tuple(torch.cuda.get_device_name(gpu) for gpu in range(gpus, torch.cuda.device_count()))
        if device.kind == "gpu"
        else (),
    )


def unused_gpus() -> str:
    """What to say where there are GPUs that this PyTorch cannot use; else nothing."""
    told = asked("-L")
    count = 0 if told is None else sum(line.startswith("GPU ") for line in told.splitlines())
    if not count or torch.cuda.is_available():
        return ""
    gpus = f"{count} GPU{'s' * (count > 1)}"
    return f"nvidia-smi lists {gpus}, but torch {torch.__version__} cannot use them: the CPU is measured"


def like_gpus() -> int:
    """How many GPUs are measured: CUDA's first, and those of its name after it."""
    names = [torch.cuda.get_device_name(gpu) for gpu in range(torch.cuda.device_count())]
    return next((i for i, name in enumerate(names) if name != names[0]), len(names))


def _numbers(gpus: int) -> tuple[int, ...]:
    """What nvidia-smi calls the first so many of CUDA's GPUs, which may see fewer and in another order
    (CUDA_VISIBLE_DEVICES, CUDA_DEVICE_ORDER); nothing where it does not tell."""
    told = asked("--query-gpu=index,uuid", "--format=csv,noheader") or ""
    rows = [line.partition(",") for line in told.splitlines()]
    known = {uuid.strip(): int(index) for index, _, uuid in rows if index.strip().isdigit()}
    uuids = [_uuid(torch.cuda.get_device_properties(gpu)) for gpu in range(gpus)]
    return tuple(known[uuid] for uuid in uuids) if all(uuid in known for uuid in uuids) else ()


def _uuid(properties: Any) -> str:
    """As nvidia-smi writes it; nothing where PyTorch does not tell."""
    uuid = str(getattr(properties, "uuid", ""))
    return uuid if not uuid or uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"


def cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def vendor(name: str) -> Vendor:
    """Who made a CPU of that name."""
    known: dict[str, Vendor] = {"intel": "intel", "amd": "amd", "arm": "arm", "neoverse": "arm", "aarch64": "arm"}
    return next((maker for word, maker in known.items() if word in name.lower()), "unknown")


def _gpu() -> Device:
    found = torch.cuda.get_device_properties(0)
    smi = _queried(found, "power.limit", "pcie.link.gen.max", "pcie.link.width.max", "clocks.max.sm")
    power, generation, lanes, clock = (_number(word) for word in smi)
    return Device(
        kind="gpu",
        full_name=found.name,
        count=like_gpus(),
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


def _queried(properties: Any, *fields: str) -> list[str]:
    """Of that very GPU: nvidia-smi's number 0 need not be CUDA's."""
    which = _uuid(properties) or "0"
    told = asked(f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", f"--id={which}")
    words = [word.strip() for word in told.splitlines()[0].split(",")] if told and told.strip() else []
    return words if len(words) == len(fields) else [""] * len(fields)


def _number(word: str) -> float | None:
    try:
        value = float(word)
    except ValueError:  # nvidia-smi: [N/A]
        return None
    return value if math.isfinite(value) and value > 0 else None


def clocks() -> str:
    """What the first GPU does now: clocks, power, temperature, and whether others use it, in words."""
    fields = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "utilization.gpu")
    sm, memory, watts, degrees, used = _queried(torch.cuda.get_device_properties(0), *fields)
    return f"before: SM {sm} MHz, memory {memory} MHz, {watts} W, {degrees} C, used {used} %" if sm else ""


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
