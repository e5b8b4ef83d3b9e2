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

from pathlib import Path

from sim.errors import InputError
from sim.workload.kineto.events import (
    Args,
    DeviceEvent,
    DeviceProperties,
    HostEvent,
    KinetoTrace,
    MemoryEvent,
    RuntimeEvent,
    SyncEvent,
    Thread,
)
from sim.workload.kineto.file import read_file
from sim.workload.kineto.sorting import Sorting

__all__ = [
    "Args",
    "DeviceEvent",
    "DeviceProperties",
    "HostEvent",
    "KinetoTrace",
    "MemoryEvent",
    "RuntimeEvent",
    "SyncEvent",
    "Thread",
    "read_trace",
]


def read_trace(path: Path) -> KinetoTrace:
    """Read one rank's trace; InputError (one line, with the cure) where it is none."""
    trace = Sorting(path, *read_file(path)).trace()
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
