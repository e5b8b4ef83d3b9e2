"""Trace files: a timeline as Kineto-compatible Chrome trace events.

The files open in Perfetto, chrome://tracing and TensorBoard's torch-tb-profiler plugin, and follow what PyTorch's
profiler writes (pytorch/kineto, libkineto/src/output_json.cpp): host calls are ``cpu_op`` or ``cuda_runtime``, device
work is ``kernel``, ``gpu_memcpy`` or ``gpu_memset`` in a process of the device's number, steps are
``ProfilerStep#N``, ``ac2g`` arrows join a launch to what it launched.  Times are microseconds with the nanoseconds
behind the point; reading a number and rounding it to nanoseconds gives the timeline's integer back.

What differs from a recorded trace, and why:

* A host op that launches device work without a runtime call of its own gets one of the same extent
  (``cudaLaunchKernel`` ...): tools join host and device through runtime calls.
* A launched collective is wrapped in PyTorch's annotation (``nccl:all_reduce``), by which the plugin finds
  communication.  Its kernel says its size in bytes (``dtype`` is ``Byte``).
* The lanes of a prediction never overlap.  A measured timeline is written as it is, and where a profiler's rounding
  made two neighbours overlap by some nanoseconds, Perfetto leaves one of them out, as it does of the trace itself.
* Memory is there twice: as counters, which Perfetto draws, and as ``[memory]`` instants, which the plugin reads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from sim.errors import InputError
from sim.files import check_can_appear, check_folder_can_appear, compressed, write_whole
from sim.ops import CollectiveKind
from sim.report.steps import UNMARKED
from sim.timeline import CollectiveInfo, MemorySample, RankInfo, Span, Step, Timeline
from sim.units import NS_PER_US

Event = dict[str, Any]

SUFFIXES = (".json", ".json.gz")
_PLUGIN_DEVICES = 64  # torch_tb_profiler/consts.py (0.4.3), MAX_GPU_PER_NODE: it indexes a list by device number

# PyTorch's names of collectives: in its annotations (ProcessGroupNCCL.cpp, profilingTitle) and in a kernel's
# "Collective name" (ParamCommsUtils.hpp and its callers in ProcessGroupNCCL.cpp).  Of all_gather and reduce_scatter
# the plugin knows only the plain annotation.
_COLLECTIVE_NAMES: dict[CollectiveKind, str] = {
    "all_reduce": "allreduce", "all_gather": "_allgather_base", "reduce_scatter": "_reduce_scatter_base",
    "broadcast": "broadcast", "reduce": "reduce", "all_to_all": "all_to_all", "send": "send", "recv": "recv",
    "barrier": "barrier",
}  # fmt: skip
_CATEGORY = {"compute": "kernel", "communication": "kernel", "memcpy": "gpu_memcpy", "memset": "gpu_memset"}
_LAUNCHER = {
    "compute": "cudaLaunchKernel", "communication": "cudaLaunchKernel",
    "memcpy": "cudaMemcpyAsync", "memset": "cudaMemsetAsync",
}  # fmt: skip


def write_trace(timeline: Timeline, path: Path) -> None:
    """Write all ranks into one ``.json`` or ``.json.gz`` file, whole or not at all; the same timeline gives the
    same bytes.  InputError where the name ends otherwise or the file cannot be written."""
    _write(timeline, path, [info.rank for info in timeline.ranks])


def write_traces(timeline: Timeline, path: Path) -> tuple[Path, ...]:
    """Write one file, or, where ``path`` does not end in ``.json`` or ``.json.gz``, a folder with one file per rank.

    Perfetto shows all ranks of one file; the plugin wants a file per rank.  The folder is made where it is absent.
    Returns the files written.
    """
    if _is_file(path):
        write_trace(timeline, path)
        return (path,)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(path, f"cannot be made a folder ({error.strerror}); choose another place") from None
    written = tuple(path / f"rank{info.rank}.pt.trace.json.gz" for info in timeline.ranks)
    for info, file in zip(timeline.ranks, written, strict=True):
        _write(timeline, file, [info.rank])
    return written


def check_place(path: Path) -> None:
    """Before the replay: InputError where :func:`write_traces` could not write there."""
    if _is_file(path):
        check_file(path)
    else:
        check_folder_can_appear(path)


def check_file(path: Path) -> None:
    """Before the replay: InputError where a trace file cannot have that name, or cannot be written there."""
    check_name(path)
    check_can_appear(path)


def _is_file(path: Path) -> bool:
    """Whether one file is meant, or a folder; InputError where it can be neither."""
    if path.name.endswith(SUFFIXES):
        return True
    if path.name == "-" or (path.suffix and not path.is_dir()):
        raise InputError(path, f"a trace file ends in {' or '.join(SUFFIXES)}; a name without an ending is a folder")
    return False


def _write(timeline: Timeline, path: Path, ranks: Sequence[int]) -> None:
    check_name(path)
    write_content(encode_trace(timeline, ranks), path)


def check_name(path: Path) -> None:
    """InputError where a trace file cannot have that name."""
    if not path.name.endswith(SUFFIXES):
        raise InputError(path, "a trace file's name ends in .pt.trace.json or .pt.trace.json.gz")


def write_content(content: bytes, path: Path) -> None:
    """Write a trace file's JSON, compressed where its name says so."""
    write_whole(path, compressed(content) if path.name.endswith(".gz") else content)


