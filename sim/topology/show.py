"""A machine told to people: its devices, links, routes and bandwidths as tables of at most 100 columns."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from sim.topology.device import DeviceProfile
from sim.topology.machine import Gpu, Link, Machine
from sim.topology.schema import MeasuredCurve
from sim.units import MIB

WIDTH = 100
_MATRIX_LIMIT = 16
_MATRIX_NAME, _MATRIX_CELL = 4, 6  # columns of a device's name and of a path, ``SYS+`` and what is between two
_LONGEST_VALUE = 60

Row = tuple[str, ...]


def show(machine: Machine, console: Console) -> None:
    """Print the machine."""
    width = min(console.width, WIDTH)
    console.print(Group(*_parts(machine, width)), width=width, soft_wrap=False)


def _parts(machine: Machine, width: int) -> Iterator[RenderableType]:
    yield Text(f"{machine.name}: {machine.description}", style="bold")
    yield Text(f"source: {machine.source}", style="dim")
    for remark in machine.remarks:
        yield Text(f"note: {remark}", style="yellow")
    for change in machine.changes:
        yield Text(f"changed: {change.path} from {_cut(change.before)} to {_cut(change.after)}", style="yellow")
    yield table("Devices", DEVICE_HEAD, device_rows(machine))
    if machine.links:
        yield table("Links", LINK_HEAD, link_rows(machine))
    if len(machine.gpus) > 1:
        shown = min(len(machine.gpus), _MATRIX_LIMIT, max((width - _MATRIX_NAME) // _MATRIX_CELL, 2))
        some = f", the first {shown} of {len(machine.gpus)}" if shown < len(machine.gpus) else ""
        yield table(f"Paths between devices{some}", *path_matrix(machine, shown))
        yield Text(_PATH_KEY, style="dim")
        yield table("Pair bandwidth, derived from the links", PAIR_HEAD, pair_rows(machine))
    if machine.collectives.measured:
        yield table("Measured collectives", CURVE_HEAD, curve_rows(machine))


def _cut(value: object) -> str:
    """A whole measured curve is one value too."""
    text = str(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


def table(title: str, head: Row, rows: list[Row]) -> Table:
    """A plain table: the first column left, numbers right."""
    result = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, show_edge=False)
    for place, name in enumerate(head):
        numeric = all(row[place].replace(".", "").isdigit() for row in rows) and rows
        result.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        result.add_row(*row)
    return result


# Devices --------------------------------------------------------------------------------------------------------

DEVICE_HEAD = ("devices", "profile", "SMs", "GiB", "GB/s", "fp16 TFLOP/s", "fp32 TFLOP/s", "PCIe", "measured")


def device_rows(machine: Machine) -> list[Row]:
    """One row for neighbouring devices of one profile."""
    rows = []
    for _, alike in groupby(machine.gpus, key=lambda gpu: gpu.profile):
        gpus = list(alike)
        rows.append((span([gpu.name for gpu in gpus]), *_profile_cells(gpus[0].profile)))
    return rows


def _profile_cells(profile: DeviceProfile) -> Row:
    measured = [k for k, v in (("gemm", profile.measured.gemm), ("copy", profile.measured.copy_)) if v]
    return (
        profile.name,
        str(profile.sms),
        f"{profile.memory_gib:g}",
        f"{profile.memory_bandwidth_gb_s:g}",
        f"{profile.tflops['float16']:g}" if "float16" in profile.tflops else "-",
        f"{profile.tflops['float32']:g}" if "float32" in profile.tflops else "-",
        f"{profile.pcie.generation}.0 x{profile.pcie.lanes}" if profile.pcie else "-",
        ", ".join(measured) or "-",
    )


def span(names: list[str]) -> str:
    """``gpu0-gpu7`` for a run of names."""
    return names[0] if len(names) == 1 else f"{names[0]}-{names[-1]}"


# Links ----------------------------------------------------------------------------------------------------------

LINK_HEAD = ("class", "kind", "links", "GB/s a direction", "us", "duplex", "source")


def link_rows(machine: Machine) -> list[Row]:
    """One row a class of links, and one more for those of it that are several times as wide."""
    found: dict[tuple[str, float], list[Link]] = {}
    for link in machine.links:
        found.setdefault((link.cls, link.bandwidth_gb_s), []).append(link)
    rows: list[Row] = []
    for (cls, rate), links in sorted(found.items()):
        one = links[0]
        rows.append((cls, one.kind, str(len(links)), f"{rate:g}", f"{one.latency_us:g}", one.duplex, one.source))
    return rows


# Paths ----------------------------------------------------------------------------------------------------------

_PATH_KEY = (
    "NVL: NVLink, NVS: NVSwitch, PIX: one PCIe switch, PXB: several, PHB: through a CPU, SYS: across sockets, "
    "NET: network; *: no peer-to-peer, through host memory; +: so where more than two of the host take part"
)


def path_matrix(machine: Machine, shown: int) -> tuple[Row, list[Row]]:
    """Head and rows of the matrix that ``nvidia-smi topo -m`` prints, of the first devices."""
    gpus = machine.gpus[:shown]
    labels = [gpu.name.removeprefix("gpu") if len(gpus) > 8 else gpu.name for gpu in gpus]
    rows = [(a.name, *(_path_cell(machine, a, b) for b in gpus)) for a in gpus]
    return ("", *labels), rows


def _path_cell(machine: Machine, a: Gpu, b: Gpu) -> str:
    if a is b:
        return "X"
    path = machine.route(a.name, b.name).path
    if path == "NET" or machine.p2p(a.name, b.name, _crowd(machine, a)):
        return path
    return f"{path}+" if machine.p2p(a.name, b.name) else f"{path}*"


def _crowd(machine: Machine, gpu: Gpu) -> int:
    """The GPUs of this one's host, which are the ranks of a communicator of all."""
    return sum(other.host == gpu.host for other in machine.gpus)


