"""How fast tracesim is, as ratios within one run: `make bench`.

Traces and allocator events are compared with what Python itself needs for the same input on the same machine, so the
figures say the same on a slow machine and a fast one.  Needs the measured data beside the checkout for the first rows.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import simpy
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # tests/ has the jobs that are measured here too
SHARED = Path(os.environ.get("TRACESIM_SHARED", ROOT.parent / "shared"))
TRACE = SHARED / "data/traces/v100-resnet50-0workers.pt.trace.json.gz"
TRACESIM = [sys.executable, "-m", "sim"]


def main() -> None:
    table = Table("what", "measured", "goal", title="tracesim, as ratios")
    for what, measured, goal in rows():
        table.add_row(what, measured, goal)
    Console().print(table)


def rows() -> Iterator[tuple[str, str, str]]:
    if TRACE.exists():
        yield from _replay_of_a_trace()
    yield _event_loop()
    yield from _many_ranks()
    yield from _synthesis()


def _replay_of_a_trace() -> Iterator[tuple[str, str, str]]:
    """The whole command against json.load of the same file: the median of three each, alternating."""
    commands, loads = [], []
    size = len(gzip.decompress(TRACE.read_bytes()))
    for _ in range(3):
        loads.append(_seconds([sys.executable, "-c", f"import gzip, json; json.load(gzip.open({str(TRACE)!r}))"])[0])
        commands.append(_seconds([*TRACESIM, "replay", str(TRACE), "--topology", "as-captured"]))
    plain = _json_load_seconds()
    seconds = sorted(c[0] for c in commands)[1]
    peak = max(c[1] for c in commands)
    yield (
        "replay command / json.load in the same process", f"{seconds / plain:.2f} ({seconds:.2f} s / {plain:.2f} s)",
        "at most 3",
    )  # fmt: skip
    yield "replay command / Python that loads the JSON", f"{seconds / sorted(loads)[1]:.2f}", ""
    yield "peak memory / JSON", f"{peak / size:.1f} ({peak / 2**20:.0f} MiB / {size / 2**20:.0f} MiB)", "at most 12"


def _json_load_seconds() -> float:
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        with gzip.open(TRACE) as file:
            json.load(file)
        times.append(time.perf_counter() - begun)
    return sorted(times)[1]


def _event_loop() -> tuple[str, str, str]:
    """Operations a second of the replay against timeouts a second of bare SimPy: two lanes, 100,000 each."""
    from sim.graph import OpGraph, Program, RankProgram
    from sim.ops import HostCall, Kernel, Lane, Op
    from sim.place.captured import place_as_captured
    from sim.replay.engine import run

    ops: list[Op] = []
    for i in range(100_000):
        ops.append(HostCall(lane=0, name="launch", measured_ns=5_000, before_ns=1_000))
        ops.append(
            Kernel(lane=1, name="kernel", launch=len(ops) - 1, measured_ns=7_000 if i % 2 else 4_000, gap_ns=900)
        )
    program = Program((Lane("thread", 1, "main"), Lane("stream", 7, "compute")), tuple(ops))
    placement = place_as_captured(OpGraph("bench", (program,), (RankProgram(0, 0),)))
    begun = time.perf_counter()
    run(placement)
    ours = len(ops) / (time.perf_counter() - begun)
    bare = _bare_simpy(len(ops))
    return "event loop: operations / bare SimPy timeouts", f"{ours / bare:.2f} ({ours:,.0f} a second)", "at least 0.2"


def _many_ranks() -> Iterator[tuple[str, str, str]]:
    """24 layers of 10 ms forward and backward, an all-reduce of 100 MiB a layer over a ring: the event loop alone, each
    rank replayed, and with ranks that are alike replayed once."""
    from sim.place.place import place
    from sim.replay.engine import run
    from sim.topology.load import load_topology
    from tests.whatif.layers import layered, ring_machine

    for ranks, goal in ((8, "0.2 s"), (256, "5 s")):
        with tempfile.TemporaryDirectory() as folder:
            placement = place(layered(ranks), load_topology(str(ring_machine(Path(folder), ranks))))
        seconds = []
        for folding in (False, True):
            begun = time.process_time()
            run(placement, folding=folding)
            seconds.append(time.process_time() - begun)
        yield f"event loop, {ranks} ranks of 24 layers: one by one, folded", "{:.3f} s, {:.3f} s".format(*seconds), goal


def _bare_simpy(timeouts: int) -> float:
    def wait(env: simpy.Environment, count: int) -> Iterator[simpy.Event]:
        for _ in range(count):
            yield env.timeout(3)

    env = simpy.Environment()
    for _ in range(2):
        env.process(wait(env, timeouts // 2))
    begun = time.perf_counter()
    env.run()
    return timeouts / (time.perf_counter() - begun)


def _synthesis() -> Iterator[tuple[str, str, str]]:
    """From the command's start to the file, and the replay of the file."""
    out = ROOT / "out" / "bench.workload.json.gz"
    out.parent.mkdir(exist_ok=True)
    for model, goal in (("opt-1.3b", "synth 10 s, replay 5 s"), ("opt-6.7b", "15 s together")):
        spec = ["--batch", "8", "--seq", "1024", "--mode", "train", "--out", str(out)]
        synth, _ = _seconds([*TRACESIM, "synth", model, *spec])
        replay, _ = _seconds([*TRACESIM, "replay", str(out), "--topology", "a5000x1", "--no-remedies"])
        yield f"{model} training: synth, replay", f"{synth:.1f} s, {replay:.1f} s", goal
    many = ["--batch", "1", "--seq", "2048", "--mode", "train", "--parallel", "fsdp=64", "--out", str(out)]
    synth, peak = _seconds([*TRACESIM, "synth", "llama-3.1-70b", *many])
    cluster = ["--topology", "dgx-h100x2-400g", "--set", "hosts=8"]
    replay, peak_too = _seconds([*TRACESIM, "replay", str(out), *cluster, "--no-remedies"])
    what = f"{synth:.1f} s, {replay:.1f} s, {max(peak, peak_too) / 2**30:.1f} GiB"
    yield "llama-3.1-70b training, fsdp=64 on eight nodes: synth, replay, memory", what, "60 s together, 6 GiB"
    out.unlink()


def _seconds(command: list[str]) -> tuple[float, int]:
    """Wall time and peak resident bytes of a command; stops where it fails."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    if status:
        raise SystemExit(f"{' '.join(command)}: {process.stderr.read().decode() if process.stderr else status}")
    return seconds, usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()
