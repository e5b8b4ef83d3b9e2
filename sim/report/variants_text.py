"""What-ifs for people: a table of the rows, then for each row where the milliseconds went; 100 columns or less."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from sim.report.cells import (
    fits,
    ms_text,
    number_column,
    percent,
    plain_table,
    render_table,
    render_warnings,
    shorten,
)
from sim.report.variants import Bound, LedgerLine, NextBound, Solution, Value, Variant, WhatIf
from sim.units import GIB

MOST_LINES = 8
_LONGEST_VALUE = 40  # characters: a whole measured curve is one value too
# Changes below this are not shown as lines of a ledger: two decimals would print them as nothing.
_SMALLEST_MS = 0.005
_PARTS = {
    "compute": "compute kernels", "communication": "communication", "contention": "shared links and SMs",
    "copy": "copies", "host": "the host", "launch": "launch latency", "gap": "the device's turn-around",
}  # fmt: skip
# The same, where there is little room.
_SHORT = {
    "compute": "compute", "communication": "communication", "contention": "sharing", "copy": "copies",
    "host": "the host", "launch": "launches", "gap": "turn-around",
}  # fmt: skip
# Columns that go first where the terminal is too narrow for all: each row's own lines tell the last of them.
_DISPENSABLE = ("joules", "idle", "bound by")


def render_what_if(told: WhatIf, console: Console) -> None:
    """Print the table, a ledger for each row that differs, and what to know about the numbers."""
    console.print(Text(f"{told.name} on {told.base.topology}, and changed", style="bold"))
    console.print()
    table, without = _fitting_table(told, console)
    console.print(table)
    ranged = "; below step and speed-up: their 80 % ranges" if told.base.step_ms_p10 is not None else ""
    narrow = f"; for {' and '.join(without)} widen the terminal" if without else ""
    console.print(Text(f"times in ms a step; peak: GiB reserved on the fullest rank{ranged}{narrow}", style="dim"))
    console.print()
    console.print(Text("The base", style="bold"))
    _indented(f"{bound_phrase(told.base.bound_by)}{next_phrase(told.base.next_bottleneck)}", console)
    for row in told.rows:
        console.print()
        _explain(row, told.base, console)
    _render_list(told.warnings, console)


def _fitting_table(told: WhatIf, console: Console) -> tuple[Table, list[str]]:
    """The table with all columns that there is room for, and the names of those that there is not."""
    without: list[str] = []
    for dropped in ("", *_DISPENSABLE):
        without += [dropped] if dropped in _columns(told, ()) else []
        table = _table(told, without)
        if fits(table, console):
            break
    return table, without


def _columns(told: WhatIf, without: Sequence[str]) -> list[str]:
    powered = any(row.energy_j is not None for row in (told.base, *told.rows))
    names = ["step", "speed-up", "exposed\ncommun.", "idle", "peak\nGiB", *(["joules"] if powered else []), "bound by"]
    return [name for name in names if name not in without]


def _table(told: WhatIf, without: Sequence[str]) -> Table:
    paths = list(told.base.values)
    names = _columns(told, without)
    headings = {"joules": "joules\n(est.)"}
    table = plain_table(
        *(_value_column(_heading(path)) for path in paths),
        *(Column(name) if name == "bound by" else number_column(headings.get(name, name)) for name in names),
    )
    for row in (told.base, *told.rows):
        is_base = row is told.base
        values = [Text(value_text(row.values.get(path))) for path in paths]
        if is_base and values:
            values[0] = Text(f"{values[0]} (base)")
        cells = _cells(row, base=is_base)
        table.add_row(*values, *(cells[name] for name in names), style="bold" if is_base else None)
    return table


def _value_column(heading: str) -> Column:
    """Wide enough for its heading's lines; what is longer wraps."""
    return Column(heading, overflow="fold", min_width=max(len(line) for line in heading.splitlines()))


