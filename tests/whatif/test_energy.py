"""Energy: by hand on layers whose times are round, and where nothing is known."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

import sim
from sim.graph import OpGraph
from sim.ops import Kernel, TensorMeta, Work
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
    assert told["energy_j_per_token"] == pytest.approx(told["energy_j"] / 16384)
    assert 0.2 * 230 < told["energy_j"] / told["step_ms"] * 1e3 <= 230
    _, shown, _ = run("replay", file, "--topology", "a5000x1")
    assert "an estimate" in shown and "mJ a token" in shown
