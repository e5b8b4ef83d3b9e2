"""Kineto traces: a file that torch.profiler wrote, as typed events on one integer clock.

``read_trace`` reads one ``.json`` or ``.json.gz``.  Only the fields that order, duration, memory and shapes need are
decoded; Python frames, GPU copies of annotations and call stacks are dropped while reading.  Names of categories
changed over the years (``Kernel`` is ``kernel`` today, ``Operator`` is ``cpu_op`` or ``user_annotation``); both
are read.  Timestamps are microseconds, with decimals since 2024 and relative to ``baseTimeNanoseconds`` where that
is given; inside they are integer nanoseconds.

An event that cannot be used (a missing, negative or non-numeric field, a clock that jumps) is skipped and counted
in ``KinetoTrace.skipped``; a file that cannot be used is an InputError.

Sources: the writer, libkineto/src/output_json.cpp and ActivityType.cpp of github.com/pytorch/kineto (names of
categories and arguments); torch/csrc/profiler/util.cpp of github.com/pytorch/pytorch (collective arguments).
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from sim.errors import InputError
from sim.units import NS_PER_S

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


_ABSENT = msgspec.Raw()
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Args(msgspec.Struct, frozen=True, gc=False):
    """The arguments of an event that are used, under the names they have in the file."""

    correlation: int | None = None
    external: int | None = msgspec.field(default=None, name="External id")
    external_old: int | None = msgspec.field(default=None, name="external id")
    device: int | None = None
    stream: int | str | None = None
    bytes: int | None = None
    dims: msgspec.Raw = msgspec.field(default=_ABSENT, name="Input Dims")
    types: msgspec.Raw = msgspec.field(default=_ABSENT, name="Input type")
    strides: msgspec.Raw = msgspec.field(default=_ABSENT, name="Input Strides")
    concrete: msgspec.Raw = msgspec.field(default=_ABSENT, name="Concrete Inputs")
    collective: str | None = msgspec.field(default=None, name="Collective name")
    in_elements: int | None = msgspec.field(default=None, name="In msg nelems")
    out_elements: int | None = msgspec.field(default=None, name="Out msg nelems")
    group_size: int | None = msgspec.field(default=None, name="Group size")
    group_name: str | int | None = msgspec.field(default=None, name="Process Group Name")
    group_ranks: str | list[int] | None = msgspec.field(default=None, name="Process Group Ranks")
    sequence: int | None = msgspec.field(default=None, name="Seq")
    dtype: str | None = None
    source_rank: int | None = msgspec.field(default=None, name="Src Rank")
    target_rank: int | None = msgspec.field(default=None, name="Dst Rank")
    sync_kind: str | None = msgspec.field(default=None, name="cuda_sync_kind")
    wait_stream: int | None = msgspec.field(default=None, name="wait_on_stream")
    wait_record: int | None = msgspec.field(default=None, name="wait_on_cuda_event_record_corr_id")
    memory_bytes: int | None = msgspec.field(default=None, name="Bytes")
    address: int | None = msgspec.field(default=None, name="Addr")
    device_type: int | None = msgspec.field(default=None, name="Device Type")
    device_id: int | None = msgspec.field(default=None, name="Device Id")
    allocated: int | None = msgspec.field(default=None, name="Total Allocated")
    reserved: int | None = msgspec.field(default=None, name="Total Reserved")
    thread_name: str | None = msgspec.field(default=None, name="name")


_NO_ARGS = Args()


class _Event(msgspec.Struct, gc=False):
    ph: str = ""
    cat: str = ""
    name: str = ""
    pid: int | str = -1
    tid: int | str = -1
    ts: float | None = None
    dur: float | None = None
    id: int | str | None = None
    args: Args = _NO_ARGS


class _Group(msgspec.Struct):
    pg_name: str | int = ""
    ranks: list[int] = []


class _Distributed(msgspec.Struct, frozen=True):
    rank: int | None = None
    world_size: int | None = None
    backend: str = ""
    pg_config: list[_Group] = []


class _Device(msgspec.Struct):
    id: int = 0
    name: str = ""
    memory: int | None = msgspec.field(default=None, name="totalGlobalMem")


class _File(msgspec.Struct):
    events: list[_Event] = msgspec.field(name="traceEvents")
    distributed: _Distributed = msgspec.field(default=_Distributed(), name="distributedInfo")
    devices: list[_Device] = msgspec.field(default_factory=list, name="deviceProperties")
    base_ns: int | None = msgspec.field(default=None, name="baseTimeNanoseconds")
    tracesim_device: str = ""
    host_name: str = ""


class Thread(msgspec.Struct, frozen=True):
    """A host thread, by the process and thread number it has in the file."""

    pid: int
    tid: int
    name: str


class HostEvent(msgspec.Struct, gc=False):
    """An op or annotation on a host thread (``thread`` is an index into ``KinetoTrace.threads``).

    An annotation names a region; the thread may be silent inside it.  Old traces call both ``Operator``; an op's
    name has a namespace (``aten::mm``), a region's has none.
    """

    name: str
    start_ns: int
    end_ns: int
    thread: int
    annotation: bool
    args: Args


class RuntimeEvent(msgspec.Struct, gc=False):
    """A call of the device's runtime or driver."""

    name: str
    start_ns: int
    end_ns: int
    thread: int
    correlation: int
    external: int


