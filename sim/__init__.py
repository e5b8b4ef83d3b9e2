"""tracesim: how long will this training step take on that machine, and does it fit?

Five calls are the whole way::

    graph = sim.synthesize("opt-1.3b", batch=16, seq=1024)   # or: graph, measured = sim.read("rank0.json.gz")
    placed = sim.place(graph, sim.load_topology("a5000x1"))  # or: sim.place(graph, None), as captured
    timeline = sim.replay(placed)
    summary = sim.summarize(timeline)
    sim.write(timeline, "opt.pt.trace.json.gz")

``sim.place`` and ``sim.replay`` are these functions, and the packages of the same names are reached by ``from
sim.place.kernels import ...``: a verb of the public surface is worth more than a second way to a package.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sim.errors import UserError
from sim.graph import OpGraph
from sim.place.place import place
from sim.replay.replay import replay
from sim.report.chrome import write_trace
from sim.report.summarize import summarize
from sim.report.summary import Summary

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sim.timeline import Timeline
    from sim.topology.machine import Machine
    from sim.workload.inputs import Workload

__all__ = [
    "OpGraph",
    "Summary",
    "UserError",
    "load_topology",
    "place",
    "read",
    "replay",
    "summarize",
    "synthesize",
    "synthesize_script",
    "write",
]


def read(*paths: str | Path) -> Workload:
    """A workload file, or the Kineto traces of one job: ``(graph, measured)``, measured None for a workload file."""
    from sim.workload.inputs import read_inputs

    return read_inputs([Path(path) for path in paths])


def load_topology(name: str, overrides: Mapping[str, object] | None = None) -> Machine:
    """A shipped machine or a topology file, with values replaced by dotted path; see ``sim.topology.load``."""
    from sim.topology.load import load_topology as load

    return load(name, overrides)


def synthesize(model: str, batch: int, seq: int, **options: Any) -> OpGraph:
    """The graph of one step of a model; ``options`` are the other fields of ``sim.workload.synth.SynthSpec``."""
    from sim.workload.synth import SynthSpec
    from sim.workload.synth import synthesize as from_spec

    return from_spec(SynthSpec(model=model, batch=batch, seq=seq, **options))


def synthesize_script(path: str | Path, *args: str, **options: Any) -> OpGraph:
    """The graph of one step of a training script; ``options`` are the other fields of ``ScriptSpec``."""
    from sim.workload.script.run import synthesize_script as from_spec
    from sim.workload.script.spec import ScriptSpec

    return from_spec(ScriptSpec(Path(path), args, **options))


def write(timeline: Timeline, path: str | Path) -> None:
    """Write a trace file (``.json`` or ``.json.gz``) that Perfetto and TensorBoard open."""
    write_trace(timeline, Path(path))
