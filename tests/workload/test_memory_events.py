"""[memory] events through the simulated allocator: real histories, told as Kineto tells them, give their real curve."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import sim
from sim.replay.allocator.caching import CachingAllocator
from sim.replay.allocator.config import AllocatorConfig
from sim.replay.allocator.device import DeviceMemory
from sim.replay.allocator.recording import TraceEvent, read_recording
from sim.units import GIB
from tests.workload.made_machine import MAIN

Event = dict[str, Any]


def as_kineto(history: Iterable[TraceEvent]) -> list[Event]:
    """What torch.profiler would have written: block sizes (a request's, rounded), and totals after each event.

    What is reserved is added up from the segments of the recording; only the blocks' sizes, which a snapshot does not
    say, are the simulated allocator's.
    """
    allocator, told = CachingAllocator(AllocatorConfig(), DeviceMemory(80 * GIB)), []
    live: dict[int, tuple[int, int]] = {}
    allocated = reserved = 0
    for time, event in enumerate(history):
        size = 0
        if event.action == "segment_alloc":
            reserved += event.size
        elif event.action == "alloc":
            block = allocator.malloc(event.size, 0)
            live[event.address], size = (block.address, block.size), block.size
        elif event.action == "free_completed":
            address, held = live.pop(event.address)
            allocator.free(address)
            size = -held
        if size:
            allocated += size
            args = {"Device Type": 1, "Device Id": 0, "Bytes": size, "Addr": event.address}
            args |= {"Total Allocated": allocated, "Total Reserved": reserved}
            told.append({"ph": "i", "name": "[memory]", "pid": MAIN, "tid": MAIN, "ts": 10 + time, "args": args})
    return told


@pytest.mark.parametrize("name", ["forward_100", "forward_backward_100", "forward_200_mixed"])
def test_a_trace_that_begins_with_an_empty_cache_gives_the_reserved_curve(
    name: str, shared_dir: Path, tmp_path: Path
) -> None:
    (device,) = read_recording(shared_dir / f"data/snapshots/{name}.pickle").devices
    memory = as_kineto(device.events)
    op = {"ph": "X", "cat": "cpu_op", "name": "aten::empty", "pid": MAIN, "tid": MAIN, "ts": 1, "dur": 1e5}
    launch = {**op, "cat": "cuda_runtime", "name": "cudaLaunchKernel", "dur": 1, "args": {"correlation": 1}}
    kernel = {**op, "cat": "kernel", "pid": 0, "tid": 7, "dur": 1, "args": {"correlation": 1, "stream": 7, "device": 0}}
    path = tmp_path / "made.pt.trace.json"
    path.write_text(json.dumps({"traceEvents": [op, launch, kernel, *memory]}))
    graph, measured = sim.read(path)
    replayed = sim.replay(sim.place(graph, None))
    assert measured is not None
    curves = [[(m.allocated_bytes, m.reserved_bytes) for m in t.memory] for t in (replayed, measured)]
    assert curves[0] == curves[1]
    told = sim.summarize(replayed, measured)
    real = sum(segment.size for segment in device.segments)
    assert told.peak_reserved_bytes == told.measured_peak_reserved_bytes == real


def test_what_was_cached_before_the_trace_is_in_the_measured_peak_alone(tmp_path: Path) -> None:
    # 4 MiB in use and 60 MiB cached when the trace begins; then 2 MiB more, from the cache.
    mib = 1 << 20
    op = {"ph": "X", "cat": "cpu_op", "name": "aten::empty", "pid": MAIN, "tid": MAIN, "ts": 1, "dur": 100}
    kernel = {**op, "cat": "kernel", "pid": 0, "tid": 7, "ts": 50, "dur": 1, "args": {"stream": 7, "device": 0}}
    args = {"Device Type": 1, "Device Id": 0, "Bytes": 2 * mib, "Addr": 512}
    args |= {"Total Allocated": 6 * mib, "Total Reserved": 64 * mib}
    memory = {**op, "ph": "i", "name": "[memory]", "ts": 10, "args": args}
    path = tmp_path / "made.pt.trace.json"
    path.write_text(json.dumps({"traceEvents": [op, kernel, memory]}))
    graph, measured = sim.read(path)
    told = sim.summarize(sim.replay(sim.place(graph, None)), measured)
    assert (told.peak_allocated_bytes, told.measured_peak_allocated_bytes) == (6 * mib, 6 * mib)
    # 4 MiB and 2 MiB ask for one segment of 20 MiB.
    assert (told.peak_reserved_bytes, told.measured_peak_reserved_bytes) == (20 * mib, 64 * mib)
