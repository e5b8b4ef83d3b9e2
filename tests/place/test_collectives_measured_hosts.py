"""Accuracy against collectives measured on A100 hosts, whose curves the model never sees.

The tables (microsoft/vidur, MIT) hold NCCL kernel durations on rank 0 as torch.profiler recorded them: medians of
eleven calls issued back to back.  A kernel of rank 0 also waits for ranks that issue their call later, so below some
megabytes these durations show how fast the hosts issue calls (about 60 us with the profiler on), not the transfer;
the model's ``call_us`` says the same.  Single points jump between the two (7 or 60 us for the same size), so the worst
error is that of the median over half an octave.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median

import pytest

from sim.place.collectives import plan
from sim.topology import load_topology
from sim.units import MIB
from tools.measured_collectives import HOSTS, measured_us

pytestmark = pytest.mark.validation


def errors(topology: str, path: Path, ranks: int) -> dict[int, float]:
    """Predicted / measured by size, every point."""
    machine = load_topology(topology)
    return {
        nbytes: plan(machine, "all_reduce", nbytes, tuple(range(ranks))).call_us / us
        for nbytes, us in measured_us(path, ranks).items()
    }


def by_bin(ratios: dict[int, float], edges: list[float]) -> list[float]:
    """Median ratio of the sizes between neighbouring edges."""
    bins: dict[int, list[float]] = defaultdict(list)
    for nbytes, ratio in ratios.items():
        for i, (low, high) in enumerate(pairwise(edges)):
            if low <= nbytes < high:
                bins[i].append(ratio)
    return [median(values) for _, values in sorted(bins.items())]


@pytest.mark.parametrize(("topology", "file", "ranks"), HOSTS)
def test_from_one_mebibyte_on(shared_dir: Path, topology: str, file: str, ranks: int) -> None:
    ratios = errors(topology, shared_dir / "data" / "nccl" / file, ranks)
    large = {n: r for n, r in ratios.items() if n >= MIB}
    assert fmean(abs(r - 1) for r in large.values()) < 0.10
    medians = by_bin(large, [MIB * 2 ** (i / 2) for i in range(30)])
    assert max(abs(r - 1) for r in medians) < 0.20


@pytest.mark.parametrize(("topology", "file", "ranks"), HOSTS)
def test_below_one_mebibyte(shared_dir: Path, topology: str, file: str, ranks: int) -> None:
    ratios = errors(topology, shared_dir / "data" / "nccl" / file, ranks)
    small = {n: max(r, 1 / r) for n, r in ratios.items() if n < MIB}
    assert median(small.values()) < 1.6
