"""``replay --strict``: what no formula explains is refused, all of it in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import sim
from sim.graph import OpGraph, Program, RankProgram, write
from sim.ops import HostCall, Kernel, Lane, TensorMeta, Work

HALF = TensorMeta("float16", (1024, 1024))
OPS = ("aten::relu", "mylib::rotate", "mylib::fold", "mylib::rotate")


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    """Three kernels of ops that nobody registered, and one that has a formula."""
    lanes = (Lane("thread", 1, "main"), Lane("stream", 7, "stream 7"))
    works = tuple(Work(op, (HALF,), (HALF,)) for op in dict.fromkeys(OPS))
    ops: list[HostCall | Kernel] = []
    for op in OPS:
        ops.append(HostCall(lane=0, name=op))
        work = next(i for i, work in enumerate(works) if work.op == op)
        ops.append(Kernel(lane=1, name=op, launch=len(ops) - 1, work=work))
    graph = OpGraph(
        name="odd", programs=(Program(lanes=lanes, ops=tuple(ops)),), ranks=(RankProgram(0, 0),), works=works
    )
    write(graph, tmp_path / "odd.workload.json.gz")
    return tmp_path / "odd.workload.json.gz"


def test_ops_without_a_formula_are_refused_at_once(workload: Path, refused: Callable[..., str]) -> None:
    err = refused("replay", workload, "--topology", "a5000x1", "--strict")
    assert "odd: --strict: 3 kernels have no cost formula or no shapes, estimated by bytes: mylib::rotate (2), " in err
    assert "mylib::fold (1)" in err and "relu" not in err


def test_without_strict_they_are_counted(workload: Path) -> None:
    graph, _ = sim.read(workload)
    placed = sim.place(graph, sim.load_topology("a5000x1"))
    assert any("3 kernels have no cost formula" in warning for warning in placed.warnings)


def test_a_workload_that_formulas_explain_passes(run: Callable[..., tuple[int, str, str]], root: Path) -> None:
    seed = root / "traces" / "seed" / "clm-60m-x1.workload.json.gz"
    code, _, _ = run("replay", seed, "--topology", "a5000x1", "--strict", "--no-ranges")
    assert code == 0