def _heading(path: str) -> str:
    """A path over two lines, so that several fit: its last key below the others."""
    head, _, last = path.rpartition(".")
    return f"{head}\n{last}" if head else path


def _cells(row: Variant, *, base: bool) -> dict[str, str]:
    """What a row says, by column."""
    peak = "-" if row.peak_reserved_bytes is None else f"{row.peak_reserved_bytes / GIB:.2f}"
    speedup = f"{row.speedup:.3f}" + ("" if base else below(row.speedup_p10, row.speedup_p90, "{:.2f}"))
    return {
        "step": ms_text(row.step_ms) + below(row.step_ms_p10, row.step_ms_p90, "{:.4g}"),
        "speed-up": speedup,
        "exposed\ncommun.": ms_text(row.breakdown_ms.exposed_communication),
        "idle": ms_text(row.breakdown_ms.idle),
        "peak\nGiB": "does not fit" if row.out_of_memory else peak,
        "joules": "-" if row.energy_j is None else f"{row.energy_j:.4g}",
        "bound by": _SHORT.get(row.bound_by.part, row.bound_by.part),
    }


def below(low: float | None, high: float | None, form: str) -> str:
    """The ends of an 80 % interval for the line below a number; nothing where there is none, or a point."""
    if low is None or high is None or form.format(low) == form.format(high):
        return ""
    return f"\n{form.format(low)} to {form.format(high)}"


def value_text(value: Value) -> str:
    """A value as a user would type it, a long one cut; a dash where the base has no such path."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


def title(row: Variant) -> str:
    """``links.pcie.bandwidth_gb_s = 8``."""
    return ", ".join(f"{path} = {value_text(value)}" for path, value in row.values.items())


# One row explained --------------------------------------------------------------------------------------------------


def _explain(row: Variant, base: Variant, console: Console) -> None:
    change = row.step_ms - base.step_ms
    if row.unchanged_because is not None:
        console.print(Text(f"{title(row)}: {ms_text(row.step_ms)} ms, no change", style="bold"))
        _indented(row.unchanged_because, console)
        return
    more = "more" if change > 0 else "less"
    console.print(
        Text(f"{title(row)}: {ms_text(row.step_ms)} ms, {ms_text(abs(change))} {more} than the base", style="bold")
    )
    console.print(_ledger(row.ledger))
    for line in (_breakdown_change(row, base), f"{bound_phrase(row.bound_by)}{next_phrase(row.next_bottleneck)}"):
        _indented(line, console)
    for note in row.warnings:
        _indented(f"note: {note}", console, style="yellow")


def _indented(line: str, console: Console, style: str = "") -> None:
    """A line below a heading; what wraps stays below it."""
    console.print(Padding(Text(line, style=style), (0, 0, 0, 2)))


def _ledger(lines: Sequence[LedgerLine]) -> Table:
    """The changes that can be seen, and the rest as one line, so that the column adds up."""
    told = [line for line in lines if abs(line.change_ms) >= _SMALLEST_MS or max(line.ms, line.base_ms) >= 1.0]
    shown, rest = told[:MOST_LINES], [*told[MOST_LINES:], *(line for line in lines if line not in told)]
    table = plain_table(
        Column("  on the critical path", no_wrap=True), number_column("base"), number_column("now"),
        number_column("change"), Column("pieces"),
    )  # fmt: skip
    for line in shown:
        table.add_row(
            f"  {_line_name(line)}", ms_text(line.base_ms), ms_text(line.ms), signed_ms(line.change_ms), _pieces(line)
        )
    if rest:
        base_ms, now = sum(line.base_ms for line in rest), sum(line.ms for line in rest)
        table.add_row("  all else", ms_text(base_ms), ms_text(now), signed_ms(now - base_ms), "")
    return table


def _line_name(line: LedgerLine) -> str:
    if line.part == "contention":
        return f"shared: {line.name}"
    return line.name or _PARTS[line.part]


def _pieces(line: LedgerLine) -> str:
    """How many operations are on the path: ``48 of 48``, and where some joined or left, how many there were."""
    now = count(line.count) if line.of is None else f"{count(line.count)} of {count(line.of)}"
    if abs(line.count - line.base_count) < _SMALLEST_MS:
        return now
    what = "joined" if line.count > line.base_count else "left"
    return f"{now}, {count(abs(line.count - line.base_count))} {what}"


def count(number: float) -> str:
    """Operations a step: whole where they are."""
    return f"{number:.0f}" if abs(number - round(number)) < _SMALLEST_MS else f"{number:.1f}"


def signed_ms(change: float) -> str:
    """With its sign; nothing where it rounds to nothing."""
    return "0" if abs(change) < _SMALLEST_MS else f"{change:+.2f}"


def _breakdown_change(row: Variant, base: Variant) -> str:
    """What the slowest rank's device sees of it."""
    was, now = base.breakdown_ms, row.breakdown_ms
    parts = (
        ("compute", now.compute - was.compute),
        ("exposed communication", now.exposed_communication - was.exposed_communication),
        ("exposed memcpy", now.exposed_memcpy - was.exposed_memcpy),
        ("idle", now.idle - was.idle),
    )
    told = [f"{name} {signed_ms(change)}" for name, change in parts if abs(change) >= _SMALLEST_MS]
    return "slowest rank: " + (", ".join(told) or "its device sees no change")


