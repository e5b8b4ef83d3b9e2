"""All-reduces measured on hosts of A100s (microsoft/vidur, MIT): for the validation tests and docs/accuracy.md."""

from __future__ import annotations

import csv
from pathlib import Path

# Topology, file of ../shared/data/nccl, ranks.
HOSTS = (
    ("dgx-a100", "a100_dgx_all_reduce.csv", 2),
    ("dgx-a100", "a100_dgx_all_reduce.csv", 4),
    ("dgx-a100", "a100_dgx_all_reduce.csv", 8),
    ("a100-pcie-pairs", "a100_pairwise_nvlink_all_reduce.csv", 2),
    ("a100-pcie-pairs", "a100_pairwise_nvlink_all_reduce.csv", 4),
)


def measured_us(path: Path, ranks: int) -> dict[int, float]:
    """Microseconds by bytes, for runs inside one host."""
    times: dict[int, float] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            if int(row["num_workers"]) == int(row["devices_per_node"]) == ranks:
                times[int(row["size"])] = float(row["time_stats.all_reduce.median"]) * 1e3
    return times
