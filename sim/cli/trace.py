"""``tracesim trace``: the steps of a model or a script, recorded."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from sim.cli import options
from sim.cli.telling import line_by_line, own_streams
from sim.place.captured import AS_CAPTURED


@click.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "--out", type=options.FILE, default=Path("capture"), show_default=True, metavar="DIR",
    help="The folder for rank0.pt.trace.json.gz, ... and capture.json; made where it is missing.",
)  # fmt: skip
@click.option("--steps", type=int, default=5, show_default=True, help="Steps to record.")
@click.option("--warmup", type=int, default=3, show_default=True, help="Steps to leave out before them.")
@click.option("--model", metavar="NAME", help="Run this model, with random weights.")
@click.option("--batch", type=int, help="With --model: sequences a step on each rank.")
@click.option("--seq", type=int, help="With --model: tokens a sequence.")
@click.option("--mode", type=options.MODES, help="With --model.  [default: forward]")
@click.option("--dtype", type=options.FLOATS, help="With --model.  [default: float32]")
@click.option("--to-the-end", is_flag=True, help="Let the script run on after the last recorded step.")
@click.argument("script", nargs=-1, metavar="[-- SCRIPT.py ARGS...]", type=click.UNPROCESSED)
@click.pass_obj
def trace(words: Sequence[str], /, out: Path, steps: int, warmup: int, script: Sequence[str], **run: Any) -> None:
    """Record the steps of a model or a script under torch.profiler: one trace a rank."""
    from sim.workload.capture.capture import capture
    from sim.workload.capture.spec import CaptureSpec, check_steps, what_to_run

    check_steps(steps, warmup)
    spec = CaptureSpec(what_to_run(script=script, **run), out, steps, warmup, ("tracesim", *words))
    with own_streams():
        done = capture(spec, line_by_line())
    closed = sys.stdout.closed  # a script may close it; then stderr has what is ours to say
    if done.note:
        click.echo(f"tracesim: warning: {done.note}", err=True)
    if done.rank == 0:
        ranks = f" of {done.ranks} ranks" if done.ranks > 1 else ""
        click.echo(f"{out}: {done.steps} step{'s' * (done.steps > 1)}{ranks}; replay it with", err=closed)
        click.echo(f"  tracesim replay {out} --topology {AS_CAPTURED}", err=closed)
