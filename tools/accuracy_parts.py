"""What docs/accuracy.md says of collectives and of single kernels, each judged by what others give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import tools.fit_kernels as fit
from sim.topology.device import load_device, shipped_devices
from tools.accuracy_page import Covered, Report, share
from tools.measured_collectives import HOSTS
from tools.predictive import by_device, new_device_interval
from tools.validate_collectives import compared, large

Ratios = np.ndarray[Any, np.dtype[np.float64]]


def collectives(report: Report) -> None:
    report.section(
        "Collectives on measured hosts",
        "microsoft/vidur: NCCL's kernels on A100 hosts whose curves the model does not see (medians of rank 0, which "
        "also waits for ranks that come late), from 1 MiB on, where bytes decide; docs/collectives.md has the rest. "
        "For the coverage each case is judged by the interval that the others give.",
    )
    cases = {}
    for host in HOSTS:
        points = large(compared(host, fit.SHARED / "data" / "nccl"))
        cases[host] = np.array([1 / point.ratio() for point in points])
    rows = []
    inside = total = 0
    for host, ratios in cases.items():
        others = [other for it, other in cases.items() if it is not host and it.kind == host.kind]
        held = _inside(ratios, *new_device_interval(others)) if len(others) > 1 else None
        errors = np.abs(1 / ratios - 1)
        rows.append([host.topology, host.kind, str(host.ranks), str(len(ratios)), f"{100 * errors.mean():.1f} %",
                     f"{100 * np.median(errors):.1f} %", share(held, len(ratios))])  # fmt: skip
        inside, total = inside + (held or 0), total + (0 if held is None else len(ratios))
    report.table(("host", "kind", "ranks", "sizes", "mean error", "median", "inside the interval"), rows)
    report.covered.append(Covered("collectives from 1 MiB on", inside, total, "yes: others judge each"))


def kernels(report: Report) -> None:
    gemms, rows = fit.read_gemms(), fit.read_rows()
    profiles = {name: load_device(name) for name in shipped_devices()}
    own = fit.judge(gemms, rows, fit.themselves(profiles), everything=False)
    report.section(
        "Single kernels on shapes left out",
        "A fifth of the shapes (those whose CRC-32 of their sizes is a multiple of five) is seen by no fit. The "
        "intervals are the 10th and 90th percentile of these very ratios by device and class of op; for the coverage "
        "the shapes left out are halved (by their order) and each half is judged by the other's percentiles.",
    )
    _kernel_table(report, own, _halves(own), "single kernels, shapes left out", "yes: half judges half")
    borrowed = fit.judge(gemms, rows, fit.left_out(profiles), everything=True)
    report.section(
        "Single kernels on GPUs left out",
        "Each GPU predicted from its data sheet and the other GPUs, all shapes, its own curves left out too. The "
        "shipped intervals of a GPU that was never measured come from all these devices (docs/ranges.md); for the "
        "coverage each device is judged by the interval that the others give. Products in half precision were measured "
        "on two devices only, which leaves one to judge by: they are not counted.",
    )
    _kernel_table(report, borrowed, _others(borrowed), "single kernels, GPUs left out", "yes: others judge each")


def _kernel_table(
    report: Report, judged: Sequence[fit.Judged], inside: Mapping[tuple[str, str], int], family: str, unseen: str
) -> None:
    rows = []
    for one in judged:
        errors = np.abs(1 / one.ratio - 1)
        held = inside.get((one.device, one.op))
        rows.append([one.device, one.op, str(len(errors)), f"{100 * errors.mean():.1f} %",
                     f"{100 * np.median(errors):.1f} %", share(held, len(errors))])  # fmt: skip
    every = np.concatenate([np.abs(1 / one.ratio - 1) for one in judged])
    counted = sum(len(one.ratio) for one in judged if (one.device, one.op) in inside)
    rows.append(["all", "all", str(len(every)), f"{100 * every.mean():.1f} %", f"{100 * np.median(every):.1f} %",
                 f"{100 * sum(inside.values()) / counted:.0f} %"])  # fmt: skip
    report.table(("device", "op", "shapes", "mean error", "median", "inside the interval"), rows)
    report.covered.append(Covered(family, sum(inside.values()), counted, unseen))


def _inside(ratio: Ratios, low: float, high: float) -> int:
    return int(((ratio >= low) & (ratio <= high)).sum())


def _halves(judged: Sequence[fit.Judged]) -> dict[tuple[str, str], int]:
    together: dict[tuple[str, str], list[fit.Judged]] = {}
    for one in judged:
        together.setdefault((one.device, fit.op_class(one.op)), []).append(one)
    found = {}
    for alike in together.values():
        halves = [np.concatenate([one.ratio[i::2] for one in alike]) for i in range(2)]
        for one in alike:
            found[one.device, one.op] = sum(
                _inside(one.ratio[i::2], *np.quantile(halves[1 - i], [0.1, 0.9])) for i in range(2)
            )
    return found


def _others(judged: Sequence[fit.Judged]) -> dict[tuple[str, str], int]:
    """Each device judged by the interval that the others give; with one other device there is none."""
    found = {}
    for one in judged:
        others = by_device([
            (other.device, other.ratio)
            for other in judged
            if fit.op_class(other.op) == fit.op_class(one.op) and other.device != one.device
        ])  # fmt: skip
        if len(others) > 1:
            found[one.device, one.op] = _inside(one.ratio, *new_device_interval(list(others.values())))
    return found
