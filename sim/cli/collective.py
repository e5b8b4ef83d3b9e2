"""``tracesim collective``: the time of one collective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from sim.cli import options
from sim.cli.telling import printer, tell_result
from sim.errors import UserError

if TYPE_CHECKING:
    from sim.place.collectives import CollectivePlan

LARGEST_BYTES = 1 << 50


@click.command()
@click.argument("kind")
@click.option(
    "--bytes", "sizes", required=True, metavar="N[,N...]", help="Size of the whole tensor: in bytes, or as 64M, 1GiB."
)
@click.option("--ranks", type=int, required=True, help="How many GPUs take part: the first ones, or those of --gpus.")
@options.topology
@options.gpus
@options.settings
@options.json_out
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

    machine = options.named_machine(topology, settings)
    if not 1 <= ranks <= len(machine.gpus):
        count = len(machine.gpus)
        raise UserError(f"--ranks {ranks}: {machine.name} has {count} devices; give so many, or a larger --topology")
    chosen = options.numbers("--gpus", gpus) or tuple(range(ranks))
    if len(chosen) != ranks:
        raise UserError(f"--gpus names {len(chosen)} GPUs for --ranks {ranks}")
    asked = options.sizes("--bytes", sizes)
    beyond = next((size for size in asked if size > LARGEST_BYTES), None)
    if beyond is not None:
        raise UserError(f"--bytes {beyond}: larger than any memory; give at most {LARGEST_BYTES} (1 PiB)")
    plans = [plan(machine, kind, size, chosen) for size in asked]
    rows = [
        CollectiveTimeRow(
            p.kind, p.nbytes, p.ranks, p.algorithm, p.protocol, p.call_us, p.algbw_gb_s, p.busbw_gb_s, _note(p)
        )
        for p in plans
    ]
    tell_result(encode_rows(rows), json_out, lambda: render_rows(rows, printer()))


def _note(made: CollectivePlan) -> str:
    """What is to be known of a number; and that a barrier has no size."""
    of_a_barrier = "a barrier is an all-reduce of one element, whatever --bytes says" if made.kind == "barrier" else ""
    return "; ".join(note for note in (of_a_barrier, made.note) if note)
