"""The published table with our column beside it, and the same models truly on eight GPUs.

    python tools/validate_seed.py [--rows-only]

The first table replays the twelve workloads of traces/seed, made as the published rows were run, and compares with
the measured figures; the authors' own estimates stand beside.  The second answers what someone with eight A5000s
asks: today's transformers, tensor parallel over all eight where the heads divide, else data parallel, over PCIe and
with NVLink bridges.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import yaml
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sim
from sim.errors import UserError
from sim.graph import read
from sim.report.summary import Summary
from sim.report.text import plain_table
from sim.units import GIB

FOLDER = Path(__file__).resolve().parent.parent / "traces" / "seed"
BATCH, SEQ, GPUS = 16, 1024, 8
WIDTH = 110
EIGHT = ("a5000x8", "a5000x8-nvlink-pairs")


class PublishedRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A row of the published table: milliseconds of kernels on one rank, GiB of peak allocated."""

    model: str
    printed_gpus: int
    measured_ms: float | None = None
    estimated_ms: float | None = None
    measured_gib: float | None = None
    estimated_gib: float | None = None

    @property
    def name(self) -> str:
        return f"{self.model}-x{self.printed_gpus}"

    @property
    def file(self) -> Path:
        return FOLDER / f"{self.name}.workload.json.gz"


def published_rows() -> list[PublishedRow]:
    return msgspec.convert(yaml.safe_load((FOLDER / "published.yaml").read_text()), list[PublishedRow])


def predict(row: PublishedRow) -> Summary:
    """Replay a row's workload where it ran: one GPU, or two of a5000x8."""
    machine = sim.load_topology("a5000x1" if row.printed_gpus == 1 else "a5000x8")
    return sim.summarize(sim.replay(sim.place(read(row.file), machine)))


def peak_gib(summary: Summary) -> float:
    """Peak allocated, the cuBLAS workspace included, as the profiler had it."""
    assert summary.peak_allocated_bytes is not None
    return summary.peak_allocated_bytes / GIB


def error(ours: float, measured: float | None) -> float | None:
    return None if measured is None else ours / measured - 1


# The table as published ----------------------------------------


def published_table() -> Table:
    table = plain_table("model", "GPUs", "measured ms", "theirs", "", "ours", "", "measured GiB", "theirs", "ours", "")
    _narrow(table, left=1)
    errors: dict[str, list[float]] = {"time": [], "memory": []}
    for row in published_rows():
        summary = predict(row)
        off, off_gib = error(summary.kernel_ms, row.measured_ms), error(peak_gib(summary), row.measured_gib)
        errors["time"] += [] if off is None else [abs(off)]
        errors["memory"] += [] if off_gib is None else [abs(off_gib)]
        theirs = None if row.estimated_ms is None else error(row.estimated_ms, row.measured_ms)
        table.add_row(
            row.model, "1" if row.printed_gpus == 1 else "8 (2)",
            _number(row.measured_ms, 2), _number(row.estimated_ms, 2), _percent(theirs, 1),
            _number(summary.kernel_ms, 2), _percent(off, 1),
            _number(row.measured_gib, 2), _number(row.estimated_gib, 2),
            _number(peak_gib(summary), 3), _percent(off_gib, 2),
        )  # fmt: skip
    table.caption = (
        f"mean error: time {_mean(errors['time']):.1%}, memory {_mean(errors['memory']):.2%}; "
        "8 (2): printed as 8, run on 2"
    )
    return table


def _narrow(table: Table, left: int) -> None:
    """Numbers to the right, nothing broken over two lines."""
    for i, column in enumerate(table.columns):
        column.no_wrap = True
        column.justify = "left" if i < left else "right"


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:+.{digits}%}"


# Truly on eight ----------------------------------------


def eight_gpu_table(console: Console) -> Table:
    table = plain_table("model", "plan", "one GPU ms", *(f"{name} ms" for name in EIGHT), "times as fast", "GiB a GPU")
    _narrow(table, left=2)
    with console.status("starting") as status:
        for model in dict.fromkeys(row.model for row in published_rows()):
            status.update(f"{model} on one and on eight GPUs")
            table.add_row(*_eight_gpu_row(model))
    table.caption = (
        f"{BATCH} x {SEQ} tokens in all, forward with loss, step time, today's transformers; "
        "dp=8 where 8 does not divide the heads"
    )
    return table


def _eight_gpu_row(model: str) -> Iterator[str]:
    one = sim.summarize(
        sim.replay(sim.place(sim.synthesize(model, batch=BATCH, seq=SEQ), sim.load_topology("a5000x1")))
    )
    plan = f"tp={GPUS}"
    try:
        graph = sim.synthesize(model, batch=BATCH, seq=SEQ, parallel=plan)
    except UserError:
        plan = f"dp={GPUS}"
        graph = sim.synthesize(model, batch=BATCH // GPUS, seq=SEQ, parallel=plan)
    eight = [sim.summarize(sim.replay(sim.place(graph, sim.load_topology(name)))) for name in EIGHT]
    yield from (model, plan, _number(one.step_ms, 1))
    yield from (_number(summary.step_ms, 1) for summary in eight)
    yield ", ".join(f"{one.step_ms / summary.step_ms:.2f}" for summary in eight)
    yield _number(peak_gib(eight[0]), 2)


def main(arguments: list[str]) -> None:
    console = Console()
    if console.width < WIDTH:
        console = Console(width=WIDTH)
    console.print(published_table())
    if "--rows-only" not in arguments:
        console.print(eight_gpu_table(console))


if __name__ == "__main__":
    main(sys.argv[1:])
