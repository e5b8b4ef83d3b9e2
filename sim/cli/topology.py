"""``tracesim topology``: a machine shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from sim.cli import options
from sim.cli.telling import printer
from sim.pictures import DRAWINGS


@click.command()
@click.argument("name_or_file")
@options.settings
@options.picture("--plot", "Draw the machine.", DRAWINGS)
def topology(name_or_file: str, settings: Sequence[str], plot: Path | None) -> None:
    """Show a machine: devices, links, routes, measured and derived bandwidths."""
    from sim.topology.load import load_topology
    from sim.topology.show import show

    machine = load_topology(name_or_file, options.assignments(settings))
    if plot is not None:
        from sim.topology.plot import plot as draw

        draw(machine, plot)
    show(machine, printer())
    if plot is not None:
        click.echo(f"drawn to {plot}")
