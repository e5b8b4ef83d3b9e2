"""Collectives between CPUs, from hand-written traces of two ranks: who meets, who waits, when it ends.

Times in the traces are microseconds, as Kineto writes them; a line of a trace is (thread, name, begin, end, shape).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

import sim
from sim.ops import Collective, HostCall
from sim.timeline import Timeline
from sim.workload.inputs import Workload, read_inputs

MAIN, GLOO, GLOO2 = 1, 2, 3
Line = tuple[int, str, float, float, list[Any]]


def job(folder: Path, *ranks: list[Line], **head: Any) -> Workload:
    """Write a trace for each rank and read them as one job."""
    for rank, lines in enumerate(ranks):
        info = {"backend": "gloo", "rank": rank, "world_size": len(ranks), **head}
        content = {
            "tracesim_device": "cpu", "host_name": "one", "distributedInfo": info,
            "traceEvents": [_event(*line) for line in lines],
        }  # fmt: skip
        (folder / f"rank{rank}.pt.trace.json").write_text(json.dumps(content))
    return read_inputs([folder])


def _event(thread: int, name: str, begin: float, end: float, dims: list[Any]) -> dict[str, Any]:
    types = ["TensorList" if name.startswith("c10d::") else "float"]
    region = name.startswith(("ProfilerStep", "Optimizer"))
    return {
        "ph": "X", "cat": "user_annotation" if region else "cpu_op", "name": name, "pid": 9, "tid": thread,
        "ts": begin, "dur": end - begin, "args": {"Input Dims": dims, "Input type": types},
    }  # fmt: skip


def replayed(work: Workload, rank: int = -1, slower: str = "", ns: int = 0) -> Timeline:
    """The replay, with ``ns`` more work in the op ``slower`` of a rank."""
    programs = []
    for r in work.graph.ranks:
        program = work.graph.programs[r.program]
        ops = [
            msgspec.structs.replace(op, measured_ns=(op.measured_ns or 0) + ns)
            if isinstance(op, HostCall) and op.name == slower and r.rank == rank
            else op
            for op in program.ops
        ]
        programs.append(msgspec.structs.replace(program, ops=tuple(ops)))
    return sim.replay(sim.place(msgspec.structs.replace(work.graph, programs=tuple(programs)), None))


def span(timeline: Timeline, rank: int, name: str) -> tuple[float, float]:
    """Begin and end in microseconds of the last span of that name."""
    found = [s for s in timeline.spans if s.name == name and timeline.tracks[s.track].rank == rank]
    return found[-1].start_ns / 1000, found[-1].end_ns / 1000


# Each rank computes, hands its gradients over and waits; rank 1 is the slower one.
FAST: list[Line] = [
    (MAIN, "ProfilerStep#1", 0, 500, []),
    (MAIN, "aten::mm", 0, 100, [[4, 4]]),
    (MAIN, "c10d::allreduce_", 100, 110, [[[100]]]),
    (GLOO, "gloo:all_reduce", 106, 300, [[100]]),
    (MAIN, "Optimizer.step#SGD.step", 320, 400, []),
    (MAIN, "aten::add_", 330, 390, [[4, 4]]),
]
SLOW: list[Line] = [
    (MAIN, "ProfilerStep#1", 0, 500, []),
    (MAIN, "aten::mm", 0, 200, [[4, 4]]),
    (MAIN, "c10d::allreduce_", 200, 210, [[[100]]]),
    (GLOO, "gloo:all_reduce", 205, 310, [[100]]),
    (MAIN, "Optimizer.step#SGD.step", 315, 400, []),
    (MAIN, "aten::add_", 330, 390, [[4, 4]]),
]


def test_a_collective_ends_at_the_latest_arrival_plus_the_transfer(tmp_path: Path) -> None:
    work = job(tmp_path, FAST, SLOW)
    assert work.graph.warnings == ()
    # The transfer begins at 205, when rank 1 is there, and ends at 300, when the first has it: 95.
    ops = [[op for op in p.ops if isinstance(op, Collective)] for p in work.graph.programs]
    assert [[(op.kind, op.bytes, op.measured_ns) for op in rank] for rank in ops] == [[("all_reduce", 400, 95_000)]] * 2
    as_it_was = replayed(work)
    assert span(as_it_was, 0, "aten::add_") == span(as_it_was, 1, "aten::add_") == (330, 390)
    # Rank 1 computes 1000 longer: it arrives at 1205, both have it at 1300, rank 1's thread 10 later.  Rank 0 goes
    # on 30 after that, as it did (from 300 to 330), and rank 1 20 after its thread (from 310 to 330).
    late = replayed(work, 1, "aten::mm", 1_000_000)
    assert span(late, 0, "aten::add_") == (1330, 1390)
    assert span(late, 1, "aten::add_") == (1330, 1390)
    # Rank 0 has 99 to spare: it arrives at 106 and is needed at 205.  100 more make the transfer 1 later.
    assert span(replayed(work, 0, "aten::mm", 99_000), 1, "aten::add_") == (330, 390)
    assert span(replayed(work, 0, "aten::mm", 100_000), 1, "aten::add_") == (331, 391)


def test_work_that_hides_a_collective_does_not_wait_for_it_but_the_optimizer_does(tmp_path: Path) -> None:
    """The thread computes on, is never silent, and steps when the collective is long over."""
    busy: list[Line] = [
        *FAST[:4],
        (MAIN, "aten::bmm", 112, 318, [[4, 4]]),
        *FAST[4:],
    ]
    work = job(tmp_path, busy, SLOW)
    # Rank 1 arrives at 705 and both have it at 800: rank 0's bmm runs as before, its optimizer 30 after the collective.
    late = replayed(work, 1, "aten::mm", 500_000)
    assert span(late, 0, "aten::bmm") == (112, 318)
    # Its own work between bmm's end, 318, and add_ is 12, and it is there before the collective: 800 + 12.
    assert span(late, 0, "aten::add_") == (812, 872)


def test_a_collective_was_over_before_the_optimizer_stepped_whatever_its_thread_says(tmp_path: Path) -> None:
    """gloo's thread told that it was done and was then kept from running: it recorded its end at 450."""
    held_up = [*FAST[:3], (GLOO, "gloo:all_reduce", 106, 450, [[100]]), *FAST[4:]]
    # Rank 0 was silent from 110 and went on at 330, after its optimizer began at 320: done by 320.
    work = job(tmp_path, held_up, SLOW)
    ops = [[op for op in p.ops if isinstance(op, Collective)] for p in work.graph.programs]
    # The first end is rank 1's, 310: 310 - 205.
    assert [op.measured_ns for rank in ops for op in rank] == [105_000, 105_000]
    late = replayed(work, 1, "aten::mm", 1_000_000)
    # Rank 0 goes on 10 after its thread (320 to 330), which returns 10 after the transfer (310 to 320).
    assert span(late, 0, "aten::add_") == (1330, 1390)


