"""Energy: by hand on layers whose times are round, and where nothing is known."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

import sim
from sim.graph import OpGraph, Program, RankProgram
from sim.ops import HostCall, Kernel, Lane, TensorMeta, Work
from sim.place.power import IDLE
from sim.topology.device import load_device, shipped_devices
from sim.whatif.energy import with_energy
from tests.conftest import Run
from tests.whatif.layers import layered


def joules(graph: OpGraph, topology: str) -> float | None:
    placed = sim.place(graph, sim.load_topology(topology))
    timeline = sim.replay(placed)
    return with_energy(sim.summarize(timeline), placed, timeline).energy_j


def named(graph: OpGraph, name: str) -> OpGraph:
    """All kernels under another name."""
    (program,) = graph.programs
    ops = tuple(msgspec.structs.replace(op, name=name) if isinstance(op, Kernel) else op for op in program.ops)
    return msgspec.structs.replace(graph, programs=(msgspec.structs.replace(program, ops=ops),))


def test_kernels_that_compute_draw_the_board_power() -> None:
    # 48 kernels of 10 ms, all of the step, on an A5000 of 230 W: 0.48 s x 230 W.
    assert joules(named(layered(1, nbytes=0), "ampere_sgemm_128x64"), "a5000x1") == pytest.approx(110.4, rel=1e-6)


def test_kernels_that_move_bytes_draw_less() -> None:
    # The same at 0.43 of 230 W.
    assert joules(layered(1, nbytes=0), "a5000x1") == pytest.approx(47.472, rel=1e-6)


def test_every_rank_counts() -> None:
    one, two = (joules(layered(n, nbytes=0), "a5000x8") for n in (1, 2))
    assert one is not None and two == pytest.approx(2 * one)


def test_a_waiting_device_draws_a_fifth() -> None:
    # Kernels of 10 ms each launched by a call of 30 ms: 48 calls, 1.44 s, in which 0.48 s are busy at 0.43: the last
    # kernel, launched as its call begins, is done before that call is.  230 x (0.2 x 0.96 + 0.43 x 0.48) J.
    assert joules(layered(1, nbytes=0, launch_ns=30_000_000), "a5000x1") == pytest.approx(91.632, rel=1e-6)


def test_a_product_is_priced_by_its_shapes() -> None:
    # [4096, 4096] x [4096, 4096] is bound by arithmetic, whatever its name: as much as by the name above.
    big = TensorMeta("float16", (4096, 4096))
    graph = msgspec.structs.replace(layered(1, nbytes=0), works=(Work("aten::mm", (big, big), (big,)),))
    (program,) = graph.programs
    ops = tuple(msgspec.structs.replace(op, work=0) if isinstance(op, Kernel) else op for op in program.ops)
    graph = msgspec.structs.replace(graph, programs=(msgspec.structs.replace(program, ops=ops),))
    assert joules(graph, "a5000x1") == pytest.approx(110.4, rel=1e-6)


GPUS = [name for name in shipped_devices() if load_device(name).kind == "gpu"]


@pytest.mark.parametrize("device", GPUS)
@pytest.mark.parametrize("launch_ns", [0, 40_000_000])
def test_no_gpu_draws_more_than_its_board_or_less_than_idle(device: str, launch_ns: int, root: Path) -> None:
    """Between idle power and the board's for as long as the step takes: kernels of a real model, and layers whose host
    is four times slower."""
    machine = sim.load_topology("a5000x1", {"devices.profile": device})
    seed, _ = sim.read(root / "traces" / "seed" / "clm-60m-x1.workload.json.gz")
    placed = sim.place(layered(1, nbytes=0, launch_ns=launch_ns) if launch_ns else seed, machine)
    timeline = sim.replay(placed)
    summary = with_energy(sim.summarize(timeline), placed, timeline)
    assert summary.energy_j is not None and summary.energy_from == "estimate"
    board = machine.gpus[0].profile.tdp_w
    assert board is not None
    watts = summary.energy_j / (summary.step_ms / 1e3)
    assert IDLE * board - 1e-6 <= watts <= board + 1e-6


def test_kernels_on_two_streams_at_once_draw_the_board_power_once() -> None:
    # Two streams, each busy with products for 10 ms of the same 10: 0.01 s x 230 W and not twice that.
    big = TensorMeta("float16", (4096, 4096))
    lanes = (Lane("thread", 1, "main"), Lane("stream", 7, "a"), Lane("stream", 8, "b"))
    ops: list[HostCall | Kernel] = [HostCall(lane=0, measured_ns=0)]
    ops += [Kernel(lane=lane, launch=0, measured_ns=10_000_000, lag_ns=0, gap_ns=0, work=0) for lane in (1, 2)]
    works = (Work("aten::mm", (big, big), (big,)),)
    ranks = (RankProgram(0, 0, device="rtx-a5000"),)
    graph = OpGraph("two", (Program(lanes, tuple(ops)),), ranks, works=works)
    assert joules(graph, "a5000x1") == pytest.approx(2.3, rel=1e-3)


def test_nothing_is_said_of_a_cpu_or_of_a_run_as_captured() -> None:
    graph = layered(1, nbytes=0)
    placed = sim.place(graph, None)
    timeline = sim.replay(placed)
    assert with_energy(sim.summarize(timeline), placed, timeline).energy_j is None


def test_joules_a_token(run: Run, root: Path) -> None:
    """16 x 1024 tokens on one GPU; the same on the command line."""
    file = root / "traces" / "seed" / "clm-60m-x1.workload.json.gz"
    _, out, _ = run("replay", file, "--topology", "a5000x1", "--json", "-")
    told = json.loads(out)
    assert told["energy_from"] == "estimate"
    assert told["energy_j_per_token"] == pytest.approx(told["energy_j"] / 16384)
    assert 0.2 * 230 < told["energy_j"] / told["step_ms"] * 1e3 <= 230
    _, shown, _ = run("replay", file, "--topology", "a5000x1")
    assert "an estimate" in shown and "mJ a token" in shown
