"""Inverse questions: the value that reaches a target, worked out by hand, or what stands in its way."""

from __future__ import annotations

from pathlib import Path

import pytest

from sim.errors import UserError
from sim.graph import OpGraph, write
from sim.report.variants import Solution
from sim.whatif.solve import OneGpu, is_monotone, parse_target, solve
from sim.workload.replicas import one_gpu
from sim.workload.spec import SynthSpec
from sim.workload.synth import synthesize
from tests.conftest import Run
from tests.whatif.layers import layered, ring_machine

RING = "links.ring.bandwidth_gb_s"
GIB_S = (1 << 30) / 1e9


def solved(graph: OpGraph, machine: Path, target: str, path: str = RING) -> Solution:
    return solve(graph, str(machine), {}, path, parse_target(target))


def test_the_bandwidth_at_which_a_step_takes_so_long(tmp_path: Path) -> None:
    # While an all-reduce takes longer than a layer's 10 ms of backward, the step is 250 + 24 T (see the closed form).
    # For 520 ms T must be 11.25 = 14 x (x + 0.005) ms, x = 0.79857 ms for 12.5 MiB = 13.107 MB: 16.413 GB/s, and the
    # next value of three digits that is at least that: 16.5 (16.4 is 520.06 ms... not reached).
    told = solved(layered(8), ring_machine(tmp_path, 8), "step_ms=520")
    assert told.base_value == pytest.approx(12 * GIB_S)
    assert told.base_measure == pytest.approx(593.477, rel=1e-5)
    assert told.value == 16.5
    assert told.reached <= 520
    assert told.monotone
    assert {each.value for each in told.tried} >= {16.4, 16.5}


def test_a_speed_up(tmp_path: Path) -> None:
    # 593.477 / 1.2 = 494.564 ms = 250 + 24 T for T = 10.190 ms = 14 x (x + 0.005), x = 0.72287 ms for 13.107 MB:
    # 18.132 GB/s, so 18.2 of three digits.
    told = solved(layered(8), ring_machine(tmp_path, 8), "speedup=1.2")
    assert told.value == 18.2
    assert told.reached >= 1.2


def test_scaling_against_one_gpu(tmp_path: Path) -> None:
    # One GPU alone takes 480 ms. Seven of eight times that: 8 x 480 / 7 = 548.571 ms = 250 + 24 T for T = 12.440 ms
    # = 14 x (x + 0.005), x = 0.88360 ms for 13.107 MB: 14.834 GB/s, so 14.9 of three digits (14.8 is not enough).
    alone = OneGpu(layered(1), 8)
    told = solve(layered(8), str(ring_machine(tmp_path, 8)), {}, RING, parse_target("scaling=7"), one_gpu=alone)
    assert told.base_measure == pytest.approx(8 * 480 / 593.477, rel=1e-5)
    assert told.value == 14.9
    assert told.reached >= 7


def test_no_bandwidth_hides_the_hops(tmp_path: Path) -> None:
    # However wide the ring, 480 ms of compute and 14 hops of 5 us stay: 593.477 / 480.07 = 1.2362 at most.
    told = solved(layered(8), ring_machine(tmp_path, 8), "speedup=2")
    assert told.value is None
    assert told.reached == pytest.approx(1.2362, rel=1e-3)
    assert told.bound_by.part == "compute"
    assert told.monotone


def test_the_latency_that_a_step_can_bear(tmp_path: Path) -> None:
    # Less is better here, and more than the base is allowed: 250 + 24 T = 690 for T = 18.3333 = 14 x (1.01725 + l):
    # l = 292.27 us, so 292 of three digits.
    told = solved(layered(8), ring_machine(tmp_path, 8), "step_ms=690", "links.ring.latency_us")
    assert told.value == 292
    assert told.reached <= 690


def test_what_moves_one_way_only() -> None:
    assert is_monotone([1, 2, 2, 3]) and is_monotone([3, 2, 2]) and is_monotone([1])
    assert not is_monotone([1, 3, 2])


