"""``tracesim replay``: the steps of a trace or a workload on a machine."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click
import msgspec

from sim.cli import options
from sim.cli.telling import printer, progress, tell_result
from sim.errors import UserError
from sim.place.place import place
from sim.replay.allocator.config import AllocatorConfig, parse_alloc_conf
from sim.replay.engine import run
from sim.replay.replay import timeline_of
from sim.report import chrome, summary, text
from sim.report.summarize import summarize
from sim.report.summary import Summary
from sim.timeline import Timeline

if TYPE_CHECKING:
    from sim.topology.machine import Machine

# What only some commands need is imported where they need it: a replay as captured is over before torch, networkx and
# pydantic would be there.


@click.command()
@options.inputs
@options.topology
@options.gpus
@options.settings
@options.parallel
@options.contention
@options.json_out
@click.option(
    "--timeline", "timeline_out", type=options.FILE, metavar="FILE.pt.trace.json[.gz]",
    help="Write the replay as a trace for Perfetto, chrome://tracing or TensorBoard; a folder gets a file a rank.",
    callback=options.before_the_work(chrome.check_place),
)  # fmt: skip
@options.alloc_conf
@click.option(
    "--no-remedies", "cure", is_flag=True, flag_value=False, default=True,
    help="Where the job does not fit, do not try what would make it fit.",
)  # fmt: skip
@options.picture("--memory-plot", "Draw memory over time.")
@options.samples
@options.ranges
@click.option("--strict", is_flag=True, help="Refuse kernels that no formula explains, instead of estimating them.")
def replay(
    inputs: Sequence[Path],
    topology: str,
    gpus: str | None,
    settings: Sequence[str],
    parallel: str,
    contention: bool,
    json_out: str | None,
    timeline_out: Path | None,
    alloc_conf: str,
    cure: bool,
    memory_plot: Path | None,
    samples: int,
    ranged: bool,
    strict: bool,
) -> None:
    """Predict the steps of a trace or a workload on a machine."""
    options.check_different(json_out, timeline_out, memory_plot)
    machine = options.machine_of(topology, settings)
    if gpus is not None and machine is None:
        raise UserError(f"--gpus {gpus}: {topology!r} has the GPUs of the trace; name a --topology")
    if parallel and machine is None:
        raise UserError(f"--parallel {parallel}: what was not captured needs a machine; name a --topology")
    config, chosen = parse_alloc_conf(alloc_conf), options.numbers("--gpus", gpus)
    asked = _Asked(inputs, parallel, machine, chosen, config, contention, cure, samples if ranged else 0, strict)
    with progress() as tell:
        timeline, told = _replay(asked, tell)
        _write_files(timeline, timeline_out, memory_plot, tell)
    tell_result(summary.encode(told), json_out, lambda: text.render_summary(told, printer()))


class _Asked(NamedTuple):
    """What is replayed where, and how; ``draws`` is 0 where nobody asked how sure the numbers are."""

    inputs: Sequence[Path]
    parallel: str
    machine: Machine | None
    gpus: Sequence[int]
    config: AllocatorConfig
    contention: bool
    cure: bool
    draws: int
    strict: bool


def _replay(asked: _Asked, tell: Callable[[str], None]) -> tuple[Timeline, Summary]:
    from sim.workload.inputs import read_inputs

    gc.disable()  # looking for cycles among a million events, which have none, takes an eighth of a replay
    workload = read_inputs(asked.inputs, tell, asked.parallel)
    tell("replaying")
    placement = place(workload.graph, asked.machine, asked.gpus, strict=asked.strict)
    begun = time.perf_counter()
    replayed = run(placement, contention=asked.contention)
    timeline = timeline_of(replayed, asked.config)
    seconds = time.perf_counter() - begun
    ops = sum(len(workload.graph.programs[r.program].ops) for r in placement.ranks)
    told = summarize(timeline, workload.measured, ops=ops, replay_seconds=seconds)
    if asked.machine is not None:
        from sim.whatif.energy import with_energy

        told = with_energy(told, placement, timeline)
    if asked.draws:
        from sim.whatif.ranges import ranges

        tell(f"drawing {asked.draws} times what may be wrong")
        told = ranges(replayed, timeline, asked.draws).on(told)
    if told.out_of_memory and asked.machine is not None and asked.cure:
        from sim.whatif.remedies import remedies

        cures = remedies(workload.graph, asked.machine, asked.gpus, asked.config, tell)
        told = msgspec.structs.replace(told, remedies=cures)
    return timeline, told


def _write_files(
    timeline: Timeline, timeline_out: Path | None, memory_plot: Path | None, tell: Callable[[str], None]
) -> None:
    if timeline_out is not None:
        tell(f"writing {timeline_out}")
        chrome.write_traces(timeline, timeline_out)
    if memory_plot is not None:
        from sim.report.plot import write_memory_plot

        tell(f"drawing {memory_plot}")
        write_memory_plot(timeline, memory_plot)
