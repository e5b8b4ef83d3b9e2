"""Two profiles side by side: what their data sheets say, what kernels get on them, what their hosts and links take.

A side is a device profile or a topology, shipped or a file; of a topology its (first) device is compared, and its
host and its collectives too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from sim.errors import UnknownNameError, UserError
from sim.place.collectives import plan
from sim.place.kernels.gemm import products, products_us
from sim.place.kernels.memory import floor_us, memory_us
from sim.place.kernels.single import kernel_rows
from sim.topology.abilities import abilities_of
from sim.topology.device import DeviceProfile, read_device, shipped_devices, validate_device
from sim.topology.load import load_topology, shipped_topologies
from sim.topology.machine import Machine
from sim.units import GIB, KIB, MIB, format_bytes

SIDES = (1024, 4096)
COLLECTIVE_SIZES = (KIB, MIB, 64 * MIB)
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast")


class Side(NamedTuple):
    """A profile, and the machine it is in where a topology was given."""

    name: str
    device: DeviceProfile
    machine: Machine | None

    @property
    def ranks(self) -> int:
        """How many devices a collective can have."""
        return len(self.machine.gpus) if self.machine is not None else 1


class Row(NamedTuple):
    """A figure of both sides; None where a side has none."""

    what: str
    unit: str
    left: float | None
    right: float | None


def read_side(given: str) -> Side:
    """A shipped name or a file.  UserError where it is neither a device profile nor a topology."""
    bare = given.removesuffix(".yaml")
    if bare in shipped_topologies() and bare not in shipped_devices():
        machine = load_topology(given)
        return Side(machine.name, machine.gpus[0].profile, machine)
    try:
        data, where = read_device(given)
    except UnknownNameError:
        known = (*shipped_devices(), *shipped_topologies())
        raise UnknownNameError("device profile or topology", given, known, "a file's path works too") from None
    if "devices" in data:
        machine = load_topology(given)
        return Side(machine.name, machine.gpus[0].profile, machine)
    if "tflops" not in data:
        raise UserError(f"{where}: is neither a device profile (it has no tflops) nor a topology (it has no devices)")
    profile = validate_device(data, where)
    return Side(profile.name, profile, None)


def common_dtypes(left: Side, right: Side) -> tuple[str, ...]:
    """Dtypes that both rate, in the order of the first."""
    return tuple(dtype for dtype in left.device.tflops if dtype in right.device.tflops)


def compared(left: Side, right: Side) -> list[Row]:
    """All rows that at least one side has a figure for."""
    rows = [
        Row(what, unit, figure(left), figure(right))
        for what, unit, figure in (*_sheet(left), *_products(left, right), *_times())
    ]
    return [row for row in (*rows, *_collective_rows(left, right)) if (row.left, row.right) != (None, None)]


_Figure = tuple[str, str, Callable[[Side], float | None]]


def _sheet(left: Side) -> Iterator[_Figure]:
    yield "cores" if left.device.kind == "cpu" else "SMs", "", lambda side: float(side.device.sms)
    yield "memory", "GiB", lambda side: side.device.memory_gib
    yield "memory bandwidth, data sheet", "GB/s", lambda side: side.device.memory_bandwidth_gb_s
    yield "memory bandwidth, large streams", "GB/s", lambda side: stream_gb_s(side.device, GIB)


def _products(left: Side, right: Side) -> Iterator[_Figure]:
    for dtype in dict.fromkeys((*left.device.tflops, *right.device.tflops)):
        yield f"{dtype}, data sheet", "TFLOP/s", partial(_rated, dtype)
        for width in SIDES:
            yield f"{dtype}, {width}^3 product", "TFLOP/s", partial(_reached, dtype, width)


def _times() -> Iterator[_Figure]:
    for op in ("softmax", "layer_norm"):
        yield f"{op} of 4096 x 1024 float32", "us", partial(_row_us, op)
    yield "shortest kernel", "us", lambda side: floor_us(side.device)
    for key in ("launch_latency_us", "kernel_gap_us"):
        yield key.removesuffix("_us").replace("_", " "), "us", partial(_launch, key)
    for key in ("op_us", "metadata_us", "collective_us"):
        yield f"host: {key}", "us", partial(_host, key)


def _rated(dtype: str, side: Side) -> float | None:
    return side.device.tflops.get(dtype)


def _reached(dtype: str, width: int, side: Side) -> float | None:
    return square_tflops(side.device, dtype, width)


def _row_us(op: str, side: Side) -> float:
    return kernel_rows(op, [{"rows": 4096, "columns": 1024}], "float32", side.device)[0].kernel_us


def _launch(key: str, side: Side) -> float | None:
    return None if side.device.launch is None else getattr(side.device.launch, key)


def _host(key: str, side: Side) -> float | None:
    return None if side.machine is None else getattr(side.machine.host, key)


def _collective_rows(left: Side, right: Side) -> Iterator[Row]:
    ranks = min((side.ranks for side in (left, right) if side.ranks > 1), default=1)
    if ranks > 1:
        for kind in KINDS:
            for size in COLLECTIVE_SIZES:
                times = (collective_us(side, kind, size, ranks) for side in (left, right))
                yield Row(f"{kind}, {ranks} ranks, {format_bytes(size)}", "us", *times)


def square_tflops(device: DeviceProfile, dtype: str, side: int) -> float | None:
    """What a square product reaches; None where the data sheet does not rate the dtype."""
    if dtype not in device.tflops:
        return None
    n = np.array([float(side)])
    us = float(products_us(products(np.ones(1), n, n, n, dtype), dtype, abilities_of(device)).us[0])
    return 2.0 * side**3 / us / 1e6


def stream_gb_s(device: DeviceProfile, nbytes: float) -> float:
    """What a kernel that reads and writes so many bytes in all reaches."""
    return nbytes / float(memory_us(np.array([float(nbytes)]), abilities_of(device))[0]) / 1e3


def collective_us(side: Side, kind: str, nbytes: int, ranks: int) -> float | None:
    """Time of a call; None where the side has too few devices."""
    if side.machine is None or side.ranks < ranks:
        return None
    return plan(side.machine, kind, nbytes, tuple(range(ranks))).call_us


def show(left: Side, right: Side, console: Console) -> None:
    """The rows as a table, the right side's over the left's in the last column."""
    table = Table(box=None, pad_edge=False, show_edge=False)
    for name in ("", "", left.name, right.name, "ratio"):
        table.add_column(name, justify="left" if not name else "right", overflow="fold")
    for row in compared(left, right):
        ratio = f"{row.right / row.left:.2f}" if row.left and row.right else ""
        table.add_row(row.what, row.unit, _figure(row.left), _figure(row.right), ratio)
    console.print(table)


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
