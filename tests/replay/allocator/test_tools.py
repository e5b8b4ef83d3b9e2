"""The developers' scripts for the allocator run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[3] / "tools"


def test_the_benchmark_runs_and_says_what_it_measured() -> None:
    done = subprocess.run(
        [sys.executable, str(TOOLS / "bench_allocator.py"), "--events", "400", "--json"],
        capture_output=True, text=True, check=False, timeout=250,
    )  # fmt: skip
    rows = json.loads(done.stdout)["rows"]
    assert len(rows) == 8 and all(row["events_per_second"] > 1000 for row in rows)


def test_the_comparison_says_that_there_is_no_gpu() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: run tools/compare_allocator.py")
    done = subprocess.run(
        [sys.executable, str(TOOLS / "compare_allocator.py")], capture_output=True, text=True, check=False, timeout=250
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "no CUDA GPU" in done.stderr
