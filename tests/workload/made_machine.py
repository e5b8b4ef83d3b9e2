"""A small machine that runs a scripted training loop and writes down what Kineto would have: the tests' ground truth.

It knows the device's rules (stream order, launch latency, launch queue, events, blocking copies) in its own words, so
a trace that it wrote with every kernel twice as fast is what a replay of the first trace must predict.
Times are microseconds, as in Kineto's files.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

QUEUE = 1022
LAUNCH, LATENCY, TURN = 5.0, 7.0, 1.5
MAIN, AUTOGRAD = 100, 200


class Machine:
    """One process with host threads, streams 7 (compute), 20 (communication) and 24 (copies)."""

    def __init__(
        self, kernels: float = 1.0, host: float = 1.0, dialect: str = "new", rank: int | None = None, world: int = 1
    ) -> None:
        """``dialect``: "new", "old" (2021's names and whole microseconds), "hip" (ROCm's calls, launches by flows),
        "sync" (with cuda_sync events)."""
        self.kernels, self.host, self.dialect, self.rank, self.world = kernels, host, dialect, rank, world
        self.old = dialect == "old"
        self.events: list[dict[str, Any]] = []
        self.clock = {MAIN: 1_000_000.0, AUTOGRAD: 0.0}
        self.thread = MAIN
        self.ends: dict[int, list[float]] = {7: [], 20: [], 24: []}
        self.until: dict[int, float] = {}
        self.correlation = 1000
        self.number = 0
        self.step_began: float | None = None
        self.arrivals: list[float] = []
        self.meetings: list[float] = []
        self.clock_ahead = 0.0
        self.blocking = False

    # -- what the program does ---------------------------------------------------------------------------------

    def think(self, us: float) -> None:
        """The current thread's own work."""
        self.clock[self.thread] += us * self.host

    def op(self, name: str, us: float, *durations: float, stream: int = 7) -> None:
        """An op of ``us`` host time that launches kernels."""
        begin = self.clock[self.thread]
        self.think(us)
        for duration in durations:
            self.launch(duration, stream)
        self._complete("cpu_op", f"aten::{name}", begin, self.clock[self.thread], {"External id": self._next()})

    def launch(self, us: float, stream: int = 7, name: str = "kern", call: str = "cudaLaunchKernel") -> float:
        """Launch a kernel; returns when it ends."""
        begin, ready = self._enter(stream)
        start = self._start(stream, ready)
        return self._ran(call, begin, ready, "kernel", name, start, us * self.kernels, stream)

    def copy(self, us: float, kind: str, stream: int = 7) -> None:
        """A copy; with pageable memory the call returns when it is done."""
        begin, ready = self._enter(stream)
        start = self._start(stream, ready)
        end = start + us * self.kernels
        blocking = "Pageable" in kind
        self.ends[stream].append(end)
        self.clock[self.thread] = end + 3 * self.host if blocking else ready + LAUNCH * self.host
        self._device("gpu_memcpy", f"Memcpy {kind}", start, end, stream)
        self._runtime("cudaMemcpyAsync", begin)

    def synchronize(self, what: str, stream: int | None = None) -> None:
        """A call that returns when the device (or a stream) is done."""
        begin = self.clock[self.thread]
        streams = [stream] if stream is not None else list(self.ends)
        done = max((self.ends[s][-1] for s in streams if self.ends[s]), default=begin)
        self.clock[self.thread] = max(begin, done) + 4 * self.host
        self._next_correlation()
        self._runtime(what, begin)
        kind = "Context Sync" if stream is None else "Stream Sync"
        self._sync(kind, begin, -1 if stream is None else stream)

    def wait_event(self, waiting: int, awaited: int) -> None:
        """Record an event on one stream and let another wait for it."""
        for call in ("cudaEventRecord", "cudaStreamWaitEvent"):
            begin = self.clock[self.thread]
            self.think(1.5)
            self._next_correlation()
            self._runtime(call, begin)
        sync = {"wait_on_stream": awaited, "wait_on_cuda_event_record_corr_id": self.correlation - 1}
        self._sync("Stream Wait Event", begin, waiting, **sync)
        if self.ends[awaited]:
            self.until[waiting] = max(self.until.get(waiting, 0.0), self.ends[awaited][-1])

    def poll(self, stream: int) -> None:
        """Ask for an event until it has happened."""
        done = self.ends[stream][-1]
        while True:
            begin = self.clock[self.thread]
            self.think(2.0)
            self._next_correlation()
            self._runtime("cudaEventQuery", begin)
            if begin > done:
                return
            # The loop sleeps; how often it asks is not the program's speed.
            self.clock[self.thread] += 20.0

    def graph(self, durations: list[float]) -> None:
        """One cudaGraphLaunch, many kernels."""
        begin, ready = self._enter(7)
        start = self._start(7, ready)
        for us in durations:
            end = start + us * self.kernels
            self.ends[7].append(end)
            self._device("kernel", "node", start, end, 7)
            start = end + TURN
        self.clock[self.thread] = ready + LAUNCH * self.host
        self._runtime("cudaGraphLaunch", begin)

    def all_reduce(self, elements: int, us: float) -> None:
        """An all_reduce on the communication stream: it ends ``us`` after the last rank's arrival."""
        begin = self.clock[self.thread]
        self.wait_event(20, 7)
        begin_call, ready = self._enter(20)
        start = self._start(20, ready)
        place = len(self.arrivals)
        self.arrivals.append(start)
        last = max(start, self.meetings[place]) if place < len(self.meetings) else start
        name = "ncclKernel_AllReduce_RING_LL_Sum_float(ncclDevComm*, unsigned long, ncclWork*)"
        self._ran("cudaLaunchKernel", begin_call, ready, "kernel", name, start, last - start + us * self.kernels, 20)
        shape = {"Input Dims": [[elements]], "Input type": ["float"]}
        self._complete("user_annotation", "nccl:all_reduce", begin, self.clock[self.thread], shape)

    def backward(self) -> Backward:
        """``with machine.backward():`` the autograd thread works, the main thread waits for it."""
        return Backward(self)

    def begin_step(self) -> None:
        self.step_began = self.clock[MAIN]

    def end_step(self) -> None:
        assert self.step_began is not None
        self._complete("user_annotation", f"ProfilerStep#{self.number}", self.step_began, self.clock[MAIN], {}, MAIN)
        self.number += 1

    # -- what the machine does with it ---------------------------------------------------------------------------

    def _enter(self, stream: int) -> tuple[float, float]:
        """A call begins; it goes on when its stream's queue has room."""
        self._next_correlation()
        begin = self.clock[self.thread]
        queue = self.ends[stream]
        return begin, max(begin, queue[-QUEUE]) if len(queue) >= QUEUE else begin

    def _start(self, stream: int, ready: float) -> float:
        free = self.ends[stream][-1] + TURN if self.ends[stream] else 0.0
        return max(ready + LATENCY * self.host, free, self.until.pop(stream, 0.0))

    def _ran(
        self, call: str, begin: float, ready: float, category: str, name: str, start: float, us: float, stream: int
    ) -> float:
        self.ends[stream].append(start + us)
        self.clock[self.thread] = ready + LAUNCH * self.host
        self._device(category, name, start, start + us, stream)
        self._runtime(call, begin)
        return start + us

    # -- what Kineto writes of it ----------------------------------------------------------------------------------

    def _next(self) -> int:
        self.correlation += 1
        return self.correlation

    _next_correlation = _next

    def _sync(self, kind: str, begin: float, stream: int, **args: int) -> None:
        if self.dialect == "sync":
            args |= {"stream": stream, "correlation": self.correlation}
            self._complete("cuda_sync", kind, begin, self.clock[self.thread], args, stream, 0)

    def _runtime(self, name: str, begin: float) -> None:
        self._complete("cuda_runtime", name, begin, self.clock[self.thread], {"correlation": self.correlation})

    def _device(self, category: str, name: str, start: float, end: float, stream: int) -> None:
        args = {"correlation": self.correlation, "stream": stream, "device": 0}
        self._complete(category, name, start, end, args, stream, 0)

    def _complete(
        self, category: str, name: str, begin: float, end: float, args: dict[str, Any], tid: int | None = None,
        pid: int = MAIN,
    ) -> None:  # fmt: skip
        if self.old:
            begin, end = math.floor(begin), math.floor(end)
            category = {"kernel": "Kernel", "gpu_memcpy": "Memcpy", "cuda_runtime": "Runtime"}.get(category, "Operator")
        tid = self.thread if tid is None else tid
        if self.dialect == "hip":
            name, args = self._in_hip(category, name, args, pid, tid, begin)
        self.events.append(
            {
                "ph": "X", "cat": category, "name": name, "pid": pid,
                "tid": (f"stream {tid}" if pid == 0 else str(tid)) if self.old else tid,
                "ts": begin + self.clock_ahead, "dur": end - begin, "args": args,
            }
        )  # fmt: skip

    def _in_hip(
        self, category: str, name: str, args: dict[str, Any], pid: int, tid: int, begin: float
    ) -> tuple[str, dict[str, Any]]:
        """ROCm's names; its device events say what launched them only by a flow that ends at their start."""
        if pid == 0:
            flow = {"ph": "f", "cat": "ac2g", "name": "ac2g", "id": args["correlation"], "bp": "e"}
            self.events.append({**flow, "pid": pid, "tid": tid, "ts": begin + self.clock_ahead})
            self.blocking = "Pageable" in name
            return name.replace("Pageable", "Host").replace("Pinned", "Host"), {"device": 0}
        if category == "cuda_runtime" and name == "cudaMemcpyAsync" and self.blocking:
            return "hipMemcpyWithStream", args
        return name.replace("cuda", "hip", 1) if category == "cuda_runtime" else name, args

    def write(self, path: Path) -> Path:
        trace: dict[str, Any] = {"traceEvents": self.events, "deviceProperties": [{"id": 0, "name": "Made"}]}
        if self.rank is not None:
            trace["distributedInfo"] = {"rank": self.rank, "world_size": self.world, "backend": "nccl"}
        path.write_text(json.dumps(trace))
        return path

    def step_times(self) -> list[float]:
        """Microseconds of each step."""
        return [e["dur"] for e in self.events if e["name"].startswith("ProfilerStep#")]


class Backward:
    """The autograd thread wakes, works, and lets the main thread go on."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def __enter__(self) -> None:
        machine = self.machine
        machine.clock[AUTOGRAD] = machine.clock[MAIN] + 40 * machine.host
        machine.thread = AUTOGRAD

    def __exit__(self, *_: object) -> None:
        machine = self.machine
        machine.thread = MAIN
        machine.clock[MAIN] = machine.clock[AUTOGRAD] + 60 * machine.host
