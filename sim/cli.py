"""The commands: each reads, calls one function, prints.  The only place that joins the rooms."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import msgspec
from rich.console import Console

from sim.errors import UserError
from sim.place.captured import AS_CAPTURED
from sim.place.place import place
from sim.replay.allocator.config import AllocatorConfig, parse_alloc_conf
from sim.replay.engine import run
from sim.replay.replay import timeline_of
from sim.report import chrome, summary, text
from sim.report.summary import Summary
from sim.timeline import Timeline

if TYPE_CHECKING:
    from sim.graph import OpGraph
    from sim.topology.machine import Machine
    from sim.whatif.outcome import Rules
    from sim.whatif.solve import OneGpu
    from sim.workload.calibrate.spec import CalibrateSpec

# What only some commands need is imported where they need it: a replay as captured is over before torch, networkx and
# pydantic would be there.


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
_alloc_conf = click.option(
    "--alloc-conf", default="", metavar="KEY:VALUE,...",
    help="Settings of the caching allocator, as in PYTORCH_CUDA_ALLOC_CONF.",
)  # fmt: skip
_json = click.option("--json", "json_out", metavar="FILE|-", help="Write the result as JSON; - is standard output.")


_parallel = click.option(
    "--parallel", default="", metavar="SPEC",
    help="Make several ranks of a training step of one GPU: dp=8 adds what DistributedDataParallel does.",
)  # fmt: skip
_contention = click.option(
    "--no-contention", "contention", is_flag=True, flag_value=False, default=True,
    help="Nothing is shared: transfers have their links, kernels all SMs to themselves.",
)  # fmt: skip


_samples = click.option(
    "--samples", type=click.IntRange(2, 10_000), default=64, show_default=True, metavar="N",
    help="Draws of what may be wrong, for the ranges.",
)  # fmt: skip
_ranges = click.option(
    "--no-ranges", "ranged", is_flag=True, flag_value=False, default=True, help="Do not say how sure the numbers are."
)


@cli.command("replay")
@_inputs
@_topology
@_gpus
@_set
@_parallel
@_contention
@_json
@click.option(
    "--timeline", "timeline_out", type=click.Path(path_type=Path), metavar="FILE.pt.trace.json[.gz]",
    help="Write the replay as a trace for Perfetto, chrome://tracing or TensorBoard; a folder gets a file a rank.",
)  # fmt: skip
@_alloc_conf
@click.option(
    "--no-remedies", "cure", is_flag=True, flag_value=False, default=True,
    help="Where the job does not fit, do not try what would make it fit.",
)  # fmt: skip
@click.option("--memory-plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw memory over time.")
@_samples
@_ranges
@click.option("--strict", is_flag=True, help="Refuse kernels that no formula explains, instead of estimating them.")
def replay_command(
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
    machine = _machine(topology, settings)
    if parallel and machine is None:
        raise UserError(f"--parallel {parallel}: what was not captured needs a machine; name a --topology")
    _check_places(json_out, memory_plot)
    if timeline_out is not None:
        chrome.check_place(timeline_out)
    if memory_plot is not None:
        from sim.report.plot import check_plot_name

        check_plot_name(memory_plot)
    with _progress() as tell:
        config = parse_alloc_conf(alloc_conf)
        chosen = _numbers("--gpus", gpus)
        draws = samples if ranged else 0
        timeline, told = _replay(
            inputs,
            machine,
            chosen,
            config,
            tell,
            parallel,
            contention=contention,
            cure=cure,
            draws=draws,
            strict=strict,
        )
        if timeline_out is not None:
            tell(f"writing {timeline_out}")
            chrome.write_traces(timeline, timeline_out)
        if memory_plot is not None:
            from sim.report.plot import write_memory_plot

            tell(f"drawing {memory_plot}")
            write_memory_plot(timeline, memory_plot)
    _write_json(summary.encode(told), json_out)
    if json_out != "-":
        text.render_summary(told, Console(soft_wrap=False))


def _replay(
    inputs: Sequence[Path],
    machine: Machine | None,
    gpus: Sequence[int],
    config: AllocatorConfig,
    tell: Callable[[str], None],
    parallel: str,
    *,
    contention: bool,
    cure: bool,
    draws: int,
    strict: bool,
) -> tuple[Timeline, Summary]:
    from sim.workload.inputs import read_inputs

    gc.disable()  # looking for cycles among a million events, which have none, takes an eighth of a replay
    workload = read_inputs(inputs, tell, parallel)
    tell("replaying")
    placement = place(workload.graph, machine, gpus, strict=strict)
    begun = time.perf_counter()
    replayed = run(placement, contention=contention)
    timeline = timeline_of(replayed, config)
    seconds = time.perf_counter() - begun
    ops = sum(len(workload.graph.programs[r.program].ops) for r in placement.ranks)
    told = summary.summarize(timeline, workload.measured, ops=ops, replay_seconds=seconds)
    if machine is not None:
        from sim.whatif.energy import with_energy

        told = with_energy(told, placement, timeline)
    if draws:
        from sim.whatif.ranges import ranges

        tell(f"drawing {draws} times what may be wrong")
        told = ranges(replayed, timeline, draws).on(told)
    if told.out_of_memory and machine is not None and cure:
        from sim.whatif.remedies import remedies

        told = msgspec.structs.replace(told, remedies=remedies(workload.graph, machine, gpus, config, tell))
    return timeline, told


@cli.command()
@_inputs
@_topology
@click.option(
    "--vary", "varied", multiple=True, metavar="PATH=V1,V2,...",
    help="Values of a path of the topology, or topology=NAME,NAME; several: every combination.",
)  # fmt: skip
@click.option("--solve", metavar="PATH", help="Search the value of this path that reaches --target.")
@click.option(
    "--target", metavar="MEASURE=VALUE",
    help="speedup (against the base), scaling (against one GPU), step_ms, exposed_communication_ms.",
)  # fmt: skip
@_set
@_gpus
@_parallel
@_contention
@_json
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw the rows.")
@click.option(
    "--timeline", "timeline_out", type=click.Path(path_type=Path), metavar="FILE.pt.trace.json[.gz]",
    help="Write base and rows side by side into one trace for Perfetto.",
)  # fmt: skip
@_alloc_conf
@_samples
@_ranges
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
    from sim.whatif.outcome import Rules

    draws = samples if ranged and solve is None else 0
    rules = Rules(contention, parse_alloc_conf(alloc_conf), draws)
    asked = _Asked(inputs, parallel, topology, _assignments(settings), _numbers("--gpus", gpus), rules)
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
    if plot is not None:
        variants_plot.check_plot_name(plot)
    if timeline_out is not None:
        chrome.check_name(timeline_out)
    _check_places(json_out, plot, timeline_out)
    base = vary.base_machine(asked.topology, asked.settings, given)
    machines = vary.machines(asked.topology, asked.settings, given)
    with _progress() as tell:
        keep = timeline_out is not None
        answer = rows.what_if(
            asked.graph(tell), base, machines, asked.gpus, asked.rules, keep_timelines=keep, tell=tell
        )
        if timeline_out is not None:
            tell(f"writing {timeline_out}")
            side_by_side.write_side_by_side(answer.timelines, timeline_out)
        if plot is not None:
            variants_plot.write_plot(answer.told, plot)
    _write_json(variants.encode(answer.told), json_out)
    if json_out != "-":
        variants_text.render_what_if(answer.told, Console(soft_wrap=False))


def _solve(asked: _Asked, path: str, target: str, json_out: str | None) -> None:
    from sim.report import variants, variants_text
    from sim.whatif.solve import parse_target, solve

    wanted = parse_target(target)
    _check_places(json_out)
    with _progress() as tell:
        graph = asked.graph(tell)
        alone = asked.one_gpu(tell) if wanted.measure == "scaling" else None
        told = solve(graph, asked.topology, asked.settings, path, wanted, asked.gpus, asked.rules, tell, alone)
    _write_json(variants.encode(told), json_out)
    if json_out != "-":
        variants_text.render_solution(told, Console(soft_wrap=False))


@cli.command()
@click.argument("model", required=False, metavar="MODEL | [-- SCRIPT.py ARGS...]")
@click.argument("script_args", nargs=-1, metavar="", type=click.UNPROCESSED)
@click.option(
    "--config", type=click.Path(path_type=Path), metavar="FILE.yaml",
    help="Read any of these options, and `model`, from a file; those given here go first.",
)  # fmt: skip
@click.option("--batch", type=int, help="Sequences (or images) of a micro-batch on each data-parallel rank.")
@click.option("--seq", type=int, help="Tokens a sequence.")
@click.option("--mode", type=click.Choice(["forward", "train"]), help="Forward with loss [default], or a whole step.")
@click.option(
    "--dtype", type=click.Choice(["float16", "bfloat16", "float32"]),
    help="Of the parameters; float16 in forward and float32 in training unless told.",
)  # fmt: skip
@click.option(
    "--task", type=click.Choice(["auto", "causal-lm", "question-answering", "seq2seq-lm", "image-classification"]),
    help="The head on the model; by default what models of its type are for.",
)  # fmt: skip
@click.option("--attention", type=click.Choice(["sdpa", "eager", "flash"]), help="By default sdpa, as PyTorch picks.")
@click.option(
    "--parallel", metavar="SPEC",
    help="dp=8 (DistributedDataParallel in training), fsdp=8, tp=8, pp=4 or a product such as fsdp=4,tp=2.",
)  # fmt: skip
@click.option("--sequence-parallel", is_flag=True, default=None, help="With tp: split norms and residuals by tokens.")
@click.option(
    "--schedule", type=click.Choice(["1f1b", "gpipe", "interleaved"]),
    help="Of the pipeline of --parallel pp=4, which runs --micro-batches.  [default: 1f1b]",
)  # fmt: skip
@click.option("--stages-per-rank", type=int, help="Of --schedule interleaved.  [default: 2]")
@click.option(
    "--stage-layers", metavar="N,N,...", help="Layers of each stage of a pipeline; dealt out evenly unless told."
)
@click.option(
    "--liveness", type=click.Choice(["eager", "export"]),
    help="Free a forward's intermediates when Python does, or at their last use as an exported graph module does.",
)  # fmt: skip
@click.option("--autocast", type=click.Choice(["float16", "bfloat16"]), help="Train under torch.autocast.")
@click.option("--tf32", is_flag=True, default=None, help="Products of float32 may run in TF32.")
@click.option("--channels-last", is_flag=True, default=None, help="Memory format of an image model.")
@click.option(
    "--master-weights", is_flag=True, default=None, help="The optimizer works on float32 copies of half parameters."
)
@click.option("--loss-scaling", is_flag=True, default=None, help="Train with a GradScaler.")
@click.option("--optimizer", type=click.Choice(["adamw", "sgd", "adafactor", "none"]), help="By default adamw.")
@click.option("--optimizer-kernels", type=click.Choice(["foreach", "fused", "for-loop"]), help="By default foreach.")
@click.option("--momentum", type=float, help="Of --optimizer sgd.")
@click.option("--max-grad-norm", type=float, help="Clip gradients to this norm.")
@click.option("--micro-batches", type=int, help="So many batches a step: accumulated, or of a pipeline.")
@click.option("--checkpoint", type=click.Choice(["none", "full", "selective"]), help="Recompute activations.")
@click.option("--bucket-mib", type=float, help="Size of DistributedDataParallel's buckets [default: 1, then 25].")
@click.option("--gradient-as-bucket-view", is_flag=True, default=None, help="DistributedDataParallel's option.")
@click.option(
    "--reshard-after-forward/--no-reshard-after-forward", default=None, help="FSDP's option [default: reshard]."
)
@click.option(
    "--fsdp-dtype", type=click.Choice(["float16", "bfloat16", "float32"]), help="FSDP's mixed precision: parameters."
)
@click.option(
    "--fsdp-reduce-dtype", type=click.Choice(["float16", "bfloat16", "float32"]),
    help="FSDP's mixed precision: gradients.",
)  # fmt: skip
@click.option("--warmup", type=int, help="With a script: steps before the recorded one.  [default: 1]")
@click.option(
    "--assume-value", type=float, metavar="NUMBER",
    help="With a script: what it is answered where it reads a tensor's value; without it such a read is an error.",
)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="FILE.workload.json.gz")
def synth(
    out: Path, config: Path | None, script_args: Sequence[str], warmup: int | None, assume_value: float | None,
    **given: Any,
) -> None:  # fmt: skip
    """Make the graph of one step of MODEL, or of a training script, with no GPU and no weights."""
    from sim import graph as graphs
    from sim.workload.inputs import WORKLOAD_SUFFIX
    from sim.workload.script.spec import is_script

    if not out.name.endswith(WORKLOAD_SUFFIX):
        raise UserError(f"--out {out}: the name of a workload file ends in {WORKLOAD_SUFFIX}")
    _check_places(str(out))
    if is_script(given["model"]):
        graph = _of_script(given.pop("model"), script_args, warmup, assume_value, config=config, **given)
    elif script_args or warmup is not None or assume_value is not None:
        what = script_args[0] if script_args else "--warmup" if warmup is not None else "--assume-value"
        raise UserError(f"{what}: belongs to a script, as in `tracesim synth --out FILE -- SCRIPT.py ARGS...`")
    else:
        graph = _of_model(config, given)
    graphs.write(graph, out)
    ranks, ops = len(graph.ranks), sum(len(p.ops) for p in graph.programs)
    click.echo(f"{out}: {graph.name}, {ranks} rank{'s' * (ranks > 1)}, {ops} operations; replay it with")
    click.echo(f"  tracesim replay {out} --topology {_large_enough(ranks)}")


def _of_model(config: Path | None, given: dict[str, Any]) -> OpGraph:
    from sim.workload.spec import from_file, from_options

    spec = from_options(**given) if config is None else from_file(config, **given)
    spec.check()
    with _progress() as tell:
        tell(f"building {spec.model} under fake tensors")
        from sim.workload.synth import synthesize

        return synthesize(spec, tell)


def _of_script(
    script: str,
    args: Sequence[str],
    warmup: int | None,
    assume_value: float | None,
    parallel: str | None,
    **others: Any,
) -> OpGraph:
    from sim.workload.script.spec import script_spec

    spec = script_spec(script, args, parallel, warmup, assume_value, others)
    spec.check()
    from sim.workload.script.run import synthesize_script

    with contextlib.redirect_stdout(sys.stdout), contextlib.redirect_stderr(sys.stderr):
        return synthesize_script(spec, _line_by_line())


def _large_enough(ranks: int) -> str:
    """A shipped machine that has a GPU for each rank, or what to write in place of one."""
    for gpus, name in ((1, "a5000x1"), (8, "a5000x8"), (16, "a5000x8x2-100g")):
        if ranks <= gpus:
            return name
    return f"FILE.yaml     (a machine of at least {ranks} GPUs)"


@cli.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("capture"), show_default=True, metavar="DIR",
    help="The folder for rank0.pt.trace.json.gz, ... and capture.json; made where it is missing.",
)  # fmt: skip
@click.option("--steps", type=int, default=5, show_default=True, help="Steps to record.")
@click.option("--warmup", type=int, default=3, show_default=True, help="Steps to leave out before them.")
@click.option("--model", metavar="NAME", help="Run this model, with random weights.")
@click.option("--batch", type=int, help="With --model: sequences a step on each rank.")
@click.option("--seq", type=int, help="With --model: tokens a sequence.")
@click.option("--mode", type=click.Choice(["forward", "train"]), help="With --model.  [default: forward]")
@click.option(
    "--dtype", type=click.Choice(["float16", "bfloat16", "float32"]), help="With --model.  [default: float32]"
)
@click.option("--to-the-end", is_flag=True, help="Let the script run on after the last recorded step.")
@click.argument("script", nargs=-1, metavar="[-- SCRIPT.py ARGS...]", type=click.UNPROCESSED)
@click.pass_obj
def trace(words: Sequence[str], /, out: Path, steps: int, warmup: int, script: Sequence[str], **run: Any) -> None:
    """Record the steps of a model or a script under torch.profiler: one trace a rank."""
    from sim.workload.capture.capture import capture
    from sim.workload.capture.spec import CaptureSpec, check_steps, what_to_run

    check_steps(steps, warmup)
    spec = CaptureSpec(what_to_run(script=script, **run), out, steps, warmup, ("tracesim", *words))
    # A script may put something else in the place of its output, or close it; what follows is ours to say.
    with contextlib.redirect_stdout(sys.stdout), contextlib.redirect_stderr(sys.stderr):
        done = capture(spec, _line_by_line())
    closed = sys.stdout.closed
    if done.note:
        click.echo(f"tracesim: warning: {done.note}", err=True)
    if done.rank == 0:
        ranks = f" of {done.ranks} ranks" if done.ranks > 1 else ""
        click.echo(f"{out}: {done.steps} step{'s' * (done.steps > 1)}{ranks}; replay it with", err=closed)
        click.echo(f"  tracesim replay {out} --topology {AS_CAPTURED}", err=closed)


@cli.command()
@click.argument("kind")
@click.option("--bytes", "sizes", required=True, metavar="N[,N...]", help="Size of the whole tensor in bytes.")
@click.option("--ranks", type=int, required=True, help="How many GPUs take part: the first ones, or those of --gpus.")
@_topology
@_gpus
@_set
@_json
def collective(
    kind: str,
    sizes: str,
    ranks: int,
    topology: str,
    gpus: str | None,
    settings: Sequence[str],
    json_out: str | None,
) -> None:
    """Time of one collective, with the algorithm and protocol chosen, as nccl-tests counts it."""
    from sim.place.collectives import plan
    from sim.report.collectives import CollectiveTimeRow, encode_rows, render_rows

    machine = _named_machine(topology, settings)
    if not 1 <= ranks <= len(machine.gpus):
        count = len(machine.gpus)
        raise UserError(f"--ranks {ranks}: {machine.name} has {count} devices; give so many, or a larger --topology")
    chosen = _numbers("--gpus", gpus) or tuple(range(ranks))
    if len(chosen) != ranks:
        raise UserError(f"--gpus names {len(chosen)} GPUs for --ranks {ranks}")
    plans = [plan(machine, kind, size, chosen) for size in _numbers("--bytes", sizes)]
    rows = [
        CollectiveTimeRow(
            p.kind, p.nbytes, p.ranks, p.algorithm, p.protocol, p.call_us, p.algbw_gb_s, p.busbw_gb_s, p.note
        )
        for p in plans
    ]
    _write_json(encode_rows(rows), json_out)
    if json_out != "-":
        render_rows(rows, Console())


@cli.command()
@click.argument("snapshot", type=click.Path(path_type=Path), metavar="SNAPSHOT.pickle")
@_json
def allocator(snapshot: Path, json_out: str | None) -> None:
    """Replay a CUDA memory snapshot's events through the simulated allocator and compare every address."""
    from sim.replay.allocator.snapshot import replay_snapshot
    from sim.report.allocator import render_comparison

    compared = msgspec.to_builtins(replay_snapshot(snapshot))
    _write_json(msgspec.json.format(msgspec.json.encode(compared)) + b"\n", json_out)
    if json_out != "-":
        render_comparison(str(snapshot), compared, Console())