def encode_trace(timeline: Timeline, ranks: Sequence[int] | None = None) -> bytes:
    """The file's JSON, one event a line, of those ranks (by default of all)."""
    return encode_events(*trace_events(timeline, ranks))


def trace_events(timeline: Timeline, ranks: Sequence[int] | None = None) -> tuple[Event, Iterator[Event]]:
    """What a trace file says of itself, and its events."""
    chosen = [info for info in timeline.ranks if ranks is None or info.rank in ranks]
    layout = _Layout(timeline, chosen)
    return _head(timeline, layout), _events(timeline, layout)


def encode_events(head: Event, events: Iterable[Event]) -> bytes:
    """The JSON of a trace file, one event a line."""
    encoder = msgspec.json.Encoder()
    encoded = b",\n".join(encoder.encode(event) for event in events)
    return encoder.encode(head)[:-1] + b',"traceEvents":[\n' + encoded + b"\n]}\n"


def exact_us(start_ns: int, duration_ns: int) -> tuple[float, float]:
    """Start and duration in microseconds whose sum *in floating point* is the end in microseconds.

    The plugin nests slices by comparing such sums, and 0.1 + 0.2 > 0.3 would make neighbours overlap.  Both round to
    the integers they were made from; the duration is off by no more than the sum's last bit.  Where no duration
    gives the end (a start of finer grain, halfway between two sums), the sum is the number before it.
    """
    start, duration, end = start_ns / NS_PER_US, duration_ns / NS_PER_US, (start_ns + duration_ns) / NS_PER_US
    if start + duration != end:
        duration = end - start
        while start + duration < end:
            duration = math.nextafter(duration, math.inf)
        while start + duration > end:
            duration = math.nextafter(duration, 0.0)
    return start, duration


class _Place(NamedTuple):
    """A process and a thread of the file."""

    pid: int
    tid: int


