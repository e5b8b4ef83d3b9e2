"""``tracesim synth``: the graph of one step of a model or a script, with no GPU and no weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sim import graph as graphs
from sim.cli import options
from sim.cli.telling import line_by_line, own_streams, progress
from sim.errors import InputError, UserError
from sim.files import check_can_appear

if TYPE_CHECKING:
    from sim.graph import OpGraph

# Options that a model by name does not have.
OF_A_SCRIPT = ("ranks", "hosts", "warmup", "assume_value")


@click.command()
@click.argument("model", required=False, metavar="MODEL | [-- SCRIPT.py ARGS...]")
@click.argument("script_args", nargs=-1, metavar="", type=click.UNPROCESSED)
@click.option(
    "--config", type=options.FILE, metavar="FILE.yaml",
    help="Read any of these options, and `model`, from a file; those given here go first.",
)  # fmt: skip
@click.option("--batch", type=int, help="Sequences (or images) of a micro-batch on each data-parallel rank.")
@click.option("--seq", type=int, help="Tokens a sequence.")
@click.option("--mode", type=options.MODES, help="Forward with loss [default], or a whole step.")
@click.option(
    "--dtype", type=options.FLOATS, help="Of the parameters; float16 in forward and float32 in training unless told."
)
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
@click.option("--fsdp-dtype", type=options.FLOATS, help="FSDP's mixed precision: parameters.")
@click.option("--fsdp-reduce-dtype", type=options.FLOATS, help="FSDP's mixed precision: gradients.")
@click.option(
    "--ranks", type=int, metavar="N",
    help="With a script that makes its job itself (init_process_group, DistributedDataParallel, fully_shard,"
    " parallelize_module): the ranks that torchrun would start; it runs as the first.",
)  # fmt: skip
@click.option(
    "--hosts", type=int, metavar="N",
    help="With --ranks: the machines that torchrun would start them on, in equal parts.  [default: 1]",
)  # fmt: skip
@click.option("--warmup", type=int, help="With a script: steps before the recorded one.  [default: 1]")
@click.option(
    "--assume-value", type=float, metavar="NUMBER",
    help="With a script: what it is answered where it reads a tensor's value; without it such a read is an error.",
)  # fmt: skip
@click.option("--out", type=options.FILE, required=True, metavar="FILE.workload.json.gz")
def synth(out: Path, config: Path | None, script_args: Sequence[str], **given: Any) -> None:
    """Make the graph of one step of MODEL, or of a training script, with no GPU and no weights."""
    from sim.workload.inputs import WORKLOAD_SUFFIX
    from sim.workload.script.spec import is_script

    if not out.name.endswith(WORKLOAD_SUFFIX):
        raise UserError(f"--out {out}: the name of a workload file ends in {WORKLOAD_SUFFIX}")
    check_can_appear(out)
    of_script = {name: given.pop(name) for name in OF_A_SCRIPT}
    astray = [*script_args, *(f"--{n.replace('_', '-')}" for n, value in of_script.items() if value is not None)]
    if is_script(given["model"]):
        of_script["parallel"] = given.pop("parallel")
        graph = _of_script(given.pop("model"), script_args, of_script, {"config": config, **given})
    elif astray:
        raise UserError(f"{astray[0]}: belongs to a script, as in `tracesim synth --out FILE -- SCRIPT.py ARGS...`")
    else:
        graph = _of_model(config, given)
    graphs.write(graph, out)
    ranks, ops = len(graph.ranks), sum(len(p.ops) for p in graph.programs)
    click.echo(f"{out}: {graph.name}, {ranks} rank{'s' * (ranks > 1)}, {ops} operations; replay it with")
    click.echo(f"  tracesim replay {out} --topology {large_enough(ranks)}")


def _of_model(config: Path | None, given: dict[str, Any]) -> OpGraph:
    from sim.workload.spec import from_file, from_options

    if config is None and given["model"] is None:
        raise UserError(
            "MODEL is missing: a model's name, as in `tracesim synth gpt2 --batch 8 --seq 512 --out FILE`, or a script,"
            " as in `tracesim synth --out FILE -- SCRIPT.py`"
        )
    spec = from_options(**given) if config is None else from_file(config, **given)
    try:
        spec.check()
    except UserError as error:
        raise error if config is None else InputError(config, str(error)) from None
    with progress() as tell:
        tell(f"building {spec.model} under fake tensors")
        from sim.workload.synth import synthesize

        return synthesize(spec, tell)


def _of_script(script: str, args: Sequence[str], own: dict[str, Any], others: dict[str, Any]) -> OpGraph:
    from sim.workload.script.spec import script_spec

    spec = script_spec(script, args, own, others)
    spec.check()
    from sim.workload.script.run import synthesize_script

    with own_streams():
        return synthesize_script(spec, line_by_line())


def large_enough(ranks: int) -> str:
    """A shipped machine that has a GPU for each rank."""
    for gpus, name in ((1, "a5000x1"), (8, "a5000x8"), (16, "a5000x8x2-100g")):
        if ranks <= gpus:
            return name
    return f"dgx-h100x2-400g --set hosts={-(-ranks // 8)}"
