"""Real runs on this CPU, captured and replayed: a training loop alone, and under DDP in two gloo processes.

The loop is ``gpt2_loop.py``; torch computes on one thread in each process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

import sim
from sim.graph import OpGraph, Program
from sim.ops import Collective, HostCall, Mark, Op
from sim.timeline import Timeline
from sim.workload.inputs import Workload

STEPS = 4


def captured(root: Path, out: Path, *before: str) -> Workload:
    """Capture the loop in processes of their own and read what they wrote."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", *before, "sim", "trace", "--out", str(out), "--steps", str(STEPS), "--warmup", "2",
         "--", str(root / "tests/workload/gpt2_loop.py"), "--batch", "2"],
        cwd=root, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return sim.read(out)


@pytest.fixture(scope="module")
def alone(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Workload:
    return captured(root, tmp_path_factory.mktemp("alone") / "out")


@pytest.fixture(scope="module")
def two_ranks(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Workload:
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    return captured(root, tmp_path_factory.mktemp("two") / "out", *torchrun)


def replayed(graph: OpGraph) -> Timeline:
    return sim.replay(sim.place(graph, None))


def steps(timeline: Timeline, rank: int = 0) -> list[int]:
    """The durations of a rank's steps in nanoseconds."""
    return [step.duration_ns for step in timeline.steps if step.rank == rank]


def changed(graph: OpGraph, change: Callable[[int, int, Op], Op]) -> OpGraph:
    """The graph with every operation replaced by ``change(rank, index, op)``; each rank has its own program."""
    programs = tuple(
        Program(graph.programs[r.program].lanes,
                tuple(change(r.rank, i, op) for i, op in enumerate(graph.programs[r.program].ops)))
        for r in graph.ranks
    )  # fmt: skip
    return msgspec.structs.replace(graph, programs=programs)


def check_steps(work: Workload, ranks: int) -> None:
    assert work.measured is not None and work.graph.warnings == ()
    predicted = replayed(work.graph)
    for rank in range(ranks):
        ours, measured = steps(predicted, rank), steps(work.measured, rank)
        assert len(ours) == len(measured) == STEPS
        assert ours == pytest.approx(measured, rel=0.05)
        assert sum(ours) == pytest.approx(sum(measured), rel=0.02)


def test_one_process_is_replayed_within_five_percent(alone: Workload) -> None:
    check_steps(alone, 1)


def test_two_processes_are_replayed_within_five_percent(two_ranks: Workload) -> None:
    check_steps(two_ranks, 2)


def test_slower_ops_make_slower_steps(alone: Workload) -> None:
    # One process has one thread: twice the work in every op is that much more time in its step, no more, no less.
    program = alone.graph.programs[0]
    assert {op.lane for op in program.ops if isinstance(op, HostCall)} == {program.ops[0].lane}
    work: list[int] = []
    for op in program.ops:
        if isinstance(op, Mark) and op.edge == "begin":
            work.append(0)
        elif isinstance(op, HostCall) and op.work is not None and work:
            work[-1] += op.measured_ns or 0
    before = steps(replayed(alone.graph))
    twice = changed(alone.graph, lambda rank, i, op: slower(op))
    assert [b - a for a, b in zip(before, steps(replayed(twice)), strict=True)] == work
    assert all(w > 0.3 * s for w, s in zip(work, before, strict=True)), "most of a step is work"


def slower(op: Op) -> Op:
    if isinstance(op, HostCall) and op.work is not None:
        return msgspec.structs.replace(op, measured_ns=2 * (op.measured_ns or 0))
    return op


def test_every_collective_meets_on_both_ranks(two_ranks: Workload) -> None:
    found = [[op for op in p.ops if isinstance(op, Collective)] for p in two_ranks.graph.programs]
    # 4 layers' worth of parameters in buckets of 1 MiB: the same number on both ranks, all of the world.
    assert len(found[0]) == len(found[1]) > STEPS
    assert two_ranks.graph.groups == {"world": ((0, 1),)}
    sizes = [sorted((op.seq, op.kind, op.bytes) for op in ops) for ops in found]
    assert sizes[0] == sizes[1]
    # float32 gradients of GPT-2 with 2 layers of width 128, 512 tokens, 64 positions, tied embeddings, once a step:
    # embeddings (512 + 64) x 128; a layer 2 norms 2 x 256, attention 128 x 384 + 384 + 128 x 128 + 128,
    # MLP 128 x 512 + 512 + 512 x 128 + 128; the last norm 256.
    layer = 512 + 128 * 384 + 384 + 128 * 128 + 128 + 128 * 512 + 512 + 512 * 128 + 128
    parameters = (512 + 64) * 128 + 2 * layer + 256
    assert sum(op.bytes for op in found[0]) == STEPS * 4 * parameters


SECOND = 10**9


def delayed(graph: OpGraph, rank: int, step: int, ns: int) -> Timeline:
    """The replay with ``ns`` more host time before the first op of one rank's step."""
    ops = graph.programs[rank].ops
    begin = [i for i, op in enumerate(ops) if isinstance(op, Mark) and op.edge == "begin"][step]
    first = next(i for i, op in enumerate(ops) if i > begin and isinstance(op, HostCall))

    def later(of_rank: int, i: int, op: Op) -> Op:
        if (of_rank, i) != (rank, first):
            return op
        assert isinstance(op, HostCall)
        return msgspec.structs.replace(op, before_ns=op.before_ns + ns)

    return replayed(changed(graph, later))


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_is_late_makes_the_other_wait(two_ranks: Workload, late: int) -> None:
    graph = two_ranks.graph
    as_it_was, by_one, by_two = (delayed(graph, late, 1, seconds * SECOND) for seconds in (0, 1, 2))
    for rank in (0, 1):
        one, two = steps(by_one, rank), steps(by_two, rank)
        # The second second of delay costs exactly a second, on both ranks, in that step alone.
        assert [b - a for a, b in zip(one, two, strict=True)] == [0, SECOND, 0, 0]
        # The first costs a second less what the rank had to spare: no more than two steps of waiting.
        grown = one[1] - steps(as_it_was, rank)[1]
        assert SECOND - sum(steps(as_it_was, rank)[:2]) < grown <= SECOND
    assert steps(by_one, 1 - late)[0] == steps(as_it_was, 1 - late)[0], "what was before is as it was"
