"""Kernels beside NCCL's in a recorded job (A100, DDP on 2 GPUs, 3 steps): what the sharing of SMs makes of them.

A step runs the same 893 kernels in the same order.  A kernel that ran wholly beside an all-reduce of 8 blocks in one
step and apart from all in another is measured with and without; of those that nothing runs beside, half differ by less
than 0.5 % from step to step.  The figures are in docs/whatif.md.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from math import ceil, prod
from pathlib import Path
from statistics import mean, median
from typing import Any

import pytest

pytestmark = pytest.mark.validation
SMS, HELD = 108, 8
LEAST_US = 8.0
PRODUCTS = ("gemm", "grad", "conv", "xmma", "cutlass")


class Pair:
    """A kernel alone and beside NCCL's."""

    def __init__(self, event: dict[str, Any], alone: float, beside: float) -> None:
        self.alone, self.beside = alone, beside
        self.blocks = prod(event["args"]["grid"])
        self.is_product = any(word in event["name"].lower() for word in PRODUCTS)

    def turns(self, held: int) -> float:
        """How much longer the SM with most blocks takes when so many are gone."""
        return ceil(self.blocks / (SMS - held)) / ceil(self.blocks / SMS)


@pytest.fixture(scope="module")
def pairs(shared_dir: Path) -> list[Pair]:
    with gzip.open(shared_dir / "data/traces/a100-ddp-rank0of2.pt.trace.json.gz") as file:
        events = [e for e in json.load(file)["traceEvents"] if e.get("ph") == "X"]
    kernels = sorted((e for e in events if e.get("cat") == "kernel"), key=lambda e: e["ts"])
    nccl = [(e["ts"], e["ts"] + e["dur"]) for e in kernels if "nccl" in e["name"]]
    called = {e["args"]["correlation"]: e["ts"] for e in events if e.get("cat") == "cuda_runtime"}
    steps = [e for e in events if e["name"].startswith("ProfilerStep")]
    ran: list[list[dict[str, Any]]] = [[] for _ in steps]
    for kernel in kernels:
        begun = called.get(kernel["args"]["correlation"], kernel["ts"])
        for i, step in enumerate(steps):
            if step["ts"] <= begun < step["ts"] + step["dur"] and "nccl" not in kernel["name"]:
                ran[i].append(kernel)
    assert [len(kernels) for kernels in ran] == [893] * 3
    found = []
    for same in zip(*ran, strict=True):
        shares = [_overlap(e, nccl) for e in same]
        beside = [e["dur"] for e, share in zip(same, shares, strict=True) if share > 0.95]
        alone = [e["dur"] for e, share in zip(same, shares, strict=True) if share == 0]
        if beside and alone and mean(alone) >= LEAST_US:
            found.append(Pair(same[0], mean(alone), mean(beside)))
    return found


def _overlap(event: dict[str, Any], spans: Sequence[tuple[float, float]]) -> float:
    begin, end = event["ts"], event["ts"] + event["dur"]
    return float(sum(max(0.0, min(end, b) - max(begin, a)) for a, b in spans) / event["dur"])


def ratio(of: Sequence[Pair]) -> float:
    return sum(p.beside for p in of) / sum(p.alone for p in of)


def predicted(of: Sequence[Pair], held: int) -> float:
    return sum(p.alone * p.turns(held) for p in of) / sum(p.alone for p in of)


def test_what_was_measured(pairs: list[Pair]) -> None:
    products, others = [p for p in pairs if p.is_product], [p for p in pairs if not p.is_product]
    assert (len(products), len(others)) == (12, 27)
    assert ratio(products) == pytest.approx(1.31, abs=0.01)
    assert ratio(others) == pytest.approx(1.14, abs=0.01)
    assert median(p.beside / p.alone for p in others) == pytest.approx(1.02, abs=0.01)


def test_turns_of_blocks_say_more_than_the_share_of_sms(pairs: list[Pair]) -> None:
    """The SMs' share alone says 108 / 100 for all; turns on 100 SMs go halfway where it is wrong, and on 98 the whole
    way: two more than the grid of NCCL's kernel says were not to be had, which no source explains and nothing uses."""
    products = [p for p in pairs if p.is_product]
    assert pytest.approx(1.08) == SMS / (SMS - HELD)
    assert predicted(products, HELD) == pytest.approx(1.12, abs=0.01)
    assert predicted(products, HELD + 2) == pytest.approx(1.35, abs=0.01)


def test_bytes_lose_what_the_transfer_moves(pairs: list[Pair]) -> None:
    """31.5 MB all-reduced between 2 in 2424 us, three accesses a byte: 39 of 1555 GB/s, so 1.03; the median is 1.02."""
    share = 3 * 31.5e6 / 2424e-6 / 1555e9
    others = [p.beside / p.alone for p in pairs if not p.is_product]
    assert 1 / (1 - share) == pytest.approx(median(others), abs=0.01)
