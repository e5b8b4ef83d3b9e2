"""Whole outputs that are kept as goldens; ``python tools/make_goldens.py`` writes them anew."""

from __future__ import annotations

import io

from rich.console import Console
from told_timelines import out_of_memory, two_ranks, two_ranks_measured

from sim.report.chrome import encode_trace
from sim.report.summarize import summarize
from sim.report.summary import Summary, encode
from sim.report.text import ComparisonRow, render_comparison, render_summary

WIDTH = 80


def goldens() -> dict[str, bytes]:
    """Name of the file in ``golden/`` to its content."""
    compared = summarize(two_ranks(), two_ranks_measured(), replay_seconds=0.25)
    stopped = summarize(out_of_memory())
    return {
        "two_ranks.json": encode(compared),
        "two_ranks.txt": summary_text(compared),
        "two_ranks.pt.trace.json": encode_trace(two_ranks()),
        "out_of_memory.txt": summary_text(stopped),
        "comparison.txt": comparison_text(compared, stopped),
    }


def console(width: int = WIDTH) -> Console:
    return Console(width=width, file=io.StringIO(), color_system=None, legacy_windows=False, _environ={})


def printed(screen: Console) -> bytes:
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue().encode()


def summary_text(summary: Summary, width: int = WIDTH) -> bytes:
    screen = console(width)
    render_summary(summary, screen)
    return printed(screen)


def comparison_text(fits: Summary, stopped: Summary, width: int = WIDTH) -> bytes:
    screen = console(width)
    rows = [
        ComparisonRow("one GPU", fits, "out/one-gpu.pt.trace.json.gz"), ComparisonRow("too large", stopped),
    ]  # fmt: skip
    render_comparison(rows, screen)
    return printed(screen)
