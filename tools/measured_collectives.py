"""Collectives measured on hosts of A100s (microsoft/vidur, MIT): for the validation tests and docs/accuracy.md.

NCCL kernels on rank 0 as torch.profiler recorded them, medians of eleven calls issued back to back, three times
(``min``, ``median``, ``mean``, ``max`` of the three).
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

STATISTICS = ("median", "mean", "min", "max")


@dataclass(frozen=True)
class Host:
    """A shipped topology, the table measured on such a host, and how many ranks of one host took part."""

    topology: str
    file: str
    kind: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.topology} {self.kind} {self.ranks}"


HOSTS = (
    Host("dgx-a100", "a100_dgx_all_reduce.csv", "all_reduce", 2),
    Host("dgx-a100", "a100_dgx_all_reduce.csv", "all_reduce", 4),
    Host("dgx-a100", "a100_dgx_all_reduce.csv", "all_reduce", 8),
    Host("a100-pcie-pairs", "a100_pairwise_nvlink_all_reduce.csv", "all_reduce", 2),
    Host("a100-pcie-pairs", "a100_pairwise_nvlink_all_reduce.csv", "all_reduce", 4),
    Host("a100-pcie-pairs", "a100_pairwise_nvlink_send_recv.csv", "send", 2),
)


def measured_us(host: Host, folder: Path) -> dict[int, dict[str, float]]:
    """Microseconds by bytes and statistic, for runs inside one host; of a size measured twice the mean."""
    rows: dict[int, list[dict[str, float]]] = {}
    name = "send_recv" if host.kind == "send" else host.kind
    with (folder / host.file).open() as file:
        for row in csv.DictReader(file):
            if int(row["num_workers"]) == int(row["devices_per_node"]) == host.ranks:
                times = {s: float(row[f"time_stats.{name}.{s}"]) * 1e3 for s in STATISTICS}
                rows.setdefault(int(row["size"]), []).append(times)
    return {nbytes: {s: fmean(times[s] for times in rows[nbytes]) for s in STATISTICS} for nbytes in sorted(rows)}
