"""``tracesim allocator``: a CUDA memory snapshot's events through the simulated allocator."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from sim.cli import options
from sim.cli.telling import printer, tell_result


@click.command()
@click.argument("snapshot", type=options.FILE, metavar="SNAPSHOT.pickle")
@options.json_out
def allocator(snapshot: Path, json_out: str | None) -> None:
    """Replay a CUDA memory snapshot's events through the simulated allocator and compare every address."""
    from sim.replay.allocator.snapshot import replay_snapshot
    from sim.report.allocator import render_comparison

    compared = msgspec.to_builtins(replay_snapshot(snapshot))
    content = msgspec.json.format(msgspec.json.encode(compared)) + b"\n"
    tell_result(content, json_out, lambda: render_comparison(str(snapshot), compared, printer()))