PAIR_HEAD = ("path", "pairs", "for example", "GB/s a direction", "us", "bounded by")


def pair_rows(machine: Machine) -> list[Row]:
    """One row for each kind of pair: how many there are, and what one transfer gets alone."""
    kinds: dict[tuple[str, float, float], list[tuple[str, str]]] = {}
    for a in machine.gpus:
        for b in machine.gpus[a.index + 1 :]:
            route = machine.transfer_route(a.name, b.name)
            path = f"{route.path}{' through host memory' if route.via_host else ''}"
            kinds.setdefault((path, route.bandwidth_gb_s, route.latency_us), []).append((a.name, b.name))
    return [
        (path, str(len(pairs)), f"{pairs[0][0]} to {pairs[0][1]}", f"{rate:g}", f"{us:g}", _bound(machine, *pairs[0]))
        for (path, rate, us), pairs in kinds.items()
    ]


def _bound(machine: Machine, a: str, b: str) -> str:
    links: tuple[Link, ...] = machine.transfer_route(a, b).links
    return min(links, key=lambda link: (link.bandwidth_gb_s, link.cls)).cls


# Measured collectives -------------------------------------------------------------------------------------------

CURVE_HEAD = ("collective", "ranks", "smallest us", "us at 1 MiB", "busbw GB/s at the largest", "sizes")


def curve_rows(machine: Machine) -> list[Row]:
    """One row a measured curve."""
    return [_curve_cells(curve) for curve in machine.collectives.measured]


def _curve_cells(curve: MeasuredCurve) -> Row:
    factor = {"all_reduce": 2 * (curve.ranks - 1) / curve.ranks}.get(curve.kind)
    if factor is None:
        factor = (curve.ranks - 1) / curve.ranks if curve.kind in _PARTS else 1.0
    at_mib = [us for size, us in zip(curve.bytes, curve.us, strict=True) if size == MIB]
    return (
        curve.kind,
        str(curve.ranks),
        f"{min(curve.us):.1f}",
        f"{at_mib[0]:.1f}" if at_mib else "-",
        f"{curve.bytes[-1] / curve.us[-1] / 1e3 * factor:.2f}",
        f"{curve.bytes[0]:g} B to {curve.bytes[-1] / MIB:g} MiB",
    )


_PARTS = ("all_gather", "reduce_scatter", "all_to_all")
