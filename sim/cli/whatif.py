"""``tracesim whatif``: change the machine and see what changes, or search the value that reaches a target."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from sim.cli import options
from sim.cli.telling import printer, progress, tell_result
from sim.errors import UserError
from sim.place.captured import AS_CAPTURED
from sim.replay.allocator.config import parse_alloc_conf
from sim.report import chrome

if TYPE_CHECKING:
    from sim.graph import OpGraph
    from sim.whatif.outcome import Rules
    from sim.whatif.solve import OneGpu


@click.command()
@options.inputs
@options.topology
@click.option(
    "--vary", "varied", multiple=True, metavar="PATH=V1,V2,...",
    help="Values of a path of the topology, or topology=NAME,NAME; several: every combination.",
)  # fmt: skip
@click.option("--solve", metavar="PATH", help="Search the value of this path that reaches --target.")
@click.option(
    "--target", metavar="MEASURE=VALUE",
    help="speedup (against the base), scaling (against one GPU), step_ms, exposed_communication_ms.",
)  # fmt: skip
@options.settings
@options.gpus
@options.parallel
@options.contention
@options.json_out
@options.picture("--plot", "Draw the rows.")
@click.option(
    "--timeline", "timeline_out", type=options.FILE, metavar="FILE.pt.trace.json[.gz]",
    help="Write base and rows side by side into one trace for Perfetto.",
    callback=options.before_the_work(chrome.check_file),
)  # fmt: skip
@options.alloc_conf
@options.samples
@options.ranges
def whatif(
    inputs: Sequence[Path],
    topology: str,
    varied: Sequence[str],
    solve: str | None,
    target: str | None,
    settings: Sequence[str],
    gpus: str | None,
    parallel: str,
    contention: bool,
    json_out: str | None,
    plot: Path | None,
    timeline_out: Path | None,
    alloc_conf: str,
    samples: int,
    ranged: bool,
) -> None:
    """Change the machine and see what changes, and why; or search the value that reaches a target."""
    if topology == AS_CAPTURED:
        raise UserError(f"--topology {AS_CAPTURED}: a what-if needs a machine to change; name a topology")
    options.check_different(json_out, plot, timeline_out)
    from sim.whatif.outcome import Rules

    draws = samples if ranged and solve is None else 0
    rules = Rules(contention, parse_alloc_conf(alloc_conf), draws)
    chosen = options.numbers("--gpus", gpus)
    asked = _Asked(inputs, parallel, topology, options.assignments(settings), chosen, rules)
    if solve is None and target is None:
        _vary(asked, varied, json_out, plot, timeline_out)
    elif solve is None or target is None or varied or plot or timeline_out:
        raise UserError("--solve PATH and --target MEASURE=VALUE go together, without --vary, --plot and --timeline")
    else:
        _solve(asked, solve, target, json_out)


class _Asked(NamedTuple):
    """What all what-ifs start from: a job, a machine as it is, and how to replay."""

    inputs: Sequence[Path]
    parallel: str
    topology: str
    settings: dict[str, str]
    gpus: Sequence[int]
    rules: Rules

    def graph(self, tell: Callable[[str], None]) -> OpGraph:
        from sim.workload.inputs import read_inputs

        gc.disable()  # as for a replay: its events hold no cycles
        return read_inputs(self.inputs, tell, self.parallel).graph

    def one_gpu(self, tell: Callable[[str], None]) -> OneGpu:
        from sim.whatif.solve import OneGpu
        from sim.workload.replicas import one_gpu

        return OneGpu(*one_gpu(self.inputs, self.parallel, tell))


def _vary(
    asked: _Asked, varied: Sequence[str], json_out: str | None, plot: Path | None, timeline_out: Path | None
) -> None:
    from sim.report import side_by_side, variants, variants_plot, variants_text
    from sim.whatif import rows, vary

    given = vary.parse(varied)
    if not given:
        raise UserError("nothing to vary: give --vary PATH=V1,V2,... as in --vary links.pcie.bandwidth_gb_s=8,16,32")
    base = vary.base_machine(asked.topology, asked.settings, given)
    machines = vary.machines(asked.topology, asked.settings, given)
    with progress() as tell:
        keep = timeline_out is not None
        answer = rows.what_if(
            asked.graph(tell), base, machines, asked.gpus, asked.rules, keep_timelines=keep, tell=tell
        )
        if timeline_out is not None:
            tell(f"writing {timeline_out}")
            side_by_side.write_side_by_side(answer.timelines, timeline_out)
        if plot is not None:
            variants_plot.write_plot(answer.told, plot)
    told = answer.told
    tell_result(variants.encode(told), json_out, lambda: variants_text.render_what_if(told, printer()))


def _solve(asked: _Asked, path: str, target: str, json_out: str | None) -> None:
    from sim.report import variants, variants_text
    from sim.whatif.solve import parse_target, solve

    wanted = parse_target(target)
    with progress() as tell:
        graph = asked.graph(tell)
        alone = asked.one_gpu(tell) if wanted.measure == "scaling" else None
        told = solve(graph, asked.topology, asked.settings, path, wanted, asked.gpus, asked.rules, tell, alone)
    tell_result(variants.encode(told), json_out, lambda: variants_text.render_solution(told, printer()))
