"""The commands: each reads, calls one function, prints.  The only place that joins the rooms."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from sim.errors import UserError
from sim.place.captured import AS_CAPTURED
from sim.place.place import place
from sim.replay.replay import replay
from sim.report import chrome, summary, text
from sim.report.summary import Summary
from sim.timeline import Timeline
from sim.topology.load import load_topology
from sim.topology.machine import Machine

Options = Callable[[Callable[..., Any]], Callable[..., Any]]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="tracesim", prog_name="tracesim")
def cli() -> None:
    """How long will this training step take on that machine, and does it fit?"""


# Options that several commands share ----------------------------------------

_inputs = click.argument("inputs", metavar="INPUT...", nargs=-1, required=True, type=click.Path(path_type=Path))
_topology = click.option(
    "--topology", required=True, metavar="NAME_OR_FILE",
    help=f"A shipped machine, a YAML file, or {AS_CAPTURED!r}: the machine the trace was taken on.",
)  # fmt: skip
_set = click.option("--set", "settings", multiple=True, metavar="PATH=VALUE", help="Change a value of the topology.")
_gpus = click.option("--gpus", metavar="I,J,...", help="The topology's GPUs that the ranks go onto, in order.")
_json = click.option("--json", "json_out", metavar="FILE|-", help="Write the result as JSON; - is standard output.")


_contention = click.option(
    "--no-contention", "contention", is_flag=True, flag_value=False, default=True,
    help="Let transfers that cross a link at the same time, and kernels beside NCCL's, not share: what sharing costs.",
)  # fmt: skip


@cli.command("replay")
@_inputs
@_topology
@_gpus
@_set
@_contention
@_json
@click.option(
    "--timeline", "timeline_out", type=click.Path(path_type=Path), metavar="FILE.pt.trace.json[.gz]",
    help="Write the replay as a trace for Perfetto, chrome://tracing or TensorBoard; a folder gets a file a rank.",
)  # fmt: skip
def replay_command(
    inputs: Sequence[Path],
    topology: str,
    gpus: str | None,
    settings: Sequence[str],
    contention: bool,
    json_out: str | None,
    timeline_out: Path | None,
) -> None:
    """Predict the steps of a trace or a workload on a machine."""
    machine = _machine(topology, settings)
    with _progress() as tell:
        timeline, told = _replay(inputs, machine, _numbers("--gpus", gpus), tell, contention=contention)
        if timeline_out is not None:
            tell(f"writing {timeline_out}")
            chrome.write_traces(timeline, timeline_out)
    _write_json(summary.encode(told), json_out)
    if json_out != "-":
        text.render_summary(told, Console(soft_wrap=False))


def _replay(
    inputs: Sequence[Path],
    machine: Machine | None,
    gpus: Sequence[int],
    tell: Callable[[str], None],
    *,
    contention: bool,
) -> tuple[Timeline, Summary]:
    from sim.workload.inputs import read_inputs

    workload = read_inputs(inputs, tell)
    tell("replaying")
    placement = place(workload.graph, machine, gpus)
    begun = time.perf_counter()
    timeline = replay(placement, contention=contention)
    seconds = time.perf_counter() - begun
    ops = sum(len(workload.graph.programs[r.program].ops) for r in placement.ranks)
    return timeline, summary.summarize(timeline, workload.measured, ops=ops, replay_seconds=seconds)


@cli.command()
@_inputs
@_topology
@click.option(
    "--vary", "varied", multiple=True, metavar="PATH=V1,V2,...",
    help="Values of a path of the topology, or topology=NAME,NAME; several: every combination.",
)  # fmt: skip
@_set
@_gpus
@_contention
@_json
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw the rows.")
@click.option(
    "--timeline", "timeline_out", type=click.Path(path_type=Path), metavar="FILE.pt.trace.json[.gz]",
    help="Write base and rows side by side into one trace for Perfetto.",
)  # fmt: skip
def whatif(
    inputs: Sequence[Path],
    topology: str,
    varied: Sequence[str],
    settings: Sequence[str],
    gpus: str | None,
    contention: bool,
    json_out: str | None,
    plot: Path | None,
    timeline_out: Path | None,
) -> None:
    """Change the machine and see what changes, and why."""
    from sim.report import side_by_side, variants, variants_plot, variants_text
    from sim.whatif import rows, vary
    from sim.workload.inputs import read_inputs

    if topology == AS_CAPTURED:
        raise UserError(f"--topology {AS_CAPTURED}: a what-if needs a machine to change; name a topology")
    given = vary.parse(varied)
    if not given:
        raise UserError("nothing to vary: give --vary PATH=V1,V2,... as in --vary links.pcie.bandwidth_gb_s=8,16,32")
    if plot is not None:
        variants_plot.check_plot_name(plot)
    if timeline_out is not None:
        chrome.check_name(timeline_out)
    base = vary.base_machine(topology, _assignments(settings), given)
    machines = vary.machines(topology, _assignments(settings), given)
    with _progress() as tell:
        graph = read_inputs(inputs, tell).graph
        answer = rows.what_if(
            graph, base, machines, _numbers("--gpus", gpus),
            contention=contention, keep_timelines=timeline_out is not None, tell=tell,
        )  # fmt: skip
        if timeline_out is not None:
            tell(f"writing {timeline_out}")
            side_by_side.write_side_by_side(answer.timelines, timeline_out)
        if plot is not None:
            variants_plot.write_plot(answer.told, plot)
    _write_json(variants.encode(answer.told), json_out)
    if json_out != "-":
        variants_text.render_what_if(answer.told, Console(soft_wrap=False))


@cli.command()
@click.argument("model")
@click.option("--batch", type=int, required=True, help="Sequences a step on each data-parallel rank.")
@click.option("--seq", type=int, required=True, help="Tokens a sequence.")
@click.option("--mode", type=click.Choice(["forward"]), default="forward", show_default=True)
@click.option("--dtype", type=click.Choice(["float16", "bfloat16", "float32"]), default="float16", show_default=True)
@click.option("--parallel", default="", metavar="SPEC", help="dp=8, tp=8 or a product such as dp=2,tp=4.")
@click.option(
    "--liveness", type=click.Choice(["eager", "export"]), default="eager", show_default=True,
    help="Free intermediates when Python does, or at their last use as an exported graph module does.",
)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="FILE.workload.json.gz")
def synth(out: Path, **spec: Any) -> None:
    """Make the graph of one step of MODEL, with no GPU and no weights."""
    from sim import graph as graphs
    from sim.workload.inputs import WORKLOAD_SUFFIX

    if not out.name.endswith(WORKLOAD_SUFFIX):
        raise UserError(f"--out {out}: the name of a workload file ends in {WORKLOAD_SUFFIX}")
    with _progress() as tell:
        tell(f"building {spec['model']} under fake tensors")
        from sim.workload.synth import SynthSpec, synthesize

        graph = synthesize(SynthSpec(**spec))
    graphs.write(graph, out)
    ranks, ops = len(graph.ranks), sum(len(p.ops) for p in graph.programs)
    click.echo(f"{out}: {graph.name}, {ranks} rank{'s' * (ranks > 1)}, {ops} operations; replay it with")
    click.echo(f"  tracesim replay {out} --topology {'a5000x1' if ranks == 1 else 'a5000x8'}")


@cli.command()
@click.argument("name_or_file")
@_set
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw the machine.")
def topology(name_or_file: str, settings: Sequence[str], plot: Path | None) -> None:
    """Show a machine: devices, links, routes, measured and derived bandwidths."""
    from sim.topology.show import show

    machine = load_topology(name_or_file, _assignments(settings))
    show(machine, Console())
    if plot is not None:
        from sim.topology.plot import plot as draw

        draw(machine, plot)
        click.echo(f"drawn to {plot}")


# Reading options ----------------------------------------


def _machine(topology: str, settings: Sequence[str]) -> Machine | None:
    if topology == AS_CAPTURED:
        if settings:
            raise UserError(f"--set {settings[0]}: {AS_CAPTURED!r} has no values to change; name a topology")
        return None
    return load_topology(topology, _assignments(settings))


def _assignments(settings: Sequence[str]) -> dict[str, str]:
    values: dict[str, str] = {}
    for setting in settings:
        path, equals, value = setting.partition("=")
        if not (path and equals and value):
            raise UserError(f"--set {setting!r}: write PATH=VALUE, as in links.pcie.bandwidth_gb_s=32")
        values[path] = value
    return values


def _numbers(option: str, given: str | None) -> tuple[int, ...]:
    if given is None:
        return ()
    parts = given.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise UserError(f"{option} {given!r}: write whole numbers with commas, as in 1,2")
    return tuple(int(part) for part in parts)


# Telling ----------------------------------------


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is being done, on a terminal only."""
    with Console(stderr=True).status("starting") as status:
        yield status.update


def _write_json(content: bytes, target: str | None) -> None:
    from sim.files import write_whole

    if target == "-":
        click.echo(content, nl=False)
    elif target is not None:
        write_whole(Path(target), content)


def main(args: Sequence[str] | None = None) -> None:
    """The command: what a user can cause is one line on stderr and exit code 2."""
    try:
        cli.main(args=args, prog_name="tracesim", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
    except click.Abort:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output (head, less) has gone: nothing more to say, and nothing to complain of.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (click.ClickException, UserError) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"tracesim: error: {' '.join(message.split())}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
