"""Two profiles as a picture: products, roofline, bandwidth by size, collectives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sim.pictures import BLUE, DPI, GREEN, PURPLE, VERMILION, write_picture
from sim.place.calibration.compare import KINDS, Side, common_dtypes, square_tflops, stream_gb_s
from sim.place.collectives import bus_factor, plan
from sim.topology.device import DeviceProfile
from sim.units import GIB, KIB

_COLOURS = (BLUE, VERMILION, GREEN, PURPLE)
_STYLES = ("-", "--")
_MARKS = ("o", "s")
MOST_DTYPES = 3


def write_plot(left: Side, right: Side, path: Path) -> None:
    """Write a PNG; the same profiles give the same bytes."""
    figure = Figure(figsize=(12, 9), dpi=DPI, layout="constrained")
    panels = figure.subplots(2, 2)
    dtypes = _apart(left, right, common_dtypes(left, right) or tuple(left.device.tflops))[:MOST_DTYPES]
    _draw_products(panels[0][0], (left, right), dtypes)
    _draw_roofline(panels[0][1], (left, right), dtypes)
    _draw_streams(panels[1][0], (left, right))
    _draw_collectives(panels[1][1], (left, right))
    figure.suptitle(f"{left.name} (solid, circles) and {right.name} (dashed, squares)", fontsize=13)
    write_picture(figure, path)


def _apart(left: Side, right: Side, dtypes: tuple[str, ...]) -> tuple[str, ...]:
    """Dtypes whose lines do not lie on another's: of those with the same rates on both sides the first."""
    by_rates = {tuple(side.device.tflops.get(dtype) for side in (left, right)): dtype for dtype in reversed(dtypes)}
    return tuple(dtype for dtype in dtypes if dtype in by_rates.values())


def _labelled(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(visible=True, which="major", alpha=0.3)


def _draw_products(axes: Any, sides: tuple[Side, Side], dtypes: tuple[str, ...]) -> None:
    """Squares: lines as the model has them, marks as measured."""
    widths = [2**i for i in range(6, 15)]
    for side, style, mark in zip(sides, _STYLES, _MARKS, strict=True):
        for dtype, colour in zip(dtypes, _COLOURS, strict=False):
            rates = [square_tflops(side.device, dtype, width) for width in widths]
            known = [(width, rate) for width, rate in zip(widths, rates, strict=True) if rate is not None]
            if known:
                axes.plot(*zip(*known, strict=True), style, color=colour)
            axes.plot(*_measured_squares(side.device, dtype), mark, color=colour, markersize=4)
    _labelled(axes, "square products (marks: measured)", "side", "TFLOP/s")
    _legend(axes, dtypes)


def _measured_squares(device: DeviceProfile, dtype: str) -> tuple[list[float], list[float]]:
    curve = device.measured.gemm
    if curve is None or dtype not in curve.us:
        return [], []
    sides = [(flops / 2.0) ** (1 / 3) for flops in curve.flops]
    rates = [flops / us / 1e6 for flops, us in zip(curve.flops, curve.us[dtype], strict=True)]
    chosen = [(side, rate) for side, rate in zip(sides, rates, strict=True) if side >= 60]
    return [side for side, _ in chosen], [rate for _, rate in chosen]


def _draw_roofline(axes: Any, sides: tuple[Side, Side], dtypes: tuple[str, ...]) -> None:
    """What large kernels reach: bytes at the rate of long streams, operations at that of the best square."""
    intensity = np.logspace(-2, 4, 200)
    for side, style in zip(sides, _STYLES, strict=True):
        slope = stream_gb_s(side.device, GIB) / 1e3
        for dtype, colour in zip(dtypes, _COLOURS, strict=False):
            if dtype not in side.device.tflops:
                continue
            best = max(square_tflops(side.device, dtype, width) or 0.0 for width in (1024, 2048, 4096, 8192))
            axes.plot(intensity, np.minimum(best, slope * intensity), style, color=colour)
            axes.axhline(side.device.tflops[dtype], color=colour, linestyle=":", linewidth=0.8)
    _labelled(axes, "roofline reached (dotted: data sheet)", "operations a byte of DRAM", "TFLOP/s")
    _legend(axes, dtypes)


def _draw_streams(axes: Any, sides: tuple[Side, Side]) -> None:
    sizes = [float(1 << i) for i in range(12, 32)]
    for side, style, mark, colour in zip(sides, _STYLES, _MARKS, _COLOURS, strict=False):
        axes.plot(sizes, [stream_gb_s(side.device, size) for size in sizes], style, color=colour, label=side.name)
        curve = side.device.measured.copy_
        if curve is not None:
            moved = np.array(curve.bytes_moved) / curve.copies
            axes.plot(moved, np.array(curve.bytes_moved) / np.array(curve.us) / 1e3, mark, color=colour, markersize=4)
    _labelled(axes, "elementwise and copies (marks: measured)", "bytes read and written", "GB/s")
    axes.legend(fontsize=8)


def _draw_collectives(axes: Any, sides: tuple[Side, Side]) -> None:
    able = [side for side in sides if side.ranks > 1]
    if not able:
        axes.axis("off")
        axes.text(
            0.5, 0.5, "no links in either: give topologies\n(calibrate --links writes one)", ha="center", va="center"
        )
        return
    for side, style, mark in zip(sides, _STYLES, _MARKS, strict=True):
        if side.machine is None or side.ranks < 2:
            continue
        for kind, colour in zip(KINDS, _COLOURS, strict=True):
            sizes = [KIB << i for i in range(0, 21, 2)]
            plans = [plan(side.machine, kind, size, tuple(range(side.ranks))) for size in sizes]
            axes.plot(sizes, [p.busbw_gb_s for p in plans], style, color=colour)
            points = [*_measured_points(side, kind)]
            if points:
                axes.plot(*zip(*points, strict=True), mark, color=colour, markersize=4)
    ranks = " and ".join(f"{side.ranks} of {side.name}" for side in able)
    _labelled(axes, f"collectives over {ranks} (marks: measured)", "bytes of the whole tensor", "bus bandwidth, GB/s")
    _legend(axes, KINDS)


def _measured_points(side: Side, kind: str) -> Iterator[tuple[float, float]]:
    assert side.machine is not None
    for curve in side.machine.collectives.measured:
        if curve.kind == kind and curve.ranks == side.ranks:
            share = bus_factor(kind, side.ranks)
            yield from ((size, size / us / 1e3 * share) for size, us in zip(curve.bytes, curve.us, strict=True))


def _legend(axes: Any, names: tuple[str, ...]) -> None:
    handles = [Line2D([], [], color=colour) for _, colour in zip(names, _COLOURS, strict=False)]
    axes.legend(handles, names, fontsize=8)