def bound_phrase(bound: Bound) -> str:
    """``bound by communication (70 % of the critical path), most of it all_reduce 64.00 MiB (395.26 ms)``."""
    part = _PARTS.get(bound.part, bound.part)
    dearest = f", most of it {shorten(bound.op)} ({ms_text(bound.op_ms)} ms)" if bound.op else ""
    return f"bound by {part}{_over(bound)} ({percent(bound.share)} of the critical path{dearest})"


def _over(bound: Bound) -> str:
    return f" over {' and '.join(bound.links)} links" if bound.links else ""


def next_phrase(after: NextBound | None) -> str:
    """What comes next, and how far that leads."""
    if after is None:
        return ""
    part = _PARTS.get(after.bound_by.part, after.bound_by.part)
    return f"; were that free: {ms_text(after.step_ms)} ms, bound by {part}{_over(after.bound_by)}"


# The answer to an inverse question ----------------------------------------------------------------------------------


def render_solution(told: Solution, console: Console) -> None:
    """Print the value that reaches the target, or that none does and what stands in the way."""
    target = f"{told.measure} = {told.target:g}"
    if told.value is not None:
        console.print(Text(f"{told.path} = {told.value:.4g} reaches {target}", style="bold green"))
        console.print(
            Text(f"  {told.measure} {told.reached:.4g} there; {told.base_measure:.4g} at {told.base_value:g}")
        )
    else:
        none = "No value" if told.monotone else "No value tried"
        console.print(Text(f"{none} of {told.path} reaches {target}", style="bold red"))
        console.print(Text(f"  the best is {told.measure} {told.reached:.4g}, at {told.limit_value:.4g}"))
        if told.measure == "speedup":
            console.print(Text(f"  (against this job on the base; against one GPU: --target scaling={told.target:g})"))
    bounded = f"{bound_phrase(told.bound_by)}{next_phrase(told.next_bottleneck)}"
    _indented(f"{ms_text(told.step_ms)} ms a step, {bounded}", console)
    if not told.monotone:
        warning = "what was tried does not move one way only: other values may reach the target too"
        _indented(warning, console, style="yellow")
    table = plain_table(number_column(told.path), number_column(told.measure))
    for each in sorted(told.tried, key=lambda each: each.value):
        table.add_row(f"{each.value:.4g}", f"{each.measure:.4g}")
    render_table(table, console)
    _render_list(told.warnings, console)


def _render_list(warnings: Sequence[str], console: Console) -> None:
    if warnings:
        console.print()
        render_warnings(warnings, console)
