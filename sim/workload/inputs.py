"""INPUT of the commands: a workload file, Kineto traces, or a folder of them; told apart by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from sim.errors import InputError, UserError
from sim.graph import OpGraph, read
from sim.timeline import Timeline
from sim.workload.kineto import read_trace
from sim.workload.link import link_traces

WORKLOAD_SUFFIX = ".workload.json.gz"


class Workload(NamedTuple):
    """A graph to replay, and what was measured where it comes from a trace."""

    graph: OpGraph
    measured: Timeline | None


def read_inputs(
    paths: Sequence[Path], progress: Callable[[str], None] = lambda doing: None, parallel: str = ""
) -> Workload:
    """Read one workload file, or the traces of one job, one a rank.  InputError names the file and the cure.

    ``parallel`` makes several ranks of one (see :mod:`sim.workload.replicas`); nothing was measured of these.
    """
    if parallel:
        from sim.workload.replicas import read_replicated

        return Workload(read_replicated(paths, parallel, progress), None)
    files = [file for path in paths for file in _files(path)]
    workloads = [file for file in files if file.name.endswith(WORKLOAD_SUFFIX)]
    if workloads:
        if len(files) > 1:
            raise UserError(f"{workloads[0]}: a workload file holds all its ranks and is replayed alone")
        return Workload(read(files[0]), None)
    twice = next((file for i, file in enumerate(files) if file.resolve() in {f.resolve() for f in files[:i]}), None)
    if twice is not None:
        raise InputError(twice, "is named twice; give one file a rank")
    traces = []
    for file in files:
        progress(f"reading {file.name}")
        traces.append(read_trace(file))
    progress("linking launches, kernels and waits")
    linked = link_traces(traces)
    return Workload(linked.graph, linked.measured)


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise InputError(path, "no such file or folder; give a Kineto trace (.json, .json.gz), a folder or a workload")
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.iterdir() if p.name.endswith((".json", ".json.gz")) and p.name != "capture.json")
    workloads = [p for p in found if p.name.endswith(WORKLOAD_SUFFIX)]
    if not found:
        raise InputError(
            path, "no traces in this folder; a trace is a .json or .json.gz file that torch.profiler wrote"
        )
    if len(workloads) == len(found) > 1:
        raise InputError(path, f"{len(workloads)} workloads in this folder; name one of them")
    if workloads and len(workloads) < len(found):
        raise InputError(path, f"has traces and a workload, {workloads[0].name}: name the one to replay, or the traces")
    return found
