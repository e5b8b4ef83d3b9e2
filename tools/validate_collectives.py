"""Predicted collectives beside measured ones, on hosts whose curves the model does not see.

    python tools/validate_collectives.py [FOLDER]

FOLDER (../shared/data/nccl) holds the tables that tools/measured_collectives.py reads.  Ranks start their calls at
different moments, so a kernel takes the transfer where rank 0 came last, and the pace at which the last rank issues
calls where it did not: below some megabytes the same size shows 7 or 60 us.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, quantiles

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sim.place.collectives import CollectivePlan, plan
from sim.report.cells import plain_table
from sim.topology import load_topology
from sim.units import MIB
from tools.measured_collectives import HOSTS, STATISTICS, Host, measured_us

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data" / "nccl"
FACTOR = 1.6
WIDTH = 120


@dataclass(frozen=True)
class Point:
    """One size: what was predicted, and microseconds measured by statistic."""

    predicted: CollectivePlan
    measured_us: dict[str, float]

    def ratio(self, statistic: str = "median") -> float:
        """Predicted / measured."""
        return self.predicted.call_us / self.measured_us[statistic]

    def factor(self, statistic: str = "median") -> float:
        """How many times too long or too short."""
        return max(self.ratio(statistic), 1 / self.ratio(statistic))


def compared(host: Host, folder: Path) -> list[Point]:
    """Every size measured inside one host, in order of size."""
    machine, gpus = load_topology(host.topology), tuple(range(host.ranks))
    measured = measured_us(host, folder)
    return [Point(plan(machine, host.kind, nbytes, gpus), times) for nbytes, times in measured.items()]


def large(points: Sequence[Point]) -> list[Point]:
    """From 1 MiB on."""
    return [p for p in points if p.predicted.nbytes >= MIB]


def small(points: Sequence[Point]) -> list[Point]:
    """Below 1 MiB."""
    return [p for p in points if p.predicted.nbytes < MIB]


def errors(points: Sequence[Point], statistic: str = "median") -> list[float]:
    return [abs(p.ratio(statistic) - 1) for p in points]


def best_possible(points: Sequence[Point], statistic: str = "median") -> float:
    """The share of points that a curve which never falls can have within FACTOR of the measured, at best."""
    measured = [p.measured_us[statistic] for p in points]
    levels = sorted({us * FACTOR for us in measured} | {us / FACTOR for us in measured})
    most = [0] * len(levels)  # points met by a curve that has come no higher than the level
    for us in measured:
        first, last = bisect_left(levels, us / FACTOR), bisect_left(levels, us * FACTOR)
        reached, so_far = [], 0
        for i, met in enumerate(most):
            so_far = max(so_far, met)
            reached.append(so_far + (first <= i <= last))
        most = reached
    return max(most) / len(points)


# Tables -------------------------------------------------------------------------------------------------------------


def accuracy_table(hosts: Sequence[tuple[Host, list[Point]]]) -> Table:
    """Errors from 1 MiB on and factors below it, against the median."""
    table = plain_table("", "ranks", "sizes", "mean", "worst", "over 20 %", "sizes", "median", "within 1.6", "at best")
    for column in table.columns:
        column.no_wrap = True
    for host, points in hosts:
        above, below = large(points), small(points)
        off, factors = errors(above), [p.factor() for p in below]
        table.add_row(
            f"{host.topology} {host.kind}", str(host.ranks), str(len(above)), f"{fmean(off):.1%}", f"{max(off):.1%}",
            str(sum(e > 0.2 for e in off)), str(len(below)), f"{median(factors):.2f}",
            f"{sum(f <= FACTOR for f in factors) / len(factors):.0%}", f"{best_possible(below):.0%}",
        )  # fmt: skip
    table.caption = "from 1 MiB on (left) and below (right), median on rank 0; at best: any curve that never falls"
    return table


def statistics_table(hosts: Sequence[tuple[Host, list[Point]]]) -> Table:
    """The same against each statistic of the tables: mean error from 1 MiB on, share within 1.6 below."""
    table = plain_table("", "ranks", *STATISTICS, *STATISTICS)
    for column in table.columns:
        column.no_wrap = True
    for host, points in hosts:
        above = [f"{fmean(errors(large(points), s)):.1%}" for s in STATISTICS]
        below = [f"{fmean(p.factor(s) <= FACTOR for p in small(points)):.0%}" for s in STATISTICS]
        table.add_row(f"{host.topology} {host.kind}", str(host.ranks), *above, *below)
    table.caption = "by statistic: mean error from 1 MiB on (left), share within a factor of 1.6 below (right)"
    return table


def spreads(hosts: Sequence[tuple[Host, list[Point]]]) -> Iterator[tuple[str, int, float, float]]:
    """What sim/place/collective_spread.py holds: p10 and p90 of measured / predicted time on the devices.

    Bound by bytes: medians.  Bound by latency: the shortest of the three, where it is below the host's pace.
    """
    bytes_bound, latency_bound = [], []
    for host, points in hosts:
        if host.kind == "send":
            continue
        pace = load_topology(host.topology).host.collective_us
        for p in points:
            ns = p.predicted.ns / 1e3
            if p.predicted.transfer_ns >= p.predicted.latency_ns:
                bytes_bound.append(p.measured_us["median"] / ns)
            elif p.measured_us["min"] < pace or ns > pace:
                latency_bound.append(p.measured_us["min"] / ns)
    for name, ratios in (("bytes", bytes_bound), ("latency", latency_bound)):
        tenths = quantiles(ratios, n=10)
        yield name, len(ratios), tenths[0], tenths[-1]


def main(arguments: list[str]) -> None:
    folder = Path(arguments[0]) if arguments else FOLDER
    if not folder.is_dir():
        print(f"no measured collectives at {folder}: nothing to compare with")
        return
    console = Console()
    if console.width < WIDTH:
        console = Console(width=WIDTH)
    with console.status("comparing"):
        hosts = [(host, compared(host, folder)) for host in HOSTS]
        tables = accuracy_table(hosts), statistics_table(hosts)
    for table in tables:
        console.print(table)
    for name, count, p10, p90 in spreads(hosts):
        console.print(f"measured / predicted, bound by {name} ({count} sizes): p10 {p10:.2f}, p90 {p90:.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