class DeviceEvent(msgspec.Struct, gc=False):
    """A kernel, memcpy or memset; ``correlation`` is -1 where the file gives none."""

    kind: str
    name: str
    start_ns: int
    end_ns: int
    device: int
    stream: int
    correlation: int
    args: Args


class SyncEvent(msgspec.Struct, gc=False):
    """What a synchronising call waited for: streams and the correlation id of the cudaEventRecord; -1 is unknown."""

    kind: str
    correlation: int
    stream: int
    wait_stream: int
    wait_record: int


class MemoryEvent(msgspec.Struct, gc=False):
    """An allocation (positive) or free (negative ``bytes``) of the caching allocator of a device."""

    time_ns: int
    thread: int
    device: int
    bytes: int
    address: int | None
    allocated: int | None
    reserved: int | None


class DeviceProperties(msgspec.Struct, frozen=True):
    """A device of the machine the trace was taken on."""

    name: str
    memory_bytes: int | None


class KinetoTrace(msgspec.Struct):
    """One rank's trace.  Lists of events are in order of time; times are nanoseconds of the file's own clock.

    ``rank`` is None where the file does not say.  ``cpu_is_device`` is the trace's own statement that it was taken
    where the CPU is the device.  ``skipped`` counts events that could not be used, by why.
    """

    path: str
    rank: int | None
    world_size: int | None
    groups: dict[str, tuple[int, ...]]
    devices: dict[int, DeviceProperties]
    cpu_is_device: bool
    host_name: str
    threads: list[Thread]
    host: list[HostEvent]
    runtime: list[RuntimeEvent]
    device: list[DeviceEvent]
    syncs: list[SyncEvent]
    memory: list[MemoryEvent]
    skipped: dict[str, int]


def read_trace(path: Path) -> KinetoTrace:
    """Read one rank's trace; InputError (one line, with the cure) where it is none."""
    raw = _bytes(path)
    file, skipped = _decode(path, raw)
    del raw
    trace = _Sorting(path, file, skipped).trace()
    if not trace.device and not trace.cpu_is_device:
        raise InputError(
            path,
            f"a trace with no GPU events{_unusable(trace.skipped)}; profile with"
            " activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA] on a machine with a GPU, or take it with"
            " `tracesim trace`, which can use a CPU as the device",
        )
    if trace.cpu_is_device and not trace.host:
        raise InputError(path, "a trace with no ops in it; profile at least one whole step")
    return trace


def _unusable(skipped: dict[str, int]) -> str:
    """What was there and could not be used: the events that are missed may be among them."""
    told = ", ".join(f"{count} because of {why}" for why, count in skipped.items() if count)
    return f" that can be used (skipped: {told})" if told else ""


