"""The commands: each reads its options, calls one function, prints.  The only place that joins the rooms."""

from sim.cli.entry import cli, main

__all__ = ["cli", "main"]
