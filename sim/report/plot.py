"""Plot: memory over time as a picture, one panel for all ranks that are alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sim.errors import UserError
from sim.pictures import BLUE, DPI, ORANGE, VERMILION, write_picture
from sim.timeline import MemorySample, OutOfMemory, RankInfo, Timeline
from sim.units import GIB, NS_PER_MS, format_bytes

MOST_PANELS = 8
_ALLOCATED, _RESERVED, _CAPACITY = BLUE, ORANGE, VERMILION


def write_memory_plot(timeline: Timeline, path: Path) -> None:
    """Write a PNG of what was allocated and reserved over time, with the peak named and the device's memory as a
    line; the same timeline gives the same bytes.

    Ranks with the same curve share a panel; of more than ``MOST_PANELS`` those with the highest peaks are drawn.
    UserError where the timeline has no memory events, InputError where the file's name does not end in ``.png`` or it
    cannot be written.
    """
    samples = timeline.own_memory()
    if not samples:
        raise UserError(f"{timeline.name}: no memory events to plot; record a trace with profile_memory=True")
    alike = _alike(timeline, samples)
    drawn = _highest([ranks[0] for ranks in alike], samples)
    figure = Figure(figsize=(9, 1.2 + 2.8 * len(drawn)), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(drawn), 1, squeeze=False, sharex=True)[:, 0]
    end_ns = max([timeline.end_ns, *(rank[-1].time_ns for rank in samples.values())])
    for panel, info in zip(panels, drawn, strict=True):
        stopped = next((event for event in timeline.out_of_memory if event.rank == info.rank), None)
        _panel(panel, info, samples[info.rank], end_ns, stopped)
        panel.set_title(_title(next(ranks for ranks in alike if ranks[0] is info)), loc="left", fontsize=10)
        _steps(panel, timeline, info.rank)
    panels[0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)
    panels[-1].set_xlabel("time (ms)")
    hidden = len(alike) - len(drawn)
    figure.suptitle(f"Memory of {timeline.name}" + (f" (the highest {MOST_PANELS} of ranks)" if hidden else ""))
    write_picture(figure, path)


def _alike(timeline: Timeline, samples: Mapping[int, Sequence[MemorySample]]) -> list[list[RankInfo]]:
    """Ranks on devices alike whose memory is the same at every moment, in the order of their first."""
    groups: dict[object, list[RankInfo]] = {}
    curves: dict[int, tuple[tuple[int, int, int], ...]] = {}
    for info in timeline.ranks:
        if info.rank in samples:
            own = samples[info.rank]
            if id(own) not in curves:
                curves[id(own)] = tuple((s.time_ns, s.allocated_bytes, s.reserved_bytes) for s in own)
            curve = curves[id(own)]
            groups.setdefault((info.device_name, info.memory_bytes, curve), []).append(info)
    return list(groups.values())


def _title(ranks: Sequence[RankInfo]) -> str:
    first = ranks[0]
    if len(ranks) == 1:
        return f"rank {first.rank}: {first.device} {first.device_name}".rstrip()
    numbers = ", ".join(str(info.rank) for info in ranks[:MOST_PANELS])
    more = f" and {len(ranks) - MOST_PANELS} more" if len(ranks) > MOST_PANELS else ""
    return f"ranks {numbers}{more}, all alike: {first.device_name}"


def _highest(ranks: Sequence[RankInfo], samples: Mapping[int, Sequence[MemorySample]]) -> list[RankInfo]:
    """The ranks with the highest peaks, in the timeline's order."""

    def peak(info: RankInfo) -> int:
        return max(sample.allocated_bytes for sample in samples[info.rank])

    kept = {info.rank for info in sorted(ranks, key=lambda info: -peak(info))[:MOST_PANELS]}
    return [info for info in ranks if info.rank in kept]


def _panel(
    panel: Any, info: RankInfo, samples: Sequence[MemorySample], end_ns: int, stopped: OutOfMemory | None
) -> None:
    # The last value holds until the end of the run.
    times = [sample.time_ns / NS_PER_MS for sample in samples] + [end_ns / NS_PER_MS]
    allocated = [sample.allocated_bytes / GIB for sample in samples]
    reserved = [sample.reserved_bytes / GIB for sample in samples]
    allocated.append(allocated[-1])
    reserved.append(reserved[-1])
    panel.fill_between(times, allocated, step="post", color=_ALLOCATED, alpha=0.25, linewidth=0)
    panel.step(times, allocated, where="post", color=_ALLOCATED, linewidth=1.2, label="allocated")
    panel.step(times, reserved, where="post", color=_RESERVED, linewidth=1.2, label="reserved")
    top = max(reserved)
    if info.memory_bytes is not None:
        top = max(top, info.memory_bytes / GIB)
        panel.axhline(info.memory_bytes / GIB, color=_CAPACITY, linestyle="--", linewidth=1.2, label="device memory")
    panel.set_xlim(0, end_ns / NS_PER_MS if end_ns else 1)
    panel.set_ylim(0, 1.1 * top if top else 1)
    _mark_peak(panel, samples, end_ns)
    if stopped is not None:
        _mark_stop(panel, stopped)
    panel.set_ylabel("GiB")
    panel.grid(axis="y", alpha=0.3)


def _mark_peak(panel: Any, samples: Sequence[MemorySample], end_ns: int) -> None:
    """A dot and its size, beside and below the dot, or above it where there is no room below."""
    peak = max(samples, key=lambda sample: sample.allocated_bytes)
    time, size = peak.time_ns / NS_PER_MS, peak.allocated_bytes / GIB
    left = 2 * peak.time_ns > end_ns
    below = size > 0.15 * panel.get_ylim()[1]
    panel.plot([time], [size], marker="o", markersize=4, color=_ALLOCATED, clip_on=False)
    panel.annotate(
        f"peak {format_bytes(peak.allocated_bytes)}",
        (time, size),
        xytext=(-6 if left else 6, -6 if below else 6),
        textcoords="offset points",
        ha="right" if left else "left",
        va="top" if below else "bottom",
        fontsize=8,
        color=_ALLOCATED,
        bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.8, "linewidth": 0},
    )


def _mark_stop(panel: Any, stopped: OutOfMemory) -> None:
    panel.axvline(stopped.time_ns / NS_PER_MS, color=_CAPACITY, linewidth=1.2)
    panel.annotate(
        f"out of memory: {stopped.op or 'an op'} asks {format_bytes(stopped.requested_bytes)}",
        (stopped.time_ns / NS_PER_MS, 0.04),
        xycoords=("data", "axes fraction"),
        xytext=(-6, 0),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=_CAPACITY,
        bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.8, "linewidth": 0},
    )


def _steps(panel: Any, timeline: Timeline, rank: int) -> None:
    """A thin line where each step begins."""
    for step in timeline.steps:
        if step.rank == rank:
            panel.axvline(step.start_ns / NS_PER_MS, color="grey", linewidth=0.6, alpha=0.5)
