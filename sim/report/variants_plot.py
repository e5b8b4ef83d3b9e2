"""What-ifs as a picture for a slide: the step over the value that varies, and what each step is made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator

from sim.pictures import BLUE, COLOURS, DPI, ORANGE, VERMILION, write_picture
from sim.report.variants import Value, Variant, WhatIf
from sim.report.variants_text import value_text

MOST_BARS = 24
MOST_LINES = 6
_PARTS = (("compute", BLUE), ("exposed_communication", VERMILION), ("exposed_memcpy", ORANGE), ("idle", "#BBBBBB"))
_UNITS = {"_gb_s": "GB/s", "_us": "µs", "_gib": "GiB", "_mib": "MiB", "_w": "W"}
# From here on the values are as far apart as a straight scale shows badly.
_LOG_FROM = 4
# What a legend may be wide, in characters of its font: half of the picture; and what a marker takes of it.
_LEGEND_CHARACTERS = 84
_MARKER_CHARACTERS = 6


def write_plot(told: WhatIf, path: Path) -> None:
    """Write a PNG; the same rows give the same bytes.

    Over a number that varies, left the step and its exposed communication, a line for each combination of the other
    values; of anything else only the bars.  InputError where the name does not end in ``.png`` or it cannot be
    written.
    """
    write_picture(draw(told), path)


def draw(told: WhatIf) -> Figure:
    """The picture, before it is a file."""
    numeric = next((name for name in told.base.values if _is_numeric(told, name)), None)
    bars = min(len(told.rows) + 1, MOST_BARS)
    figure = Figure(figsize=(12 if numeric else 9, max(5.0, 1.6 + 0.3 * bars)), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, 2 if numeric else 1, squeeze=False)[0]
    if numeric:
        _draw_lines(panels[0], told, numeric)
    _draw_bars(panels[-1], told)
    figure.suptitle(f"{told.name} on {told.base.topology}", fontsize=13)
    return figure


def _is_numeric(told: WhatIf, name: str) -> bool:
    values = {row.values[name] for row in told.rows}
    return len(values) > 1 and all(_is_number(value) for value in values)


def axis_label(path: str) -> str:
    """``links.pcie bandwidth (GB/s)`` of ``links.pcie.bandwidth_gb_s``."""
    head, _, last = path.rpartition(".")
    for suffix, unit in _UNITS.items():
        if last.endswith(suffix):
            return f"{head} {last.removesuffix(suffix).replace('_', ' ')} ({unit})".strip()
    return f"{head} {last.replace('_', ' ')}".strip()


# Lines over the value -----------------------------------------------------------------------------------------------


def _draw_lines(panel: Any, told: WhatIf, name: str) -> None:
    series: dict[str, list[tuple[float, Variant]]] = {}
    for row in told.rows:
        others = ", ".join(f"{key} {value_text(value)}" for key, value in row.values.items() if key != name)
        series.setdefault(others, []).append((_number(row.values[name]), row))
    for points, colour in zip(list(series.values())[:MOST_LINES], COLOURS, strict=False):
        points.sort(key=lambda point: point[0])
        values = [value for value, _ in points]
        panel.plot(values, [row.step_ms for _, row in points], "o-", color=colour)
        exposed = [row.exposed_communication_ms for _, row in points]
        panel.plot(values, exposed, "s--", color=colour, markerfacecolor="white")
    _mark_base(panel, told, name)
    values = sorted({_number(row.values[name]) for row in told.rows})
    if values[0] > 0 and values[-1] / values[0] >= _LOG_FROM:
        panel.set_xscale("log", base=2)
    panel.set_xticks(values, [f"{value:g}" for value in values], rotation=45 if len(values) > 8 else 0)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlabel(axis_label(name))
    panel.set_ylabel("time (ms a step)")
    panel.set_ylim(0, 1.08 * max(row.step_ms for row in (told.base, *told.rows)))
    panel.grid(alpha=0.3)
    _explain_lines(panel, list(series)[:MOST_LINES], told.base.values[name])


def _explain_lines(panel: Any, others: Sequence[str], base: Value) -> None:
    """Above the lines, where it covers none: what the two kinds of line are, and whose colour is whose."""
    one = COLOURS[0] if len(others) == 1 else "black"
    handles: list[Any] = [
        Line2D([], [], color=one, marker="o", label="step"),
        Line2D([], [], color=one, marker="s", linestyle="--", markerfacecolor="white", label="exposed communication"),
    ]
    if _is_number(base):
        handles.append(Line2D([], [], color="grey", linestyle=":", label=f"base: {value_text(base)}"))
    if len(others) > 1:
        handles += [Patch(color=c, label=name) for name, c in zip(others, COLOURS, strict=False)]
    _legend_above(panel, handles)


def _legend_above(panel: Any, handles: Sequence[Any]) -> None:
    """A legend over the panel with no more columns than its half of the picture is wide."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    panel.legend(
        handles=handles, fontsize=9, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0),
        ncols=max(1, _LEGEND_CHARACTERS // (longest + _MARKER_CHARACTERS)), columnspacing=1.0,
    )  # fmt: skip


def _mark_base(panel: Any, told: WhatIf, name: str) -> None:
    """A line where the machine as it is stands, where that is a number."""
    value = told.base.values[name]
    if _is_number(value):
        panel.axvline(value, color="grey", linestyle=":", linewidth=1.2)


def _is_number(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Value) -> float:
    assert isinstance(value, int | float)
    return float(value)


# Bars ---------------------------------------------------------------------------------------------------------------


def _draw_bars(panel: Any, told: WhatIf) -> None:
    rows = (told.base, *told.rows)[:MOST_BARS]
    places = range(len(rows))
    left = [0.0] * len(rows)
    for part, colour in _PARTS:
        widths = [float(getattr(row.breakdown_ms, part)) for row in rows]
        panel.barh(places, widths, left=left, color=colour, label=part.replace("_", " "), height=0.7)
        left = [at + width for at, width in zip(left, widths, strict=True)]
    longest = max(left)
    for place, row in zip(places, rows, strict=True):
        told_time = f"{row.step_ms:.4g} ms" + (" (does not fit)" if row.out_of_memory else "")
        panel.text(left[place] + 0.01 * longest, place, told_time, va="center", fontsize=9)
    panel.set_yticks(list(places), _labels(rows), fontsize=9)
    panel.invert_yaxis()
    panel.set_xlim(0, 1.22 * longest if longest else 1)
    panel.set_xlabel("time (ms a step)")
    names = [axis_label(name) for name in told.base.values]
    panel.set_ylabel("\n".join(names))
    hidden = len(told.rows) + 1 - len(rows)
    if hidden:
        panel.set_title(f"the first {MOST_BARS} rows; {hidden} more in the table", fontsize=9, loc="right")
    _legend_above(panel, panel.get_legend_handles_labels()[0])


def _labels(rows: Sequence[Variant]) -> list[str]:
    named = [", ".join(value_text(value) for value in row.values.values()) for row in rows]
    return [f"{named[0]} (base)", *named[1:]]
