"""capture.json: on what machine and with what versions the traces were taken, so that the numbers mean something.

The environment is not written, and values of arguments whose names say they are secret are not either.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sim.workload.capture.spec import Place

FORMAT = "tracesim.capture/1"
HIDDEN = "***"
_SECRET = re.compile(r"(^|[-_])(token|secret|password|passwd|passphrase|credentials?|api[-_]?key)$", re.IGNORECASE)
_TOPOLOGY_SECONDS = 20


def about(command: Sequence[str], place: Place, steps: int, warmup: int, device: str) -> dict[str, Any]:
    """What capture.json says; ``device`` is ``cpu`` or ``cuda``, what the ops ran on."""
    return {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": without_secrets(command),
        "ranks": place.ranks,
        "steps": steps,
        "warmup": warmup,
        "device": device,
        "versions": versions(),
        "host": _host(),
        "gpus": _gpus(),
        "topology": topology(),
    }


def without_secrets(command: Sequence[str]) -> list[str]:
    """The command with ``***`` for values of options such as ``--hf-token X`` or ``api_key=X``."""
    told: list[str] = []
    hide = False
    for word in command:
        name, equals, _ = word.partition("=")
        secret = bool(_SECRET.search(name))
        if hide and not word.startswith("-"):
            told.append(HIDDEN)
        else:
            told.append(f"{name}={HIDDEN}" if secret and equals else word)
        hide = secret and not equals
    return told


def versions() -> dict[str, str | None]:
    """Of everything that timings depend on; None for what is not there."""
    nccl = torch.cuda.nccl.version() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "tracesim": _installed("tracesim"),
        "torch": torch.__version__,
        "transformers": _installed("transformers"),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": str(torch.backends.cudnn.version()) if torch.cuda.is_available() else None,
        "nccl": ".".join(map(str, nccl)) if isinstance(nccl, tuple) else None,
        "driver": _driver(),
    }


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _host() -> dict[str, Any]:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
    return {
        "system": platform.system(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "threads_a_process": torch.get_num_threads(),
        "memory_bytes": pages,
    }


def cpu_name() -> str:
    """The CPU as the operating system calls it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(gpu) for gpu in range(torch.cuda.device_count())]
    return [
        {
            "index": i,
            "name": gpu.name,
            "memory_bytes": gpu.total_memory,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
        }
        for i, gpu in enumerate(found)
    ]


def _driver() -> str | None:
    told = asked("--query-gpu=driver_version", "--format=csv,noheader")
    return told.splitlines()[0].strip() if told else None


def topology() -> str | None:
    """``nvidia-smi topo -m``, without its colours."""
    told = asked("topo", "-m")
    return re.sub(r"\x1b\[[0-9;]*m", "", told) if told else None


def asked(*words: str) -> str | None:
    """What nvidia-smi says, or None where it is not there or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run([program, *words], capture_output=True, text=True, timeout=_TOPOLOGY_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