@cli.command()
@click.argument("name_or_file")
@_set
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw the machine.")
def topology(name_or_file: str, settings: Sequence[str], plot: Path | None) -> None:
    """Show a machine: devices, links, routes, measured and derived bandwidths."""
    from sim.topology.load import load_topology
    from sim.topology.show import show

    machine = load_topology(name_or_file, _assignments(settings))
    show(machine, Console())
    if plot is not None:
        from sim.topology.plot import plot as draw

        draw(machine, plot)
        click.echo(f"drawn to {plot}")


@cli.command()
@click.argument("op")
@click.option(
    "--shapes", type=click.Path(path_type=Path), metavar="FILE.csv", help="Columns batch, m, n, k or rows, columns."
)
@click.option("--batch", type=int, help="Products in one batch (attention: sequences times heads); 1 if not said.")
@click.option("--m", type=int, help="Rows of the product (attention: queries).")
@click.option("--n", type=int, help="Columns of the product (attention: keys).")
@click.option("--k", type=int, help="What is summed over (attention: head size).")
@click.option("--rows", type=int, help="Rows of a softmax, layer norm or elementwise op.")
@click.option("--columns", type=int, help="Columns of it: what a softmax or layer norm normalizes.")
@click.option("--dtype", required=True, metavar="D", help="float32, tfloat32, float16, bfloat16, ...")
@click.option("--device", required=True, metavar="NAME_OR_FILE", help="A shipped device profile or a YAML file.")
@click.option("--strict", is_flag=True, help="Refuse a dtype that the device's data sheet has no rate for.")
@_json
def kernel(
    op: str, shapes: Path | None, dtype: str, device: str, strict: bool, json_out: str | None, **sizes: int | None
) -> None:
    """Time of one kernel alone: OP is gemm, softmax, layer_norm, attention or an elementwise name (add, relu, ...)."""
    from sim.place.kernels.show import show
    from sim.place.kernels.single import KernelRows, kernel_rows, read_shapes
    from sim.topology.device import load_device

    given = {name: size for name, size in sizes.items() if size is not None}
    if shapes is not None and given:
        raise UserError(f"--shapes and --{next(iter(given))}: give a file of shapes or one shape, not both")
    profile = load_device(device)
    found = kernel_rows(op, read_shapes(shapes, op) if shapes is not None else [given], dtype, profile, strict)
    _write_json(msgspec.json.format(msgspec.json.encode(KernelRows(found)), indent=2) + b"\n", json_out)
    if json_out != "-":
        show(found, Console())


