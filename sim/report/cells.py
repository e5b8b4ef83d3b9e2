"""Cells: how numbers, names and tables look, the same in every table for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

MOST_WARNINGS = 10
_UNBOUNDED = 10_000  # columns: wider than any table is by itself


def render_warnings(warnings: Sequence[str], console: Console) -> None:
    """Print the first ``MOST_WARNINGS``, and how many more there are."""
    for warning in warnings[:MOST_WARNINGS]:
        # A hanging indent: the text wraps under itself.
        grid = Table.grid(padding=(0, 1))
        grid.add_row(Text("warning:", style="yellow"), Text(warning, overflow="fold"))
        console.print(grid)
    render_more(len(warnings) - MOST_WARNINGS, "warnings", console)


def render_more(count: int, what: str, console: Console) -> None:
    """``... and 3 more steps``, where there are more."""
    if count > 0:
        console.print(Padding(Text(f"... and {count} more {what}", style="dim"), (0, 0, 0, 1)))


def plain_table(*columns: Column, header: bool = True, expand: bool = False) -> Table:
    """A table without edges."""
    return Table(*columns, box=box.SIMPLE_HEAD, show_header=header, show_edge=False, pad_edge=False, expand=expand)


def render_table(table: Table, console: Console) -> None:
    """Print a table below what stands there already."""
    console.print()
    console.print(table)


def fits(table: Table, console: Console) -> bool:
    """Whether the console has room for the table without breaking or cutting a cell."""
    unbounded = console.options.update(width=_UNBOUNDED)
    return Measurement.get(console, unbounded, table).maximum <= console.width


def number_column(name: str) -> Column:
    """A column of numbers: aligned to the right."""
    return Column(name, justify="right", no_wrap=True)


def shorten(name: str) -> str:
    """A kernel's name without what all kernels' names begin with."""
    for prefix in ("void ", "at::native::", "(anonymous namespace)::"):
        name = name.removeprefix(prefix)
    return name


def ms_text(ms: float) -> str:
    """Two decimals, so that columns align; four where these would say next to nothing."""
    return f"{ms:.4f}" if 0 < abs(ms) < 0.05 else f"{ms:.2f}"


def percent(share: float) -> str:
    """Of a share between 0 and 1."""
    return f"{100 * share:.1f} %"
