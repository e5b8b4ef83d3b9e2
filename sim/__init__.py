"""tracesim: how long will this training step take on that machine, and does it fit?

Five calls are the whole way::

    graph = sim.synthesize("opt-1.3b", batch=16, seq=1024)   # or: graph, measured = sim.read("rank0.json.gz")
    placed = sim.place(graph, sim.load_topology("a5000x1"))  # or: sim.place(graph, None), as captured
    timeline = sim.replay(placed)
    summary = sim.summarize(timeline)
    sim.write(timeline, "opt.pt.trace.json.gz")

What a user can cause is a ``UserError`` that names the file, the place in it and the cure.  Times are integer
nanoseconds in a timeline and decimal milliseconds (``_ms``) in a summary, sizes are bytes.

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
    """A workload file, or the Kineto traces of one job (one a rank, or a folder of them), as ``(graph, measured)``.

    ``measured`` is the timeline that the traces themselves tell, None for a workload file.  InputError where a file is
    not there, or is neither.
    """
    from sim.workload.inputs import read_inputs

    return read_inputs([Path(path) for path in paths])


def load_topology(name: str | Path, overrides: Mapping[str, object] | None = None) -> Machine:
    """A shipped machine (``"a5000x8"``) or a topology file.

    ``overrides`` replaces values by dotted path before anything is checked: ``{"links.pcie.bandwidth_gb_s": 32}``.
    UserError for an unknown name or path, InputError with every problem of a file at once.
    """
    from sim.topology.load import load_topology as load

    return load(str(name), overrides)


def synthesize(model: str, batch: int, seq: int, **options: Any) -> OpGraph:
    """The graph of one step of a model on ``batch`` sequences of ``seq`` tokens a rank, without GPU and weights.

    ``model`` is a shipped card (``"opt-1.3b"``), a folder with a config.json or a hub name.  ``options`` are the other
    fields of ``sim.workload.synth.SynthSpec``: ``mode="train"``, ``parallel="fsdp=8"`` and so on, as ``tracesim synth
    --help`` has them.  UserError where the model, the sizes or the plan cannot be.
    """
    from sim.workload.synth import SynthSpec
    from sim.workload.synth import synthesize as from_spec

    return from_spec(SynthSpec(model=model, batch=batch, seq=seq, **options))


def synthesize_script(path: str | Path, *args: str, **options: Any) -> OpGraph:
    """The graph of one step of the training script at ``path``, run with ``args`` as on one GPU.

    ``options`` are the other fields of ``sim.workload.script.spec.ScriptSpec``.  UserError, with the script's line,
    where the script does what cannot be without data.
    """
    from sim.workload.script.run import synthesize_script as from_spec
    from sim.workload.script.spec import ScriptSpec

    return from_spec(ScriptSpec(Path(path), args, **options))


def write(timeline: Timeline, path: str | Path) -> None:
    """Write all ranks into one trace file (``.json`` or ``.json.gz``) for Perfetto and TensorBoard.

    It appears whole or not at all, and the same timeline gives the same bytes.  InputError where it cannot be written.
    """
    write_trace(timeline, Path(path))