def test_what_is_reached_everywhere_is_reached_by_the_base(tmp_path: Path) -> None:
    told = solved(layered(1), ring_machine(tmp_path, 2), "step_ms=481")
    assert told.value == told.base_value


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("speedup", "write MEASURE=VALUE"),
        ("spedup=3", "did you mean 'speedup'"),
        ("speedup=fast", "'fast' is no number of 0 or more"),
        ("step_ms=-3", "is no number of 0 or more"),
        ("step_ms=nan", "is no number of 0 or more"),
    ],
)
def test_what_is_no_target(target: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_target(target)


def test_the_last_value_that_can_be_is_tried_too() -> None:
    """A share ends at 1, less than four times the 0.7625 that a5000x8 has: two cards bound by their all-reduces."""
    told = solved(layered(2, nbytes=400 << 20), Path("a5000x8"), "speedup=1.1", "links.pcie.p2p_both_ways")
    assert told.tried[-1].value == 1
    assert told.value is not None and 0.7625 < told.value < 1
    assert told.reached >= 1.1


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("links.rang.bandwidth_gb_s", "did you mean 'links.ring.bandwidth_gb_s'"),
        ("links.ring.kind", "holds no number"),
        ("nccl.NCCL_P2P_DISABLE", "is no number above 0"),
    ],
)
def test_what_cannot_be_searched(tmp_path: Path, path: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        solved(layered(2), ring_machine(tmp_path, 2), "step_ms=1", path)


def test_the_command_tells_the_answer(run: Run, job: Path, tmp_path: Path) -> None:
    machine = ring_machine(tmp_path, 8)
    code, out, _ = run("whatif", job, "--topology", machine, "--solve", RING, "--target", "step_ms=520")
    assert code == 0
    assert out.startswith(f"{RING} = 16.5 reaches step_ms = 520\n")
    _, out, _ = run("whatif", job, "--topology", machine, "--solve", RING, "--target", "speedup=7")
    assert out.startswith(f"No value of {RING} reaches speedup = 7\n")
    assert "bound by compute kernels" in out
    assert max(len(line.rstrip()) for line in out.splitlines()) <= 100


@pytest.mark.parametrize("args", [["--solve", RING], ["--target", "speedup=2"]])
def test_solve_and_target_go_together(run: Run, job: Path, args: list[str]) -> None:
    code, _, err = run("whatif", job, "--topology", "a5000x8", *args)
    assert code == 2 and "go together" in err


def test_one_rank_does_not_scale(tmp_path: Path) -> None:
    one = layered(1)
    with pytest.raises(
        UserError, match=r"scaling=7: .* has one rank: .* give a job of several ranks, or --parallel dp=N"
    ):
        solve(one, str(ring_machine(tmp_path, 8)), {}, RING, parse_target("scaling=7"), one_gpu=OneGpu(one, 1))


def test_scaling_takes_the_input_or_the_step_it_was_made_from(tmp_path: Path) -> None:
    # Both ask for the same eight ranks; one GPU's step is the input in the one, synthesized anew in the other.
    spec = {"model": "gpt2", "batch": 1, "seq": 64, "mode": "train"}
    told = []
    for name, extra in (("one", {}), ("two", {"parallel": "dp=2", "bucket_mib": 1.0})):
        path = tmp_path / f"{name}.workload.json.gz"
        write(synthesize(SynthSpec(**spec, **extra)), path)
        told.append(one_gpu([path], "" if extra else "dp=2"))
    assert told[0][1] == told[1][1] == 2
    assert told[0][0].programs == told[1][0].programs


def test_a_workload_with_a_plan_in_words_of_its_own_does_not_say_what_one_gpu_would_do(root: Path) -> None:
    with pytest.raises(UserError, match=r"clm-60m-x8.* has 2 ranks and does not say what one GPU would do alone"):
        one_gpu([root / "traces" / "seed" / "clm-60m-x8.workload.json.gz"], "")


def test_scaling_of_mixed_precision_is_against_one_gpu_that_computes_so_too(tmp_path: Path) -> None:
    path = tmp_path / "sharded.workload.json.gz"
    spec = SynthSpec("gpt2", batch=1, seq=64, mode="train", parallel="fsdp=2", fsdp_dtype="bfloat16")
    write(synthesize(spec), path)
    graph, batches = one_gpu([path], "")
    assert batches == 2 and len(graph.ranks) == 1
    products = [work for work in graph.works if work.op == "aten::mm"]
    assert products and all(work.inputs[0].dtype == "bfloat16" for work in products)
