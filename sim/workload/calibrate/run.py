"""Take all samples that a specification asks for, one after another, each into the journal."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from sim.errors import UserError
from sim.measurements import Machine, Sample
from sim.workload.calibrate.about import cpus, this_machine
from sim.workload.calibrate.host import host_samples, launch_samples
from sim.workload.calibrate.journal import Journal
from sim.workload.calibrate.kernels import Task, tasks
from sim.workload.calibrate.links import links_of, measure_links
from sim.workload.calibrate.spec import CalibrateSpec, Grid
from sim.workload.calibrate.timer import BusyError, CpuTimer, CudaTimer, Timer, timed

# What a task's tensors, and the result beside them, may take of the device's memory.
MEMORY_SHARE = 0.2
# A shorter call shows its overhead: a larger one is not longer in proportion.
SHOWS_WORK_US = 200.0

BUSY = "others used the machine all the time"

Tell = Callable[[int, int, str], None]
"""Told what is done, of how much, and what comes next."""


class LeftOut(NamedTuple):
    """A sample that was not taken, and why."""

    task: Task
    why: str


def machine_for(spec: CalibrateSpec) -> Machine:
    """The machine this runs on, computing with as many threads as are asked for."""
    if spec.threads is not None:
        if spec.threads > cpus():
            raise UserError(f"--threads {spec.threads}: this process may run on {cpus()} CPUs; choose at most so many")
        torch.set_num_threads(spec.threads)
    return this_machine(spec.command)


def measure(spec: CalibrateSpec, journal: Journal, tell: Tell) -> list[LeftOut]:
    """Fill the journal.  Answers what was left out: too long or too large for this machine, or refused by PyTorch."""
    bench = _Bench(spec, journal, tell)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for section in spec.sections:
            bench.run(section)
    return bench.left_out


class _Bench:
    def __init__(self, spec: CalibrateSpec, journal: Journal, tell: Tell) -> None:
        self.grid: Grid = spec.grid
        self.journal = journal
        self.left_out: list[LeftOut] = []
        self._tell = tell
        self._timers: dict[int, Timer] = {}
        self.device = self._timer(0).device
        self.tasks = {
            name: tasks(name, self.grid, self.device)
            for name in spec.sections
            if name not in ("host", "launch", "links")
        }
        links = links_of(self.grid, journal.machine) if "links" in spec.sections else []
        self.done, self.total = 0, sum(map(len, self.tasks.values())) + len(links)
        self._pace: dict[tuple[str, str], tuple[float, float]] = {}

    def _timer(self, gpu: int) -> Timer:
        if gpu not in self._timers:
            with _usable(gpu):
                self._timers[gpu] = CudaTimer(gpu) if torch.cuda.is_available() else CpuTimer()
        return self._timers[gpu]

    def run(self, section: str) -> None:
        """All samples of a section that are not there yet."""
        if section == "host":
            self._together(section, lambda: host_samples(self._timer(0), self.grid.point_ms))
        elif section == "launch":
            if self.device.type == "cuda":
                self._together(section, lambda: launch_samples(self.device))
        elif section == "links":
            with tempfile.TemporaryDirectory(prefix="tracesim-links-") as folder:
                measure_links(self.grid, self.journal, Path(folder), self._told)
        else:
            for task in self.tasks[section]:
                self._told(f"{section} {task.what} {' x '.join(map(str, task.sizes))}")
                self._one(task)
                self.done += 1
        self._told(section)

    def _told(self, doing: str, done: int = 0) -> None:
        self.done += done
        self._tell(self.done, self.total, doing)

    def _together(self, section: str, take: Callable[[], list[Sample]]) -> None:
        if any(key[0] == section for key in self.journal.taken):
            return
        self._told(section)
        with _usable(0):
            samples = take()
        self.journal.add(*samples)  # at once: a section that is there in part would pass for whole

    def _one(self, task: Task) -> None:
        sample = self.journal.taken.get(task.key)
        if sample is None:
            why = self._too_much(task)
            try:
                sample = None if why else self._taken(task)
            except BusyError:
                sample, why = None, BUSY
            if sample is None:
                self.left_out.append(LeftOut(task, why or "PyTorch has no such kernel here, or not enough memory"))
                return
            self.journal.add(sample)
        self._pace[task.section, task.what] = task.work, sample.us

    def _too_much(self, task: Task) -> str:
        """Why not to try: nobody waits minutes for one product, nor fills the memory for it."""
        if 1.5 * task.nbytes > MEMORY_SHARE * self.journal.machine.device.memory_bytes:
            return "larger than a fifth of the memory"
        work, us = self._pace.get((task.section, task.what), (task.work, 0.0))
        foreseen = us * task.work / work / 1e3 if us > SHOWS_WORK_US else 0.0
        return f"would take more than {self.grid.longest_ms:g} ms" if foreseen > self.grid.longest_ms else ""

    def _taken(self, task: Task) -> Sample | None:
        timer = self._timer(task.gpu)
        spread = None
        # Out of memory, or no kernel for this backend, dtype and shape, of which PyTorch warns at length before.
        with contextlib.suppress(RuntimeError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spread = timed(timer.batch_us, task.make(timer.device), self.grid.point_ms, alone=timer.alone)
        if timer.device.type == "cuda":
            with _usable(task.gpu):  # an error of the device itself stays: nothing can be measured after it
                torch.cuda.synchronize(timer.device)
                torch.cuda.empty_cache()
        return None if spread is None else spread.sample(*task.key)


@contextlib.contextmanager
def _usable(gpu: int) -> Iterator[None]:
    """UserError where PyTorch cannot work with a GPU: no memory left, no kernels for it, or it has failed."""
    try:
        yield
    except RuntimeError as error:
        problem = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"GPU {gpu} cannot be measured ({problem}); see with nvidia-smi what else runs on it; what was measured "
            "before is kept, and the same command goes on from there"
        ) from None