@cli.command()
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE.yaml", help="The device profile to write.")
@click.option("--links", is_flag=True, help="Measure collectives over all devices too, under torchrun.")
@click.option("--quick", is_flag=True, help="Fewer and smaller sizes.")
@click.option(
    "--only",
    metavar="SECTION,...",
    help="Measure only these of host, launch, gemm, copy, elementwise, softmax, layer_norm, attention, links.",
)
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Of a CPU; torchrun gives each rank one.")
@click.option("--grid", type=click.Choice(["full", "quick", "tiny"]), hidden=True)
@click.option("--compare", nargs=2, metavar="A B", help="Measure nothing: two profiles or topologies side by side.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="With --compare: draw them.")
@click.pass_obj
def calibrate(
    words: Sequence[str],
    /,
    out: Path | None,
    links: bool,
    quick: bool,
    only: str | None,
    threads: int | None,
    grid: str | None,
    compare: tuple[str, str] | None,
    plot: Path | None,
) -> None:
    """Measure this machine's devices and links into a device profile and a topology; or compare two."""
    if compare is not None:
        if out is not None or links or quick or only or threads:
            raise UserError("--compare measures nothing: give it two profiles, and --plot FILE.png, alone")
        _compare(compare, plot)
        return
    if out is None or plot is not None:
        raise UserError("give --out FILE.yaml to measure this machine, or --compare A B [--plot FILE.png]")
    from sim.workload.calibrate.spec import GRIDS, CalibrateSpec, check_out, sections_of

    check_out(out)
    chosen = GRIDS[grid or ("quick" if quick else "full")]
    spec = CalibrateSpec(sections_of(only, links), chosen, threads, ("tracesim", *words))
    _calibrate(spec, out)


def _calibrate(spec: CalibrateSpec, out: Path) -> None:
    from sim.place.calibration.write import tell_fits, write_files
    from sim.workload.calibrate.journal import Journal
    from sim.workload.calibrate.run import machine_for, measure
    from sim.workload.calibrate.spec import partial_file

    with Journal(partial_file(out), machine_for(spec)) as journal:
        if journal.resumed:
            click.echo(f"tracesim: going on after {journal.resumed} measurements of {journal.path}", err=True)
        try:
            with _bar() as tell:
                left_out = measure(spec, journal, tell)
        except KeyboardInterrupt:
            kept = len(journal.taken)
            click.echo(
                f"tracesim: interrupted; {kept} measurements are kept in {journal.path}, the same command goes on",
                err=True,
            )
            raise click.Abort from None
        with _progress() as tell_line:
            tell_line("fitting the models to the measurements")
            done = write_files(journal.measurements(), out)
        journal.remove()
    tell_fits(done, len(left_out), Console())


def _compare(names: tuple[str, str], plot: Path | None) -> None:
    from sim.place.calibration import compare

    if plot is not None:
        from sim.place.calibration.compare_plot import check_plot_name, write_plot

        check_plot_name(plot)
    left, right = (compare.read_side(name) for name in names)
    compare.show(left, right, Console())
    if plot is not None:
        write_plot(left, right, plot)
        click.echo(f"drawn to {plot}")


# Reading options ----------------------------------------


def _machine(topology: str, settings: Sequence[str]) -> Machine | None:
    if topology == AS_CAPTURED:
        if settings:
            raise UserError(f"--set {settings[0]}: {AS_CAPTURED!r} has no values to change; name a topology")
        return None
    from sim.topology.load import load_topology

    return load_topology(topology, _assignments(settings))


def _named_machine(topology: str, settings: Sequence[str]) -> Machine:
    machine = _machine(topology, settings)
    if machine is None:
        raise UserError(f"--topology {AS_CAPTURED}: no trace was captured here; name a machine such as a5000x8")
    return machine


def _assignments(settings: Sequence[str]) -> dict[str, str]:
    values: dict[str, str] = {}
    for setting in settings:
        path, equals, value = setting.partition("=")
        if not (path and equals and value):
            raise UserError(f"--set {setting!r}: write PATH=VALUE, as in links.pcie.bandwidth_gb_s=32")
        values[path] = value
    return values


MOST_DIGITS = 30  # more than any size or GPU has, and fewer than int() refuses


def _numbers(option: str, given: str | None) -> tuple[int, ...]:
    if given is None:
        return ()
    parts = given.split(",")
    if not all(part.strip().isascii() and part.strip().isdigit() and len(part) <= MOST_DIGITS for part in parts):
        raise UserError(f"{option} {given!r}: write whole numbers with commas, as in 1,2")
    return tuple(int(part) for part in parts)


# Telling ----------------------------------------


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is being done, on a terminal only."""
    with Console(stderr=True).status("starting") as status:
        yield status.update


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on stderr, on a terminal only: what is done, of how much, and what comes next."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("starting")
        yield lambda done, total, doing: progress.update(bar, completed=done, total=total, description=doing)


def _line_by_line() -> Callable[[str], None]:
    """The same beside the output of a script, which a status line would garble."""
    return lambda doing: click.echo(f"tracesim: {doing}", err=True) if sys.stderr.isatty() else None


def _write_json(content: bytes, target: str | None) -> None:
    from sim.files import write_whole

    if target == "-":
        click.echo(content, nl=False)
    elif target is not None:
        write_whole(Path(target), content)


def _check_places(json_out: str | None, *files: Path | None) -> None:
    """What will be written can be: said before the work, not behind it."""
    from sim.files import check_can_appear

    for file in (None if json_out in (None, "-") else Path(str(json_out)), *files):
        if file is not None:
            check_can_appear(file)


def _no_more_output() -> None:
    """What is still in the buffers goes nowhere: nothing is written, and nothing fails, when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(args: Sequence[str] | None = None) -> None:
    """The command: what a user can cause is one line on stderr and exit code 2."""
    words = list(sys.argv[1:] if args is None else args)
    try:
        cli.main(args=words, prog_name="tracesim", standalone_mode=False, obj=words)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
    except click.Abort:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output (head, less) has gone: nothing more to say, and nothing to complain of.
        _no_more_output()
    except OSError as error:
        if error.filename is not None:  # a file, not our output: a mistake of ours
            raise
        problem = f"standard output: cannot be written ({error.strerror}); send it elsewhere"
        click.echo(f"tracesim: error: {problem}", err=True)
        _no_more_output()
        sys.exit(2)
    except (click.ClickException, UserError) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"tracesim: error: {' '.join(message.split())}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
