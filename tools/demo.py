"""The main job once: what one step of OPT-1.3b costs on one RTX A5000 and on eight."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

import sim
from sim.report.text import ComparisonRow, render_comparison

MODEL, BATCH, SEQ = "opt-1.3b", 16, 1024
RUNS = (
    ("one A5000", "", "a5000x1"),
    ("eight, tensor parallel", "tp=8", "a5000x8"),
    ("eight, data parallel", "dp=8", "a5000x8"),
)


def main() -> None:
    console = Console()
    out = Path("out")
    out.mkdir(exist_ok=True)
    console.print(f"{MODEL}: one forward step with loss, batch {BATCH} a rank, sequence {SEQ}, float16")
    begun = time.perf_counter()
    with Console(stderr=True).status("starting") as status:
        rows = [_row(name, plan, machine, out, status.update) for name, plan, machine in RUNS]
    render_comparison(rows, console)
    console.print("tensor parallel shares one batch of 16 among the eight; data parallel gives each GPU its own")
    console.print(f"made in {time.perf_counter() - begun:.0f} s; more of one run: tracesim replay --help")


def _row(name: str, plan: str, machine: str, out: Path, tell: object) -> ComparisonRow:
    assert callable(tell)
    tell(f"{name}: synthesizing {MODEL} {plan}")
    graph = sim.synthesize(MODEL, batch=BATCH, seq=SEQ, parallel=plan)
    tell(f"{name}: replaying on {machine}")
    timeline = sim.replay(sim.place(graph, sim.load_topology(machine)))
    file = out / f"{MODEL}-{plan.replace('=', '') or 'single'}-{machine}.pt.trace.json.gz"
    sim.write(timeline, file)
    return ComparisonRow(name, sim.summarize(timeline), str(file))


if __name__ == "__main__":
    main()