class _Layout:
    """Which process and thread of the file each rank, device and track becomes.

    A device's process is its own number (``gpu3`` is 3) where these differ and are small enough for the plugin,
    else its place among the ranks.  A host process follows beyond all devices.  Threads and streams keep their
    numbers; threads of different ranks that share one get new ones, for the plugin tells threads by number alone.
    """

    def __init__(self, timeline: Timeline, ranks: Sequence[RankInfo]) -> None:
        self.ranks = ranks
        self.device = dict(zip((info.rank for info in ranks), _device_numbers(ranks), strict=True))
        base = 10 ** max(3, len(str(max(self.device.values(), default=0))))
        self.host = {info.rank: base + info.rank for info in ranks}
        threads = [
            (i, track) for i, track in enumerate(timeline.tracks) if track.rank in self.host and track.kind == "thread"
        ]
        shared = len({track.id for _, track in threads}) < len(threads)
        self.tid = {i: track.id for i, track in enumerate(timeline.tracks)}
        if shared:
            self.tid.update({i: base * 1000 + i for i, _ in threads})
        places = timeline.span_places()
        self.spans = {info.rank: places[info.rank] for info in ranks}
        self.launched: dict[int, list[int]] = {}
        for i in sorted(i for own in self.spans.values() for i in own):
            launch = timeline.spans[i].launch
            if launch >= 0:
                self.launched.setdefault(launch, []).append(i)
        self.main = {info.rank: self._main_tid(timeline, info.rank) for info in ranks}

    def _main_tid(self, timeline: Timeline, rank: int) -> int:
        """The thread that steps and memory events are drawn on: the first to do something once the first step has
        begun, or a thread of their own where that one's calls cross the border of a step."""
        threads = [i for i, t in enumerate(timeline.tracks) if t.rank == rank and t.kind == "thread"]
        own = 1 + max((self.tid[i] for i in threads), default=0)
        on_threads = frozenset(threads)
        steps = [step for step in timeline.steps if step.rank == rank]
        begin = min((step.start_ns for step in steps), default=0)
        calls = [span for span in (timeline.spans[i] for i in self.spans[rank]) if span.track in on_threads]
        starts = ((span.start_ns, span.track) for span in calls if span.start_ns >= begin)
        _, main = min(starts, default=(begin, threads[0] if threads else -1))
        borders = sorted({time for step in steps for time in (step.start_ns, step.end_ns)})
        crossed = _any_crosses((span for span in calls if span.track == main), borders)
        return own if main < 0 or crossed else self.tid[main]


def _any_crosses(spans: Iterable[Span], borders: Sequence[int]) -> bool:
    """Whether a border lies strictly inside a span; spans in order of start."""
    at = 0
    for span in spans:
        while at < len(borders) and borders[at] <= span.start_ns:
            at += 1
        if at < len(borders) and borders[at] < span.end_ns:
            return True
    return False


def _device_numbers(ranks: Sequence[RankInfo]) -> list[int]:
    found = [re.search(r"(\d+)$", info.device) for info in ranks]
    numbers = [int(match[1]) for match in found if match]
    if len(set(numbers)) == len(ranks) and max(numbers) < _PLUGIN_DEVICES:
        return numbers
    return list(range(len(ranks)))


def _head(timeline: Timeline, layout: _Layout) -> Event:
    ranks = [info.rank for info in layout.ranks]
    sizes = [span.collective.ranks for span in timeline.distinct_spans() if span.collective is not None]
    distributed: Event = {"backend": "nccl", "world_size": max([len(timeline.ranks), max(ranks) + 1, *sizes])}
    distributed |= {"rank": ranks[0]} if len(ranks) == 1 else {"ranks": ranks}
    return {
        "schemaVersion": 1,
        "deviceProperties": _device_properties(layout),
        "distributedInfo": distributed,
        "displayTimeUnit": "ms",
        "baseTimeNanoseconds": 0,
        "traceName": timeline.name,
        "origin": timeline.origin,
    }


def _device_properties(layout: _Layout) -> list[Event]:
    """One entry for every number up to the largest: readers find a device by its place in the list."""
    properties: list[Event] = [{"id": i, "name": ""} for i in range(1 + max(layout.device.values()))]
    for info in layout.ranks:
        own = properties[layout.device[info.rank]]
        own["name"] = info.device_name or info.device
        if info.memory_bytes is not None:
            own["totalGlobalMem"] = info.memory_bytes
    return properties


def _events(timeline: Timeline, layout: _Layout) -> Iterator[Event]:
    for place, info in enumerate(layout.ranks):
        yield from _metadata(timeline, layout, info, place)
        steps = [step for step in timeline.steps if step.rank == info.rank and step.name != UNMARKED]
        yield from (_step(step, layout) for step in steps)
        for i in layout.spans[info.rank]:
            yield from _span(timeline, layout, info.rank, i)
    yield from _memory(timeline, layout)
    yield from _recording(timeline)


