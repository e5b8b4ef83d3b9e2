"""Sorting a file's events, by category, into typed events in order of time."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from functools import cache
from pathlib import Path

from sim.units import NS_PER_S
from sim.workload.kineto.events import (
    DeviceEvent,
    DeviceProperties,
    HostEvent,
    KinetoTrace,
    MemoryEvent,
    RuntimeEvent,
    SyncEvent,
    Thread,
)
from sim.workload.kineto.file import Event, File

HOST = frozenset({"cpu_op", "Operator", "user_annotation"})
RUNTIME = frozenset(
    {
        "cuda_runtime",
        "Runtime",
        "cuda_driver",
        "hip_runtime",
        "hip_driver",
        "xpu_runtime",
        "xpu_driver",
        "mtia_runtime",
        "privateuse1_runtime",
        "privateuse1_driver",
    }
)
DEVICE = {
    "kernel": "kernel",
    "Kernel": "kernel",
    "gpu_memcpy": "memcpy",
    "Memcpy": "memcpy",
    "gpu_memset": "memset",
    "Memset": "memset",
}
SYNC = "cuda_sync"
FLOW = frozenset({"ac2g", "async", "async_cpu_to_gpu"})

# Further than this from the trace's median event, a timestamp is a clock's jump: torch.profiler keeps all events in
# memory, so real traces are seconds to minutes long.
CLOCK_JUMP_NS = 3600 * NS_PER_S
# The largest duration or distance that is a time at all: a year in microseconds.
LARGEST_US = 366 * 24 * 3600 * 1e6
# No allocation has as many bytes.
LARGEST_BYTES = 1 << 50

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Sorting:
    """One pass over the file's events: by category, into typed events."""

    def __init__(self, path: Path, file: File, skipped: Counter[str]) -> None:
        self.path = path
        self.file = file
        self.skipped = skipped
        self.base_ns = file.base_ns or 0
        self.threads: dict[tuple[int, int], int] = {}
        self.thread_names: dict[tuple[int, int], str] = {}
        self.names: dict[str, str] = {}
        self.host: list[HostEvent] = []
        self.runtime: list[RuntimeEvent] = []
        self.device: list[DeviceEvent] = []
        self.syncs: list[SyncEvent] = []
        self.memory: list[MemoryEvent] = []
        # c10::DeviceType: 0 is the CPU, 1 is CUDA (and HIP, which PyTorch calls so)
        self.memory_device = 0 if file.tracesim_device == "cpu" else 1
        self.flow_ends: dict[tuple[int | str, int | str, float], int] = {}

    def trace(self) -> KinetoTrace:
        file = self.file
        for event in file.events:
            if event.ph == "X":
                self._complete(event)
            elif event.ph in ("i", "I"):
                if event.name == "[memory]":
                    self._memory(event)
            elif event.ph == "M" and event.name == "thread_name":
                self._thread_name(event)
        if any(d.correlation < 0 for d in self.device):
            self._correlate_by_flows()
        file.events = []
        self._drop_clock_jumps()
        for events in (self.host, self.runtime, self.device):
            events.sort(key=_start_then_longest)
        self.memory.sort(key=lambda m: m.time_ns)
        info = file.distributed
        return KinetoTrace(
            path=str(self.path),
            rank=info.rank if info.rank is not None and info.rank >= 0 else None,
            world_size=info.world_size,
            groups={str(g.pg_name): tuple(g.ranks) for g in info.pg_config if g.ranks},
            devices={d.id: DeviceProperties(d.name, d.memory) for d in file.devices},
            cpu_is_device=file.tracesim_device == "cpu",
            host_name=file.host_name,
            threads=[Thread(*key, self.thread_names.get(key, f"thread {key[1]}")) for key in self.threads],
            host=self.host,
            runtime=self.runtime,
            device=self.device,
            syncs=self.syncs,
            memory=self.memory,
            skipped=dict(sorted(self.skipped.items())),
        )

    def _complete(self, event: Event) -> None:
        category = event.cat
        kind = DEVICE.get(category)
        if kind is None and category not in HOST and category not in RUNTIME and category != SYNC:
            return
        times = self._times(event)
        if times is None:
            return
        args, name = event.args, self._name(event.name)
        if kind is not None:
            self._device(kind, name, times, event)
        elif category == SYNC:
            self.syncs.append(
                SyncEvent(
                    args.sync_kind or name,
                    _or_unknown(args.correlation),
                    _stream(args.stream, -1),
                    _stream(args.wait_stream, -1),
                    _or_unknown(args.wait_record),
                )
            )
        elif category in RUNTIME:
            thread = self._thread(event)
            external = args.external if args.external is not None else args.external_old
            self.runtime.append(
                RuntimeEvent(name, *times, thread, _or_unknown(args.correlation), _or_unknown(external))
            )
        else:
            annotation = category == "user_annotation" or "::" not in name
            self.host.append(HostEvent(name, *times, self._thread(event), annotation, args))

    def _name(self, given: str) -> str:
        """One text for each name, without what a terminal would obey instead of showing."""
        name = self.names.get(given)
        if name is None:
            name = self.names[given] = _CONTROL.sub(" ", given)
        return name

    def _device(self, kind: str, name: str, times: tuple[int, int], event: Event) -> None:
        args = event.args
        device = args.device if args.device is not None else _number(event.pid)
        correlation = _or_unknown(args.correlation)
        if correlation < 0 and event.ts is not None:
            self.flow_ends[(event.pid, event.tid, event.ts)] = len(self.device)
        self.device.append(
            DeviceEvent(kind, name, *times, device, _stream(args.stream, _number(event.tid)), correlation, args)
        )

    def _memory(self, event: Event) -> None:
        args = event.args
        if args.device_type != self.memory_device:
            return
        nbytes = args.memory_bytes
        if event.ts is None or nbytes is None or abs(nbytes) > LARGEST_BYTES or not -LARGEST_US < event.ts < 1e17:
            self.skipped["missing or unusable fields"] += 1
            return
        self.memory.append(
            MemoryEvent(
                round(event.ts * 1000) + self.base_ns,
                self._thread(event),
                args.device_id or 0,
                nbytes,
                args.address,
                args.allocated,
                args.reserved,
            )
        )

    def _times(self, event: Event) -> tuple[int, int] | None:
        start, duration = event.ts, event.dur
        if start is None or duration is None:
            self.skipped["missing or unusable fields"] += 1
            return None
        if duration < 0:
            self.skipped["a negative duration"] += 1
            return None
        if duration > LARGEST_US or not -LARGEST_US < start < 1e17:
            self.skipped["a time that is none"] += 1
            return None
        start_ns = round(start * 1000) + self.base_ns
        return start_ns, start_ns + round(duration * 1000)

    def _thread(self, event: Event) -> int:
        key = (_number(event.pid), _number(event.tid))
        return self.threads.setdefault(key, len(self.threads))

    def _thread_name(self, event: Event) -> None:
        if event.args.thread_name:
            self.thread_names[(_number(event.pid), _number(event.tid))] = event.args.thread_name

    def _correlate_by_flows(self) -> None:
        """Device events without a correlation id (ROCm) get the flow's that ends at their start."""
        starts = {(r.correlation) for r in self.runtime}
        for event in self.file.events:
            if event.ph == "f" and event.cat in FLOW and event.ts is not None:
                index = self.flow_ends.get((event.pid, event.tid, event.ts))
                if index is not None and isinstance(event.id, int) and event.id in starts:
                    self.device[index].correlation = event.id

    def _drop_clock_jumps(self) -> None:
        starts = sorted(e.start_ns for events in (self.host, self.runtime, self.device) for e in events)
        if not starts or starts[-1] - starts[0] < CLOCK_JUMP_NS:
            return
        middle = starts[len(starts) // 2]
        for name in ("host", "runtime", "device"):
            events = getattr(self, name)
            kept = [e for e in events if abs(e.start_ns - middle) < CLOCK_JUMP_NS > e.end_ns - e.start_ns]
            self.skipped["a clock that jumps"] += len(events) - len(kept)
            setattr(self, name, kept)
        kept_memory = [m for m in self.memory if abs(m.time_ns - middle) < CLOCK_JUMP_NS]
        self.skipped["a clock that jumps"] += len(self.memory) - len(kept_memory)
        self.memory = kept_memory


def _start_then_longest(event: HostEvent | RuntimeEvent | DeviceEvent) -> tuple[int, int]:
    return event.start_ns, -event.end_ns


def _or_unknown(number: int | None) -> int:
    return -1 if number is None or number == 0xFFFFFFFF else number


def _stream(stream: int | str | None, otherwise: int) -> int:
    if stream is None:
        return otherwise
    return _or_unknown(stream) if isinstance(stream, int) else _number(stream)


@cache
def _number(name: int | str) -> int:
    """The number in ``stream 7`` or ``25738``; names without one get a number of their own, below zero."""
    if isinstance(name, int):
        return name
    found = re.search(r"-?\d+$", name)
    return int(found.group()) if found else -1 - zlib.crc32(name.encode())
