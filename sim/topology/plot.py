"""A drawing of a machine: GPUs in a row, what joins them above (PCIe, sockets, network) and below (NVLink)."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from math import ceil
from pathlib import Path
from typing import Any

import networkx as nx
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch

from sim.pictures import DRAWINGS, write_picture
from sim.topology.machine import Link, Machine

# From the GPUs upwards; memory and NICs share a level.
_ABOVE = (("pcie-switch",), ("cpu",), ("memory", "nic"), ("network-switch",))
_FILL = {
    "gpu": "#d7ecd9", "nvswitch": "#cfe3cf", "pcie-switch": "#e4e4e4", "cpu": "#d6e4f5", "memory": "#eadcf2",
    "nic": "#fbe5cf", "network-switch": "#f6d2b3",
}  # fmt: skip
_INK = ("#1b6ca8", "#2e8b3d", "#b3541e", "#7a3e9d", "#8c8c00", "#aa2e5b", "#444444")
_WIDTHS = {"nvlink": 3.0, "pcie": 1.8, "smp": 2.6, "memory": 1.6, "network": 2.0}

_LETTERS_AN_INCH, _LINE_INCHES = 10.0, 0.22  # of the title

MOST_DRAWN = 16  # GPUs side by side whose names can be read

Spot = tuple[float, float]


def plot(machine: Machine, path: Path) -> None:
    """Draw the machine into a PNG, SVG or PDF, as the suffix says.  InputError where it cannot be written.

    Of many hosts, which are alike, the first ones are drawn, and the title says of how many.
    """
    hosts = machine.hosts
    machine = _first_hosts(machine, max(MOST_DRAWN * hosts // len(machine.gpus), 1))
    spots = place_nodes(machine)
    highest = max(y for _, y in spots.values())
    lowest = min(-0.4 if any(k.kind == "nvlink" for k in machine.links) else 0.0, *(y for _, y in spots.values()))
    across = max(x for x, _ in spots.values()) + 1
    mark = " (hypothetical)" if machine.hypothetical else ""
    title = f"{machine.name}{mark}: {machine.description}"
    if machine.hosts < hosts:
        title += f" (drawn: {machine.hosts} of {hosts} hosts alike)"
    width, height = min(20.0, max(8.0, 1.35 * across + 1)), 1.5 * (highest - lowest) + 2.4
    above = _LINE_INCHES * max(ceil(len(title) / (_LETTERS_AN_INCH * width)) - 2, 0)  # there is room for two lines
    figure = Figure(figsize=(width, height + above), dpi=110)
    drawn = height / (height + above)
    axes = figure.add_axes((0.02, 0.16 * drawn, 0.96, 0.74 * drawn))
    colours = _colours(machine)
    for link in machine.links:
        _draw_link(axes, link, spots, colours[link.cls])
    for node, spot in spots.items():
        _draw_node(axes, machine, node, spot, dense=across > 12)
    axes.set_xlim(-0.7, across - 0.3)
    axes.set_ylim(lowest - 0.3, highest + 0.35)
    axes.axis("off")
    figure.suptitle(title, fontsize=12, y=0.975, wrap=True)
    figure.legend(handles=_legend(machine, colours), loc="lower center", ncol=2, frameon=False, fontsize=10)
    write_picture(figure, path, DRAWINGS)


def _colours(machine: Machine) -> dict[str, str]:
    classes = sorted({link.cls for link in machine.links})
    return {cls: _INK[i % len(_INK)] for i, cls in enumerate(classes)}


def _first_hosts(machine: Machine, count: int) -> Machine:
    """The machine with so many of its hosts, and what all of them share."""
    if machine.hosts <= count:
        return machine
    apart = nx.Graph((link.a, link.b) for link in machine.links if link.kind != "network")
    apart.add_nodes_from(machine.graph)
    left_out = {n for gpu in machine.gpus if gpu.host >= count for n in nx.node_connected_component(apart, gpu.name)}
    return replace(
        machine,
        hosts=count,
        gpus=tuple(gpu for gpu in machine.gpus if gpu.host < count),
        nodes={node: kind for node, kind in machine.nodes.items() if node not in left_out},
        links=tuple(link for link in machine.links if not {link.a, link.b} & left_out),
    )


# Where things stand ---------------------------------------------------------------------------------------------


def place_nodes(machine: Machine) -> dict[str, Spot]:
    """GPUs side by side; every other node above or below the middle of what it joins, on its kind's level."""
    spots: dict[str, Spot] = {gpu.name: (float(gpu.index), 0.0) for gpu in machine.gpus}
    present = [kinds for kinds in _ABOVE if any(k in kinds for k in machine.nodes.values())]
    for level, kinds in [(-1.4, ("nvswitch",)), *((i + 1.0, kinds) for i, kinds in enumerate(present))]:
        wanted = [(_middle(machine, node, spots), node) for node, kind in machine.nodes.items() if kind in kinds]
        spots.update(_spread(wanted, level, spots))
    return spots