def _metadata(timeline: Timeline, layout: _Layout, info: RankInfo, place: int) -> Iterator[Event]:
    """Names and order of processes and threads: of each rank first the host, then the device."""
    host, device = layout.host[info.rank], layout.device[info.rank]
    gpu = f"{info.device} {info.device_name}".strip()
    yield from _process(host, f"rank {info.rank} host", "CPU", 2 * place)
    yield from _process(device, f"rank {info.rank} {gpu}", f"GPU {device}", 2 * place + 1)
    tracks = [(i, track) for i, track in enumerate(timeline.tracks) if track.rank == info.rank]
    threads = {layout.tid[i]: track.name or f"thread {track.id}" for i, track in tracks if track.kind == "thread"}
    streams = {layout.tid[i]: track.name or f"stream {track.id}" for i, track in tracks if track.kind == "stream"}
    if layout.main[info.rank] not in threads:
        threads[layout.main[info.rank]] = "steps"
    yield from (_named("thread_name", host, tid, {"name": name}) for tid, name in threads.items())
    for tid, name in streams.items():
        yield _named("thread_name", device, tid, {"name": name})
        yield _named("thread_sort_index", device, tid, {"sort_index": tid})


def _process(pid: int, name: str, label: str, order: int) -> Iterator[Event]:
    yield _named("process_name", pid, 0, {"name": name})
    yield _named("process_labels", pid, 0, {"labels": label})
    yield _named("process_sort_index", pid, 0, {"sort_index": order})


def _named(what: str, pid: int, tid: int, args: Event) -> Event:
    return {"name": what, "ph": "M", "ts": 0.0, "pid": pid, "tid": tid, "args": args}


def _slice(category: str, name: str, place: _Place, span: Span | Step, args: Event) -> Event:
    ts, dur = exact_us(span.start_ns, span.duration_ns)
    return {"ph": "X", "cat": category, "name": name, **place._asdict(), "ts": ts, "dur": dur, "args": args}


def _step(step: Step, layout: _Layout) -> Event:
    name = step.name if re.fullmatch(r"ProfilerStep#\d+", step.name) else f"ProfilerStep#{step.index}"
    return _slice("user_annotation", name, _Place(layout.host[step.rank], layout.main[step.rank]), step, {})


def _span(timeline: Timeline, layout: _Layout, rank: int, i: int) -> Iterator[Event]:
    span = timeline.spans[i]
    if span.kind == "host":
        yield from _host_call(timeline, layout, rank, i)
    elif timeline.tracks[span.track].kind == "stream":
        yield from _device_work(timeline, layout, rank, i)
    else:  # a run without a GPU: host threads compute and communicate
        category = "user_annotation" if span.kind == "communication" else "cpu_op"
        args = {"External id": i + 1} | _details(span)
        yield _slice(category, span.name, _Place(layout.host[rank], layout.tid[span.track]), span, args)


def _host_call(timeline: Timeline, layout: _Layout, rank: int, i: int) -> Iterator[Event]:
    """The call, around it the annotation of a collective that it launches, in it the runtime call if it is none.

    All three have the same extent; the outer comes first in the file, and so in viewers.
    """
    span, launched = timeline.spans[i], [timeline.spans[j] for j in layout.launched.get(i, ())]
    place = _Place(layout.host[rank], layout.tid[span.track])
    for collective in [work.collective for work in launched if work.collective is not None][:1]:
        yield _slice("user_annotation", f"nccl:{collective.kind}", place, span, {"External id": i + 1})
    category = _host_category(span.name)
    if category == "cpu_op":
        yield _slice(category, span.name, place, span, {"External id": i + 1} | _details(span))
    if category != "cpu_op" or launched:
        name = _LAUNCHER[launched[0].kind] if category == "cpu_op" else span.name
        category = "cuda_runtime" if category == "cpu_op" else category
        yield _slice(category, name, place, span, {"External id": i + 1, "correlation": i + 1})


def _host_category(name: str) -> str:
    if name.startswith(("cuda", "hip")):
        return "cuda_runtime"
    return "cuda_driver" if re.match(r"cu[A-Z]", name) else "cpu_op"


def _device_work(timeline: Timeline, layout: _Layout, rank: int, i: int) -> Iterator[Event]:
    span = timeline.spans[i]
    place = _Place(layout.device[rank], layout.tid[span.track])
    # Work without a known launch gets a correlation that no host call has.
    args: Event = {"External id": span.launch + 1} if span.launch >= 0 else {}
    args |= {"device": place.pid, "context": 1, "stream": place.tid}
    args |= {"correlation": (span.launch if span.launch >= 0 else i) + 1} | _details(span)
    yield _slice(_CATEGORY[span.kind], span.name, place, span, args)
    if span.launch >= 0:
        launch = timeline.spans[span.launch]
        arrow: Event = {"cat": "ac2g", "name": "ac2g", "id": i + 1}
        caller = _Place(layout.host[rank], layout.tid[launch.track])
        yield {"ph": "s", **arrow, **caller._asdict(), "ts": launch.start_ns / NS_PER_US}
        yield {"ph": "f", **arrow, **place._asdict(), "ts": span.start_ns / NS_PER_US, "bp": "e"}


