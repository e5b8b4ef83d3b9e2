"""The rows of ``kernel`` as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from sim.place.kernels.single import KernelRow

MOST_ROWS = 40
SIZES = ("batch", "m", "n", "k", "rows", "columns")


def show(rows: Sequence[KernelRow], console: Console) -> None:
    """At most 40 rows, then how many there are; no wider than the console."""
    first = rows[0]
    table = Table(title=f"{first.op} in {first.dtype} on {first.device}", title_justify="left")
    sizes = [name for name in SIZES if getattr(first, name) is not None]
    for name in (*sizes, "us", "80 % interval", "bound"):
        table.add_column(name, justify="left" if name == "bound" else "right", no_wrap=True)
    for row in rows[:MOST_ROWS]:
        interval = f"{_figure(row.us_p10)} to {_figure(row.us_p90)}"
        table.add_row(*(f"{getattr(row, name):,}" for name in sizes), _figure(row.us), interval, row.bound)
    console.print(table)
    if len(rows) > MOST_ROWS:
        console.print(f"{len(rows) - MOST_ROWS:,} more rows: --json has them all")
    if first.call_us:
        console.print(f"of us, {_figure(first.call_us)} are the call (device events around it), the rest the kernel")
    if first.computed_in:
        console.print(f"its profile has no rate for {first.dtype}: estimated as {first.computed_in}")
    where = "its own profile" if first.from_ == "profile" else f"the data sheet, calibrated on {first.calibrated_on}"
    console.print(f"from {where}")


def _figure(us: float) -> str:
    """Four figures, no exponent."""
    decimals = max(0, 3 - len(str(int(us)))) if us >= 1 else 3
    return f"{us:,.{decimals}f}"
