"""How long a call takes on a device: all that differs between a CPU and a CUDA GPU.

On a CPU a call is timed by ``time.perf_counter_ns``, of one thread by ``time.thread_time_ns``.  On a GPU device events
(``torch.cuda.Event``) stand around a batch of calls which is launched while the stream is still busy with copies (the
plug), so that the host's pace does not show: what is left of a call is its kernels and the stream's turn-around.  Where
the host was slower than the plug, the batch is taken again behind a longer one.

Others may use the machine.  Threads that wait for one which has no CPU are slower by milliseconds, so batches of
several threads in which that happened are told apart and taken anew; a call that others disturb all the time is not
timed at all.
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from sim.errors import UserError
from sim.measurements import Sample
from sim.units import MIB

Call = Callable[[], Any]

# Launches of one batch: fewer than the 1,024 that block the launching thread, with a few kernels a call.
MOST_CALLS = 64
BATCH_US = 500.0
MOST_REPEATS = 25
LEAST_REPEATS = 3
PATIENCE = 3
# Shares of a batch that threads may wait for a CPU: below, nothing happened (2 to 6 % were seen to make a product of
# 1.4 ms 3 % longer); above, others had more of it than the call.
QUIET, HOPELESS, STOPPED = 0.03, 0.5, 0.2
# What a call takes a host to launch, to begin with: the plug must last as long as all launches of a batch.
LAUNCH_US = 40.0
PLUG_BYTES = 64 * MIB
MOST_PLUGS = 512  # with the batch's own launches still fewer than the 1,024 that block
# A GPU that was idle runs at low clocks; NVIDIA's drivers raise them within some tenths of a second of work.
SETTLE_S = 0.5


class Spread(NamedTuple):
    """Median, 10th and 90th percentile of ``repeats`` batches of ``calls`` calls, in microseconds a call;
    ``disturbed``: batches in which another process took a CPU."""

    us: float
    p10: float
    p90: float
    repeats: int
    calls: int
    disturbed: int = 0

    def scaled(self, factor: float, less: float = 0.0) -> Spread:
        """The same of ``factor`` x (each time - ``less``), never below 0."""
        middle, low, high = (max(us - less, 0.0) * factor for us in (self.us, self.p10, self.p90))
        return Spread(middle, low, high, self.repeats, self.calls, self.disturbed)

    def sample(self, section: str, what: str, sizes: tuple[int, ...] = ()) -> Sample:
        """As a sample."""
        return Sample(section, what, sizes, *self)


class Timer(Protocol):
    """Times calls on one device."""

    device: torch.device
    alone: bool
    """Whether a batch in which another process took a CPU says nothing."""

    def batch_us(self, call: Call, calls: int) -> float:
        """Microseconds of the device a call, of so many calls one after another."""

    def alone_us(self, call: Call, calls: int) -> float:
        """Microseconds a call, each on an idle device, as somebody who waits for it sees it."""

    def host_us(self, call: Call, calls: int) -> float:
        """Microseconds of the host to issue a call."""


class CpuTimer:
    """The CPU computes in the call, so there is one time for all three: of one thread its own CPU time, which does not
    pass while another process has the CPU; of several threads, which wait for each other, the clock's."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._now = time.thread_time_ns if torch.get_num_threads() == 1 else time.perf_counter_ns
        self.alone = torch.get_num_threads() > 1

    def batch_us(self, call: Call, calls: int) -> float:
        """See :class:`Timer`."""
        begun = self._now()
        for _ in range(calls):
            call()
        return (self._now() - begun) / 1e3 / calls

    def alone_us(self, call: Call, calls: int) -> float:
        """See :class:`Timer`."""
        return self.batch_us(call, calls)

    def host_us(self, call: Call, calls: int) -> float:
        """See :class:`Timer`."""
        return self.batch_us(call, calls)


class _Batch(NamedTuple):
    """Microseconds a call on the device, and what the host took to launch everything."""

    us: float
    issued_us: float


class CudaTimer:
    """CUDA events; the stream is kept busy while a batch is launched."""

    def __init__(self, gpu: int = 0) -> None:
        self.device = torch.device("cuda", gpu)
        self.alone = False
        self._from = torch.zeros(PLUG_BYTES, dtype=torch.uint8, device=self.device)
        self._to = torch.empty_like(self._from)
        begun = time.monotonic()
        self._plug_us = self._copy_us()
        while time.monotonic() - begun < SETTLE_S:
            self._plug_us = self._copy_us()

    def _copy_us(self) -> float:
        return max(self._between(self._plug, 10).us, 1.0)

    def _plug(self) -> None:
        self._to.copy_(self._from)

    def _between(self, call: Call, calls: int, plugs: int = 0, before: Call | None = None) -> _Batch:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            begun = time.perf_counter_ns()
            for _ in range(plugs):
                self._plug()
            if before is not None:
                before()
            begin.record()
            for _ in range(calls):
                call()
            end.record()
            issued = time.perf_counter_ns() - begun
            end.synchronize()
        return _Batch(float(begin.elapsed_time(end)) * 1e3 / calls, issued / 1e3)

    def batch_us(self, call: Call, calls: int) -> float:
        """See :class:`Timer`."""
        plugs = self._plugs(calls * LAUNCH_US)
        batch = self._between(call, calls, plugs)
        if batch.issued_us > plugs * self._plug_us:  # the stream may have run dry
            batch = self._between(call, calls, self._plugs(2 * batch.issued_us))
        return batch.us

    def met_us(self, call: Call, calls: int, launch_us: float, meet: Call) -> float:
        """The same of a call that others take part in: never taken again by one alone, and begun where all have met
        behind the plug.  ``launch_us``: what the host takes for a call."""
        return self._between(call, calls, self._plugs(2 * calls * launch_us), meet).us

    def _plugs(self, us: float) -> int:
        return min(ceil(us / self._plug_us), MOST_PLUGS)

    def alone_us(self, call: Call, calls: int) -> float:
        """See :class:`Timer`."""
        return sum(self._between(call, 1).us for _ in range(calls)) / calls

    def host_us(self, call: Call, calls: int) -> float:
        """See :class:`Timer`."""
        torch.cuda.synchronize(self.device)
        begun = time.perf_counter_ns()
        for _ in range(calls):
            call()
        us = (time.perf_counter_ns() - begun) / 1e3 / calls
        torch.cuda.synchronize(self.device)
        return us


