"""What ``tracesim allocator`` prints: how many addresses and segments of a recording were predicted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Column
from rich.text import Text

from sim.report.cells import number_column, plain_table
from sim.units import format_bytes

_PAIRS = (
    ("addresses", "allocations"), ("segments", "segments"), ("segments released", "segments_released"),
    ("out-of-memory events", "out_of_memory"),
)  # fmt: skip


def render_comparison(name: str, compared: Mapping[str, Any], console: Console) -> None:
    """``compared`` is the object of ``allocator --json``."""
    first = compared["first_mismatch"]
    if first is None:
        console.print(Text(f"{name}: every predictable event as recorded", style="bold green"))
    else:
        console.print(
            Text(
                f"{name}: parts from the recording at event {first['event']} ({first['action']}): expected "
                f"{first['expected']}, predicted {first['predicted']}",
                style="bold red",
            )
        )
    table = plain_table(Column("predicted"), number_column("checked"), number_column("matched"))
    for label, key in _PAIRS:
        table.add_row(label, str(compared[f"{key}_checked"]), str(compared[f"{key}_matched"]))
    console.print(table)
    console.print(
        f"peak allocated {format_bytes(compared['peak_allocated_bytes'])}, "
        f"reserved {format_bytes(compared['peak_reserved_bytes'])}, "
        f"{compared['fragmentation_at_peak']:.1%} of it not allocated at the peak"
    )
    if compared["not_predictable"]:
        console.print(
            f"{compared['not_predictable']} events on memory from before the recording began: not predictable"
        )
    for note in compared.get("notes", ()):
        console.print(Text(note, style="dim"))