def _details(span: Span) -> Event:
    """What the timeline knows of a span beyond its extent."""
    details: Event = {"duration from": span.source} if span.kind != "host" else {}
    if span.module:
        details["module"] = span.module
    if span.collective is not None:
        details |= _collective(span.collective, span.transfer_ns)
    return details


def _collective(collective: CollectiveInfo, transfer_ns: int) -> Event:
    """PyTorch's names for a collective's size: elements into and out of one rank, here of one byte each."""
    part = collective.bytes // max(1, collective.ranks)
    return {
        "Collective name": _COLLECTIVE_NAMES[collective.kind],
        "In msg nelems": part if collective.kind == "all_gather" else collective.bytes,
        "Out msg nelems": part if collective.kind == "reduce_scatter" else collective.bytes,
        "dtype": "Byte",
        "Group size": collective.ranks,
        "Process Group Name": collective.group,
        "Seq": collective.seq,
        "algorithm": collective.algorithm,
        "protocol": collective.protocol,
        "transfer (us)": transfer_ns / NS_PER_US,
    }


def _memory(timeline: Timeline, layout: _Layout) -> Iterator[Event]:
    """Counters and ``[memory]`` instants.  The size of an instant is the change since the sample before it; of a
    measured timeline's first sample that is not known, so it is a counter only."""
    own = timeline.own_memory()
    for info in layout.ranks:
        before = MemorySample(info.rank, 0, 0, 0) if timeline.origin == "predicted" else None
        for sample in own.get(info.rank, ()):
            yield from _memory_sample(layout, info.rank, sample, before)
            before = sample


def _memory_sample(layout: _Layout, rank: int, sample: MemorySample, before: MemorySample | None) -> Iterator[Event]:
    device, ts = layout.device[rank], sample.time_ns / NS_PER_US
    yield _counter("memory allocated", device, ts, sample.allocated_bytes)
    if before is None or sample.reserved_bytes != before.reserved_bytes:
        yield _counter("memory reserved", device, ts, sample.reserved_bytes)
    if before is not None and sample.allocated_bytes != before.allocated_bytes:
        args = {
            "Total Reserved": sample.reserved_bytes, "Total Allocated": sample.allocated_bytes,
            "Bytes": sample.allocated_bytes - before.allocated_bytes, "Device Id": device, "Device Type": 1,
        }  # fmt: skip
        place: Event = {"pid": layout.host[rank], "tid": layout.main[rank], "ts": ts}
        yield {"ph": "i", "cat": "cpu_instant_event", "s": "t", "name": "[memory]", **place, "args": args}


def _counter(name: str, pid: int, ts: float, value: int) -> Event:
    return {"ph": "C", "name": name, "pid": pid, "tid": 0, "ts": ts, "args": {"bytes": value}}


def _recording(timeline: Timeline) -> Iterator[Event]:
    """The extent of the recording, as the profiler marks it; the plugin counts utilisation within it."""
    extents: list[Span | Step] = [*timeline.distinct_spans(), *timeline.steps]
    begin = min((extent.start_ns for extent in extents), default=0)
    end = max((extent.end_ns for extent in extents), default=0)
    ts, dur = exact_us(begin, end - begin)
    yield {
        "ph": "X", "cat": "Trace", "name": "PyTorch Profiler (0)", "pid": "Spans", "tid": "PyTorch Profiler",
        "ts": ts, "dur": dur, "args": {"Op count": 0},
    }  # fmt: skip
    yield {
        "name": "Iteration Start: PyTorch Profiler", "ph": "i", "s": "g",
        "pid": "Traces", "tid": "Trace PyTorch Profiler", "ts": ts,
    }  # fmt: skip
    yield {"name": "Record Window End", "ph": "i", "s": "g", "pid": "", "tid": "", "ts": ts + dur}