class Watch:
    """Of the time since it was made, how much this process's threads have waited for a CPU that others had, as a share:
    1.0 is one thread all the time.

    Linux tells in nanoseconds, for each thread (Documentation/scheduler/sched-stats.rst, "/proc/<pid>/schedstat");
    where it does not, a thread that was stopped for another process counts as ``STOPPED``.
    """

    def __init__(self) -> None:
        self._waited, self._stopped = _waited_ns(), _stopped()
        self._begun = time.perf_counter_ns()

    def share(self) -> float:
        """Up to now."""
        lasted, waited = time.perf_counter_ns() - self._begun, _waited_ns()
        if waited is None or self._waited is None:
            return STOPPED if _stopped() > self._stopped else 0.0
        return max(waited - self._waited, 0) / max(lasted, 1)


def _waited_ns() -> int | None:
    """What all threads have waited for a CPU; None where the system does not tell."""
    waited = None
    for file in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # a thread that has just ended
            waited = (waited or 0) + int(file.read_text().split()[1])
    return waited


def _stopped() -> int:
    """How often another process has taken a CPU from a thread of this one (involuntary context switches)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


class BusyError(UserError):
    """Others had the machine in every batch for longer than the call itself: what was timed says nothing."""

    def __init__(self) -> None:
        super().__init__(
            "others use this machine: several threads cannot be timed; use an idle one, or --threads 1, which takes "
            "CPU time; what was measured is kept, and the same command goes on from there"
        )


class Repeats:
    """Batches taken of one call; those in which others had a CPU that this process waited for are told apart."""

    def __init__(self, most: int = MOST_REPEATS) -> None:
        self.quiet: list[float] = []
        self.disturbed: list[float] = []
        self.least = 1.0
        self._most = most

    def take(self, us: float, waited: float) -> None:
        """One more; ``waited``: the share of its time."""
        (self.quiet if waited <= QUIET else self.disturbed).append(us)
        self.least = min(self.least, waited)

    def enough(self, spent_us: float, budget_us: float) -> bool:
        """Three quiet batches at least; where there are none, three times the time, and then what there is."""
        taken = len(self.quiet) + len(self.disturbed)
        if taken < LEAST_REPEATS:
            return False
        if len(self.quiet) < LEAST_REPEATS:
            return spent_us > PATIENCE * budget_us or taken >= PATIENCE * self._most
        return spent_us > budget_us or len(self.quiet) >= self._most

    def kept(self) -> list[float]:
        """The quiet batches; where there are less than three, the fastest third of all."""
        if len(self.quiet) >= LEAST_REPEATS:
            return self.quiet
        everything = sorted([*self.quiet, *self.disturbed])
        return everything[: max(len(everything) // 3, 1)]


def timed(
    batch_us: Callable[[Call, int], float], call: Call, point_ms: float, most_calls: int = MOST_CALLS, *, alone: bool
) -> Spread:
    """Warm up, choose how many calls make a batch that can be timed, repeat for about ``point_ms``.

    BusyError where others had the CPUs all the time.
    """
    first = batch_us(call, 1)
    second = min(first, batch_us(call, 1)) if first < 1e3 * point_ms else first
    calls = max(1, min(most_calls, int(BATCH_US / max(second, 1.0))))
    if calls > 1:
        batch_us(call, calls)
    repeats, begun = Repeats(), time.monotonic()
    while not repeats.enough(1e6 * (time.monotonic() - begun), 1e3 * point_ms):
        watch = Watch() if alone else None
        us = batch_us(call, calls)
        repeats.take(us, 0.0 if watch is None else watch.share())
    if repeats.least > HOPELESS:
        raise BusyError
    return spread_of(repeats.kept(), calls, len(repeats.disturbed))


def spread_of(taken: list[float], calls: int, disturbed: int = 0) -> Spread:
    """The spread of repeated batches."""
    ordered = sorted(taken)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return Spread(at(0.5), at(0.1), at(0.9), len(ordered), calls, disturbed)