def _middle(machine: Machine, node: str, spots: dict[str, Spot]) -> float:
    """Mean place of the neighbours that already stand, or the middle of the drawing."""
    near = [link.other(node) for link in machine.links if node in (link.a, link.b)]
    places = [spots[n][0] for n in near if n in spots]
    return sum(places) / len(places) if places else (len(machine.gpus) - 1) / 2


def _spread(wanted: list[tuple[float, str]], level: float, spots: dict[str, Spot]) -> dict[str, Spot]:
    """The nodes at their places on a level, moved right where two would overlap or hide one that stands there."""
    taken = sorted(x for x, y in spots.values() if y == level)
    placed: dict[str, Spot] = {}
    for x, node in sorted(wanted):
        while any(abs(x - t) < 1.0 for t in taken):
            x += 0.5
        taken.append(x)
        placed[node] = (x, level)
    return placed


# Ink ------------------------------------------------------------------------------------------------------------


def _draw_node(axes: Any, machine: Machine, node: str, spot: Spot, *, dense: bool) -> None:
    kind = machine.kind(node)
    text = node
    if kind == "gpu" and not dense:
        profile = machine.gpu(node).profile
        text = f"{node}\n{profile.name}\n{profile.memory_gib:g} GiB"
    box = {"boxstyle": "round,pad=0.35", "facecolor": _FILL[kind], "edgecolor": "#555555", "linewidth": 1.0}
    axes.text(*spot, text, ha="center", va="center", fontsize=9, bbox=box, zorder=3)


def _draw_link(axes: Any, link: Link, spots: dict[str, Spot], colour: str) -> None:
    a, b = spots[link.a], spots[link.b]
    if min(a[1], b[1]) < 0:  # leave a GPU's box at its lower edge, not behind its neighbours
        a, b = ((x, y - 0.2 if y == 0 else y) for x, y in (a, b))
    # Links between two on one level bow away from those between levels, so that none runs through a node.
    bow = 0.0
    if a[1] == b[1]:
        bow = (0.45 if a[1] <= 0 else -0.3) / max(1.0, abs(b[0] - a[0]) ** 0.5)
    arc = FancyArrowPatch(
        a, b, arrowstyle="-", connectionstyle=f"arc3,rad={bow}", color=colour, linewidth=_WIDTHS[link.kind], zorder=1
    )
    axes.add_patch(arc)


def _legend(machine: Machine, colours: dict[str, str]) -> list[Line2D]:
    handles = []
    for cls, alike in groupby(machine.links, key=lambda link: link.cls):
        links = list(alike)
        link, rates = links[0], sorted({each.bandwidth_gb_s for each in links})
        way = "a direction" if link.duplex == "full" else "both ways together"
        name = cls if cls == link.kind else f"{cls} ({link.kind})"
        label = f"{name}: {' or '.join(f'{rate:g}' for rate in rates)} GB/s {way}"
        handles.append(Line2D([], [], color=colours[cls], linewidth=_WIDTHS[link.kind], label=label))
    return handles