def _bytes(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise InputError(path, "no such file; give a torch.profiler trace (.json or .json.gz)") from None
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror}); give a torch.profiler trace") from None
    if raw[:2] != b"\x1f\x8b":
        return raw
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(path, f"not a whole gzip file ({error}); copy or record it again") from None


def _decode(path: Path, raw: bytes) -> tuple[_File, Counter[str]]:
    try:
        return msgspec.json.decode(raw, type=_File), Counter()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _decode_leniently(path, raw)


def _decode_leniently(path: Path, raw: bytes) -> tuple[_File, Counter[str]]:
    """Event by event: what does not fit its type is skipped and counted."""
    try:
        decoded = msgspec.json.decode(_well_formed(path, raw), type=dict[str, msgspec.Raw] | list[msgspec.Raw])
        top: dict[str, msgspec.Raw] = decoded if isinstance(decoded, dict) else {}
        if isinstance(decoded, dict):
            events = msgspec.json.decode(decoded.get("traceEvents", _ABSENT), type=list[msgspec.Raw])
        else:
            events = decoded
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        problem = "JSON, but no trace: it has no list of traceEvents; give what torch.profiler exported"
        raise InputError(path, problem) from None
    skipped: Counter[str] = Counter()
    return _File(
        events=[event for event in (_event(r, skipped) for r in events) if event is not None],
        distributed=_part(top.get("distributedInfo"), _Distributed, _Distributed()),
        devices=_part(top.get("deviceProperties"), list[_Device], []),
        base_ns=_part(top.get("baseTimeNanoseconds"), int, None),
        tracesim_device=_part(top.get("tracesim_device"), str, ""),
        host_name=_part(top.get("host_name"), str, ""),
    ), skipped


def _event(raw: msgspec.Raw, skipped: Counter[str]) -> _Event | None:
    try:
        return msgspec.json.decode(raw, type=_Event, strict=False)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        skipped["fields of the wrong type"] += 1
        return None


def _part(raw: msgspec.Raw | None, kind: Any, missing: Any) -> Any:
    """A part of the file's head, or what stands for it where it is missing or of another type."""
    if raw is None:
        return missing
    try:
        return msgspec.json.decode(raw, type=kind, strict=False)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return missing


def _well_formed(path: Path, raw: bytes) -> bytes:
    """The same JSON in strict form: some versions of Kineto wrote nan, inf and raw control characters."""
    try:
        msgspec.json.decode(raw, type=msgspec.Raw)
        raw.decode()
        return raw
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    text = re.sub(r":\s*-?(nan|inf)\b", ": null", raw.decode("utf-8", "replace"))
    try:
        value = json.loads(text, strict=False, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        what = "is empty" if not text.strip() else f"not JSON, or cut off ({error})"
        raise InputError(path, f"{what}; give a trace that torch.profiler exported whole") from None
    return msgspec.json.encode(value)


class _Sorting:
    """One pass over the file's events: by category, into typed events."""

    def __init__(self, path: Path, file: _File, skipped: Counter[str]) -> None:
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

    def _complete(self, event: _Event) -> None:
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

    def _device(self, kind: str, name: str, times: tuple[int, int], event: _Event) -> None:
        args = event.args
        device = args.device if args.device is not None else _number(event.pid)
        correlation = _or_unknown(args.correlation)
        if correlation < 0 and event.ts is not None:
            self.flow_ends[(event.pid, event.tid, event.ts)] = len(self.device)
        self.device.append(
            DeviceEvent(kind, name, *times, device, _stream(args.stream, _number(event.tid)), correlation, args)
        )

    def _memory(self, event: _Event) -> None:
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

    def _times(self, event: _Event) -> tuple[int, int] | None:
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

    def _thread(self, event: _Event) -> int:
        key = (_number(event.pid), _number(event.tid))
        return self.threads.setdefault(key, len(self.threads))

    def _thread_name(self, event: _Event) -> None:
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
