"""The profiler over a run: it is told where steps end, leaves out the warm-up and stops after the last chosen step.

What is recorded: shapes, memory, launches with their flows, and CUDA synchronisation events.  The CPU is the device
where nothing was ever put into a GPU's memory; the trace then says ``"tracesim_device": "cpu"``.
"""

from __future__ import annotations

import gzip
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, schedule

# As many allocator events as a long run of a large model has in its first steps; a full ring drops the oldest.
MEMORY_EVENTS = 1_000_000


class Session:
    """One process' recording: ``steps`` steps after ``warmup`` steps.

    ``step_ended`` is called where a step ends and answers whether all is recorded; ``stop`` ends a recording early;
    ``write`` may be called after either.  Then ``ended`` is how many steps ended while it was going on, ``on_cpu``
    whether the CPU was the device, ``snapshot`` the CUDA allocator's history where a GPU was, and ``rank_of_ranks``
    what torch.distributed said, where it was used.
    """

    def __init__(self, steps: int, warmup: int, tell: Callable[[str], None]) -> None:
        self.steps = steps
        self.warmup = warmup
        self.snapshot: Any = None
        self.ended = 0
        self.over = False
        self.on_cpu = True
        self.rank_of_ranks: tuple[int, int] | None = None
        self._tell = tell
        self._profiler: Any = None
        self._started_at = 0

    @property
    def recorded(self) -> int:
        """Whole steps on record."""
        return min(max(self.ended - self.warmup, 0), self.steps)

    def record_memory(self) -> None:
        """Record the CUDA allocator from the moment CUDA is there: every segment is then allocated inside the record.

        Nothing here asks CUDA anything: a script may yet choose which GPUs it sees.
        """
        torch.cuda._lazy_call(_record_memory)

    def begin(self) -> None:
        """The first step of the run begins here (for a script: all that comes before its first optimizer step too)."""
        if self.warmup:
            self._tell(f"warming up: {self.warmup} steps")
        if self.warmup <= 1:
            self._start()

    def step_ended(self) -> bool:
        """A step ended, the next begins.  True when the last chosen step has."""
        if self.over:
            return True
        self.ended += 1
        if self._profiler is None:
            if self.ended == self.warmup - 1:
                self._start()
            return False
        if self.recorded == self.steps:
            self._last_moment()
            self.over = True
        self._profiler.step()
        if self.ended == self.warmup:
            self._tell(f"recording {self.steps} steps")
        return self.over

    def stop(self) -> None:
        """End the recording where it is: what came after the last whole step is no step."""
        if self.over:
            return
        self.over = True
        if self._profiler is None:
            return
        if self.recorded:
            self._last_moment()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the schedule did not come to its end
            self._profiler.stop()

    def _start(self) -> None:
        """The profiler's own warm-up is the run's last; it begins one step before what is recorded."""
        self._started_at = self.ended
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that without a warm-up the first step is skewed is what was asked for
            self._profiler = profile(
                activities=_activities(),
                schedule=schedule(wait=0, warmup=min(self.warmup, 1), active=self.steps, repeat=1),
                record_shapes=True,
                profile_memory=True,
                experimental_config=_with_sync_events(),
                acc_events=True,  # there is one cycle; False warns of a second one that never comes
            )
            self._profiler.start()

    def _last_moment(self) -> None:
        """What can only be told or asked while the profiler records."""
        if dist.is_available() and dist.is_initialized():
            self.rank_of_ranks = dist.get_rank(), dist.get_world_size()
        self.on_cpu = cpu_is_device()
        if self.on_cpu:
            self._profiler.add_metadata("tracesim_device", "cpu")
        else:
            self.snapshot = torch.cuda.memory._snapshot()
            torch.cuda.memory._record_memory_history(enabled=None)

    def write(self, file: Path, name: str) -> None:
        """Write the trace, gzipped, into ``file``; ``name`` is what it will be called.  OSError where it cannot be."""
        assert self.over and self.recorded
        unfinished = self.ended - self._started_at if self.recorded < self.steps else None
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=f"{file.name}.") as folder:
            raw = Path(folder) / "trace.json"
            self._profiler.export_chrome_trace(str(raw))
            _pack(raw, file, name.removesuffix(".gz"), unfinished)


def _record_memory() -> None:
    torch.cuda.memory._record_memory_history(context=None, max_entries=MEMORY_EVENTS)


def cpu_is_device() -> bool:
    """Whether this process has had nothing in any GPU's memory."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return True
    return not any(torch.cuda.max_memory_reserved(gpu) for gpu in range(torch.cuda.device_count()))


def _activities() -> list[ProfilerActivity]:
    gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    return [ProfilerActivity.CPU, *gpu]


def _with_sync_events() -> Any:
    """The option that makes CUPTI record what a synchronising call waited for; experimental in PyTorch."""
    from torch._C import _profiler

    try:
        return _profiler._ExperimentalConfig(enable_cuda_sync_events=True)
    except TypeError:
        return _profiler._ExperimentalConfig()


def _pack(raw: Path, packed: Path, name: str, unfinished: int | None) -> None:
    """Gzip the trace under its own name; the step that the recording's end cut loses its mark."""
    mark = None if unfinished is None else f'"ProfilerStep#{unfinished}"'.encode()
    with raw.open("rb") as lines, gzip.GzipFile("", "wb", 6, packed.open("wb"), mtime=0) as file:
        for line in lines:
            if b'"traceName"' in line:
                line = line.replace(str(raw).encode(), name.encode())
            elif mark is not None and mark in line:
                line = line.replace(mark, b'"unfinished step"')
            file.write(line)
