"""Rows of ``tracesim collective``: one collective's time and bandwidths, as nccl-tests counts them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from sim.report.cells import number_column, plain_table
from sim.units import format_bytes


class CollectiveTimeRow(msgspec.Struct, frozen=True):
    """``us`` a call; ``algbw_gb_s`` = bytes / us; ``busbw_gb_s`` what each link carries of it; GB is 10^9."""

    kind: str
    bytes: int
    ranks: int
    algorithm: str
    protocol: str
    us: float
    algbw_gb_s: float
    busbw_gb_s: float
    note: str


def encode_rows(rows: Sequence[CollectiveTimeRow]) -> bytes:
    """The contract's JSON object."""
    return msgspec.json.format(msgspec.json.encode({"rows": rows})) + b"\n"


def render_rows(rows: Sequence[CollectiveTimeRow], console: Console) -> None:
    """A table, and below it what is to be known of the numbers."""
    how = Column("how", no_wrap=True)
    columns = [Column("collective"), number_column("bytes"), number_column("ranks"), how, number_column("us")]
    table: Table = plain_table(*columns, number_column("algbw\nGB/s"), number_column("busbw\nGB/s"))
    for row in rows:
        table.add_row(
            row.kind, format_bytes(row.bytes), str(row.ranks), f"{row.algorithm}, {row.protocol}",
            f"{row.us:.1f}", f"{row.algbw_gb_s:.2f}", f"{row.busbw_gb_s:.2f}",
        )  # fmt: skip
    console.print(table)
    for note in dict.fromkeys(row.note for row in rows if row.note):
        console.print(Text(note, style="dim"))
