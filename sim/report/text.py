"""Text: a summary for people, on a terminal of 80 columns or more.

What decides comes first: whether the job fits, then how long a step takes and where that time goes.  Names from
traces are shown as they are, never read as markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from sim.report.cells import fits, number_column, plain_table, render_table
from sim.report.cells import ms_text as _ms
from sim.report.cells import percent as _percent
from sim.report.cells import render_more as _more
from sim.report.cells import render_warnings as _warnings
from sim.report.cells import shorten as _short
from sim.report.steps import UNMARKED
from sim.report.summary import OutOfMemoryRow, RankSummary, Summary
from sim.units import GIB, format_bytes

MOST_RANKS = 8
MOST_MODULES = 3
MOST_STEPS = 10
MOST_COLLECTIVES = 8
MOST_DOUBTS = 3
_BAR = 24


class ComparisonRow(msgspec.Struct, frozen=True):
    """One run of a comparison: what to call it, what it says, and the trace file to open (or nothing)."""

    name: str
    summary: Summary
    file: str = ""


def render_summary(summary: Summary, console: Console) -> None:
    """Print the summary."""
    _verdict(summary, console)
    _times(summary, console)
    _memory(summary, console)
    _steps(summary, console)
    _ranks(summary, console)
    _collectives(summary, console)
    _top_ops(summary, console)
    _durations(summary, console)
    _doubt(summary, console)
    _energy(summary, console)
    _warnings(summary.warnings, console)
    if summary.replay_seconds is not None:
        console.print(Text(_replayed(summary), style="dim"))


def _replayed(summary: Summary) -> str:
    """How much was simulated, and whether ranks that do the same were replayed once."""
    ranks, stood = len(summary.ranks), summary.ranks_replayed
    folded = f"; {stood} of {ranks} ranks {'stand' if stood > 1 else 'stands'} for all" if stood < ranks else ""
    return f"{summary.ops} operations replayed in {summary.replay_seconds:.2f} s{folded}"


def render_comparison(rows: Sequence[ComparisonRow], console: Console) -> None:
    """Print one table with a line for each run; runs that do not fit say so.

    The trace files are a column where they fit on the line unbroken, else a list below.
    """
    table = _comparison(rows, files=True)
    beside = fits(table, console)
    console.print(table if beside else _comparison(rows, files=False))
    console.print(Text("times in ms a step; what is missing to the step is exposed memcpy", style="dim"))
    for row in rows:
        if row.summary.out_of_memory_at:
            console.print(Text(f"{row.name}: {_out_of_memory(row.summary)}", style="bold red"))
    if not beside:
        console.print("open in https://ui.perfetto.dev:")
        for row in rows:
            if row.file:
                console.print(Text(f"  {row.file}"), soft_wrap=True)


def _comparison(rows: Sequence[ComparisonRow], *, files: bool) -> Table:
    columns = [
        Column("run", overflow="fold"),
        *map(number_column, ("step", "compute", "exposed\ncommun.", "idle", "peak / card\nGiB")),
    ]
    table = plain_table(*columns, *([Column("open in ui.perfetto.dev", no_wrap=True)] if files else []))
    for row in rows:
        s, parts = row.summary, row.summary.breakdown_ms
        times = [_ms(ms) for ms in (s.step_ms, parts.compute, parts.exposed_communication, parts.idle)]
        table.add_row(_plain(row.name), *times, _peak_of_card(s), *([_plain(row.file or "-")] if files else []))
    return table


def _verdict(summary: Summary, console: Console) -> None:
    if summary.out_of_memory_at:
        console.print(Text(_out_of_memory(summary), style="bold red"))
    if len(summary.out_of_memory_at) > 1:
        console.print(Text(f"  and {len(summary.out_of_memory_at) - 1} more ranks", style="red"))
    what = "the run" if _is_unmarked(summary) else "a step"
    time = f"{what} takes {_ms(summary.step_ms)} ms{_between(summary)} on {_machine(summary.ranks)}"
    tightest = _tightest(summary.ranks)
    if summary.out_of_memory:
        # A replay goes on as if the memory were there; one that did not has no peak beyond what there is.
        need = ""
        if tightest is not None and tightest[0] > tightest[1]:
            need = f" and would need {_gib(tightest[0])} of {_gib(tightest[1])} GiB"
        console.print(Text(f"As replayed all the same, {time}{need}"))
        _remedies(summary, console)
        return
    if tightest is None:
        most = max((rank.peak_reserved_bytes or 0 for rank in summary.ranks), default=0)
        needs = f" and needs {_gib(most)} GiB" if most else "; its memory is unknown"
        console.print(Text(f"{time[0].upper()}{time[1:]}{needs}", style="bold"))
        return
    needed, there = tightest
    console.print(Text(f"Fits: {time} and needs {_gib(needed)} of {_gib(there)} GiB", style="bold green"))


def range_text(summary: Summary) -> str:
    """``671.56 to 825.33``, the ends of the 80 % interval; nothing where nothing is in doubt, or nobody asked."""
    low, high = summary.step_ms_p10, summary.step_ms_p90
    return "" if low is None or high is None or low == high else f"{_ms(low)} to {_ms(high)}"


def _between(summary: Summary) -> str:
    """`` (671.56 to 825.33)`` where the prediction is in doubt."""
    return f" ({range_text(summary)})" if range_text(summary) else ""


def _remedies(summary: Summary, console: Console) -> None:
    """What was tried to make it fit, what helps first."""
    if not summary.remedies:
        return
    columns = map(number_column, ("reserved GiB", "step ms"))
    table = plain_table(Column("tried by simulation", overflow="fold"), Column("fits"), *columns)
    for row in sorted(summary.remedies, key=lambda row: not row.fits):
        verdict = Text("yes", style="green") if row.fits else Text("no", style="red")
        table.add_row(_plain(row.option), verdict, _gib(row.peak_reserved_bytes), _ms(row.step_ms))
    render_table(table, console)


def _is_unmarked(summary: Summary) -> bool:
    return all(step.name == UNMARKED for step in summary.per_step)


def _out_of_memory(summary: Summary) -> str:
    """By how much the job does not fit, on the rank that lacks most, and the first request there that found no place.

    A replay that stopped at that request knows only what was missing for it.
    """
    reserved = {rank.rank: rank.peak_reserved_bytes or 0 for rank in summary.ranks}

    def missing(event: OutOfMemoryRow) -> int:
        return max(event.short_bytes, reserved.get(event.rank, 0) - event.capacity_bytes)

    event = max(summary.out_of_memory_at, key=missing)  # of equals the first
    where = f"rank {event.rank} ({', '.join(name for name in (event.device, event.device_name) if name)})"
    return (
        f"Out of memory: {format_bytes(missing(event))} short on {where}: {event.op or 'an op'} asks for "
        f"{format_bytes(event.requested_bytes)} where {format_bytes(event.reserved_bytes)} of "
        f"{format_bytes(event.capacity_bytes)} are reserved ({format_bytes(event.allocated_bytes)} allocated, "
        f"{format_bytes(event.reserved_bytes - event.allocated_bytes)} cached but unusable)"
    )


def _machine(ranks: Sequence[RankSummary]) -> str:
    """``8 x NVIDIA RTX A5000``, in the order in which the kinds of devices appear."""
    kinds: dict[str, int] = {}
    for rank in ranks:
        kind = rank.device_name or rank.device
        kinds[kind] = kinds.get(kind, 0) + 1
    return " + ".join(kind if count == 1 else f"{count} x {kind}" for kind, count in kinds.items())


def _tightest(ranks: Iterable[RankSummary]) -> tuple[int, int] | None:
    """Bytes reserved and bytes there are, of the rank whose device is fullest; None where neither is known."""
    known = [
        (rank.peak_reserved_bytes, rank.memory_bytes)
        for rank in ranks
        if rank.peak_reserved_bytes is not None and rank.memory_bytes
    ]
    return max(known, key=lambda pair: pair[0] / pair[1], default=None)


def _times(summary: Summary, console: Console) -> None:
    table = plain_table(Column("one step"), number_column("ms"), number_column("share"), Column(""), header=False)
    table.add_row(
        "run" if _is_unmarked(summary) else "step", _ms(summary.step_ms), "", _measured(summary), style="bold"
    )
    parts = summary.breakdown_ms
    for name, part in (
        ("compute", parts.compute), ("exposed communication", parts.exposed_communication),
        ("exposed memcpy", parts.exposed_memcpy), ("idle", parts.idle),
    ):  # fmt: skip
        share = part / summary.step_ms if summary.step_ms else 0.0
        table.add_row(f"  {name}", _ms(part), _percent(share), _bar(share, console))
    render_table(table, console)


def _measured(summary: Summary) -> Text:
    if summary.measured_step_ms is not None and summary.step_error is not None:
        return Text(f"measured {_ms(summary.measured_step_ms)} ms, error {_signed(summary.step_error)}")
    if summary.measured_step_ms is not None:
        return Text(f"{_ms(summary.measured_step_ms)} ms on {summary.measured_on}")
    if summary.measured_trace_ms is not None:
        return Text(f"measured trace {_ms(summary.measured_trace_ms)} ms")
    return Text("")


def _memory(summary: Summary, console: Console) -> None:
    fullest = max(summary.ranks, key=lambda rank: rank.peak_reserved_bytes or -1)
    if fullest.peak_reserved_bytes is None or fullest.peak_allocated_bytes is None:
        return
    columns = (Column("memory"), number_column("GiB"), number_column("share"), Column(""), Column("measured"))
    table = plain_table(*columns, header=False)
    for name, size, measured in (
        ("peak allocated", fullest.peak_allocated_bytes, summary.measured_peak_allocated_bytes),
        ("peak reserved", fullest.peak_reserved_bytes, summary.measured_peak_reserved_bytes),
    ):
        share = size / fullest.memory_bytes if fullest.memory_bytes else None
        bar = _bar(share, console) if share is not None else Text("")
        seen = f"measured {_gib(measured)} GiB" if measured is not None else ""
        table.add_row(name, f"{_gib(size)} GiB", "" if share is None else _percent(share), bar, seen)
    for name, size in fullest.outside_bytes.items():
        table.add_row(f"{name}, about", f"{_gib(size)} GiB", style="dim")
    if fullest.memory_bytes:
        table.add_row("of device memory", f"{_gib(fullest.memory_bytes)} GiB", style="dim")
    render_table(table, console)
    for peak in [peak for peak in summary.memory_peaks if peak.rank == fullest.rank and peak.by_category][:1]:
        parts = ", ".join(f"{category} {format_bytes(held)}" for category, held in peak.by_category.items())
        console.print(Text(f"at the peak of rank {peak.rank} ({peak.op or 'no op'}): {parts}"))
        modules = [f"{name} {format_bytes(held)}" for name, held in peak.by_module.items()]
        if modules:
            more = f" and {len(modules) - MOST_MODULES} modules more" if len(modules) > MOST_MODULES else ""
            console.print(Text(f"most of it for {', '.join(modules[:MOST_MODULES])}{more}"))


def _steps(summary: Summary, console: Console) -> None:
    """Shown where there are several, or one that was measured."""
    if len(summary.per_step) < 2 and summary.measured_step_ms is None:
        return
    measured = summary.measured_step_ms is not None
    columns = [Column("steps", overflow="fold"), number_column("slowest rank"), number_column("ms")]
    table = plain_table(*columns, *([number_column("measured"), number_column("error")] if measured else []))
    for row in summary.per_step[:MOST_STEPS]:
        cells: list[str | Text] = [_plain(row.name), str(row.rank), _ms(row.step_ms)]
        if measured:
            cells += ["-" if row.measured_ms is None else _ms(row.measured_ms)]
            cells += ["-" if row.error is None else _signed(row.error)]
        table.add_row(*cells)
    render_table(table, console)
    _more(len(summary.per_step) - MOST_STEPS, "steps", console)


def _ranks(summary: Summary, console: Console) -> None:
    """All of up to ``MOST_RANKS`` ranks in order; of more, the slowest."""
    if len(summary.ranks) < 2:
        return
    folded = len(summary.ranks) > MOST_RANKS
    ranks = sorted(summary.ranks, key=lambda rank: -rank.step_ms) if folded else list(summary.ranks)
    measured = any(rank.measured_step_ms is not None for rank in ranks)
    columns = [number_column("rank"), Column("device"), number_column("step ms")]
    columns += [number_column("measured")] if measured else []
    waiting = any(rank.waiting_ms for rank in ranks)
    columns += [number_column("busy ms"), number_column("exposed\ncommun.")]
    columns += [number_column("of it waits\nfor a peer")] if waiting else []
    columns += [number_column("idle"), number_column("peak / card\nGiB")]
    table = plain_table(*columns)
    for rank in ranks[:MOST_RANKS]:
        cells: list[str | Text] = [str(rank.rank), _plain(rank.device), _ms(rank.step_ms)]
        if measured:
            cells += ["-" if rank.measured_step_ms is None else _ms(rank.measured_step_ms)]
        cells += [_ms(rank.busy_ms), _ms(rank.breakdown_ms.exposed_communication)]
        cells += [_ms(rank.waiting_ms)] if waiting else []
        table.add_row(*cells, _ms(rank.breakdown_ms.idle), _of_card(rank.peak_reserved_bytes, rank.memory_bytes))
    render_table(table, console)
    if folded:
        rest = ranks[MOST_RANKS:]
        _more(len(rest), f"ranks, {_ms(rest[-1].step_ms)} to {_ms(rest[0].step_ms)} ms a step", console)


def _collectives(summary: Summary, console: Console) -> None:
    if not summary.collectives:
        return
    table = plain_table(
        Column("collectives"), number_column("bytes"), number_column("ranks"), Column("how"), number_column("count"),
        number_column("total ms"), number_column("without\nwaiting"),
    )  # fmt: skip
    for row in summary.collectives[:MOST_COLLECTIVES]:
        how = ", ".join(dict.fromkeys(name for name in (row.algorithm, row.protocol) if name))
        table.add_row(
            row.kind, format_bytes(row.bytes), str(row.ranks), _plain(how), str(row.count), _ms(row.total_ms),
            _ms(row.transfer_ms),
        )  # fmt: skip
    render_table(table, console)
    _more(len(summary.collectives) - MOST_COLLECTIVES, "kinds and sizes", console)


def _top_ops(summary: Summary, console: Console) -> None:
    if not summary.top_ops:
        return
    table = plain_table(
        Column("dearest on the busiest rank", no_wrap=True, overflow="ellipsis", ratio=1),
        number_column("count"), number_column("total ms"), number_column("share"), expand=True,
    )  # fmt: skip
    for row in summary.top_ops:
        table.add_row(_plain(_short(row.name)), str(row.count), _ms(row.total_ms), _percent(row.share))
    render_table(table, console)


def _durations(summary: Summary, console: Console) -> None:
    sources = summary.durations_from
    counts = {"measured": sources.measured, "from a profile": sources.profile, "roofline": sources.roofline}
    parts = [f"{count} {name}" for name, count in counts.items() if count]
    whole = sum(counts.values()) + sources.estimate
    line = Text("kernel durations: " + (", ".join(parts) or "none known"))
    if sources.estimate:
        share = _percent(sources.estimate / whole)
        line.append(f"; {sources.estimate} ({share}) estimated for want of a formula or measurement", style="yellow")
    console.print()
    console.print(line)


def _doubt(summary: Summary, console: Console) -> None:
    """What the range is made of, and what would settle most of it."""
    if not summary.doubt:
        return
    first, *rest = summary.doubt[:MOST_DOUBTS]
    others = "".join(f", {_whole_percent(row.share)} {row.source}" for row in rest)
    console.print(
        f"80 % range of a step: {range_text(summary)} ms. {_whole_percent(first.share)} of the doubt: {first.source} "
        f"({first.cure} would settle it){others}"
    )


def _whole_percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _energy(summary: Summary, console: Console) -> None:
    if summary.energy_j is None:
        return
    token = summary.energy_j_per_token
    each = "" if token is None else f", {_joules(token)} a token"
    console.print(f"energy of the GPUs, an estimate from their board power: {_joules(summary.energy_j)} a step{each}")


def _joules(energy_j: float) -> str:
    """``28.8 J``, ``107 kJ``, ``14.9 mJ``: three digits, in the unit that keeps them before the exponent."""
    for unit, size in (("MJ", 1e6), ("kJ", 1e3), ("J", 1.0), ("mJ", 1e-3)):
        if energy_j >= 0.9995 * size:
            return f"{energy_j / size:#.3g}".rstrip(".") + f" {unit}"
    return f"{1e3 * energy_j:.3g} mJ"


def _plain(name: str) -> Text:
    return Text(name)


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f}"


def _signed(error: float) -> str:
    return f"{100 * error:+.1f} %"


def _of_card(peak: int | None, memory: int | None) -> str:
    if peak is None:
        return "-"
    return f"{_gib(peak)} / {_gib(memory)}" if memory else _gib(peak)


def _peak_of_card(summary: Summary) -> str:
    fullest = max(summary.ranks, key=lambda rank: rank.peak_reserved_bytes or -1)
    for event in summary.out_of_memory_at[:1]:
        if (fullest.peak_reserved_bytes or 0) <= event.capacity_bytes:
            return f"> {_gib(event.capacity_bytes)}"
    return _of_card(fullest.peak_reserved_bytes, fullest.memory_bytes)


def _bar(share: float, console: Console) -> Text:
    mark = "#" if console.options.ascii_only else "\N{FULL BLOCK}"
    return Text(mark * min(_BAR, round(_BAR * share)))
