"""A run whose device was the CPU: its ops are calls of a thread, and only another CPU can take them over."""

from __future__ import annotations

import pytest

import sim
from sim.graph import OpGraph, Program, RankProgram
from sim.ops import HostCall
from tests.programs import LANES, MAIN

GRAPH = OpGraph(
    "made", (Program(LANES, (HostCall(lane=MAIN, name="aten::mm", measured_ns=1000),)),), (RankProgram(0, 0, "cpu"),)
)


def test_a_run_on_a_cpu_says_nothing_about_a_gpu() -> None:
    with pytest.raises(sim.UserError, match=r"made: ran on a CPU.*NVIDIA RTX A5000.*--topology as-captured"):
        sim.place(GRAPH, sim.load_topology("a5000x1"))


def test_on_another_cpu_its_ops_keep_their_time_and_that_is_said() -> None:
    placed = sim.place(GRAPH, sim.load_topology("cpu-gloo"))
    assert placed.ranks[0].costs.duration_ns == (1000,)
    assert [warning for warning in placed.warnings if "keep their measured durations" in warning]