def test_two_threads_of_gloo_may_begin_in_another_order_on_each_rank(tmp_path: Path) -> None:
    """Collectives meet in the order in which the program starts them, known by their sizes."""
    head: list[Line] = [
        (MAIN, "ProfilerStep#1", 0, 900, []),
        (MAIN, "c10d::allreduce_", 10, 20, [[[100], [28]]]),
        (MAIN, "c10d::allreduce_", 20, 30, [[[64]]]),
    ]
    in_order: list[Line] = [(GLOO, "gloo:all_reduce", 40, 140, [[128]]), (GLOO2, "gloo:all_reduce", 41, 120, [[64]])]
    swapped: list[Line] = [(GLOO, "gloo:all_reduce", 41, 140, [[128]]), (GLOO2, "gloo:all_reduce", 40, 120, [[64]])]
    work = job(tmp_path, [*head, *in_order], [*head, *swapped])
    found = [[(op.seq, op.bytes) for op in p.ops if isinstance(op, Collective)] for p in work.graph.programs]
    assert sorted(found[0]) == sorted(found[1])
    assert {bytes for _, bytes in found[0]} == {512, 256}
    launched = work.graph.programs[1]
    starters = {op.bytes: launched.ops[op.launch] for op in launched.ops if isinstance(op, Collective) and op.launch}
    assert all(isinstance(op, HostCall) and op.name == "c10d::allreduce_" for op in starters.values())


def test_a_collective_begun_before_the_trace_is_left_out_and_told(tmp_path: Path) -> None:
    tail: list[Line] = [(GLOO, "gloo:all_reduce", 1, 50, [[7]])]
    work = job(tmp_path, [*tail, *FAST], SLOW)
    assert work.graph.warnings == ("1 collectives that were started before the trace began: left out",)
    assert [sum(isinstance(op, Collective) for op in p.ops) for p in work.graph.programs] == [1, 1]


def test_gloo_makes_a_reduce_scatter_of_an_all_reduce(tmp_path: Path) -> None:
    """FSDP's: the op has the output and the input, gloo's event the input; a scalar's shape is empty."""
    lines: list[Line] = [
        (MAIN, "ProfilerStep#1", 0, 900, []),
        (MAIN, "c10d::allreduce_", 5, 10, [[[]]]),
        (MAIN, "c10d::_reduce_scatter_base_", 10, 20, [[64], [128]]),
        (GLOO, "gloo:all_reduce", 30, 60, [[]]),
        (GLOO2, "gloo:all_reduce", 29, 90, [[128]]),
    ]
    work = job(tmp_path, lines, lines)
    assert work.graph.warnings == ()
    ops = work.graph.programs[0].ops
    started = {op.bytes: ops[op.launch] for op in ops if isinstance(op, Collective) and op.launch is not None}
    assert {size: op.name for size, op in started.items() if isinstance(op, HostCall)} == {
        4: "c10d::allreduce_",
        512: "c10d::_reduce_scatter_base_",
    }


def test_ranks_that_disagree_are_an_error_that_names_them(tmp_path: Path) -> None:
    other = [(t, n, b, e, [[200]] if n.startswith("gloo") else d) for t, n, b, e, d in SLOW]
    with pytest.raises(sim.UserError, match="ranks 0 and 1 disagree about collective 0"):
        job(tmp_path, FAST, other)


def test_several_process_groups_are_told(tmp_path: Path) -> None:
    groups = [{"pg_name": "0", "ranks": [0, 1]}, {"pg_name": "1", "ranks": [0, 1]}]
    work = job(tmp_path, FAST, SLOW, pg_config=groups)
    (warning,) = work.graph.warnings
    assert warning.startswith("2 collectives between CPUs, which do not tell their process group")
