"""A training step of one GPU on several: the reducer's operations, where they go, and what cannot be replicated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sim.errors import UserError
from sim.graph import OpGraph, write
from sim.ops import Alloc, Collective, HostCall, Kernel, TensorMeta
from sim.place.place import place
from sim.replay.replay import replay
from sim.report.summarize import summarize
from sim.topology.load import load_topology
from sim.workload.replicas import bucket_of_each, read_replicated
from sim.workload.spec import SynthSpec
from sim.workload.synth import synthesize
from tests.workload.tiny_models import model_folder

MIB = 1 << 20


def trace(folder: Path, *, shapes: bool = True, gradients: bool = True, collective: bool = False) -> Path:
    """One step, times in microseconds: three backward kernels of 1000 behind launches of 10; a gradient is ready
    behind each: 2 MiB, 30 MiB, 1 MiB of float32.  Then an optimizer's kernel."""
    events: list[dict[str, Any]] = []

    def complete(cat: str, name: str, ts: int, dur: int, tid: int, pid: int = 1, **args: Any) -> None:
        events.append({"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, "ts": ts, "dur": dur, "args": args})

    complete("user_annotation", "ProfilerStep#1", 0, 5000, 1)
    for i, elements in enumerate((MIB // 2, 30 * MIB // 4, MIB // 4, 0)):
        at = 100 + 100 * i
        complete("cpu_op", "aten::mm", at, 50, 1, **{"External id": i})
        complete("cuda_runtime", "cudaLaunchKernel", at + 10, 10, 1, correlation=i + 1)
        name = "ncclDevKernel_AllReduce" if collective and i == 1 else f"kernel{i}"
        complete("kernel", name, 1000 + 1000 * i, 1000, 7, 0, correlation=i + 1, device=0, stream=7)
        if gradients and elements:
            known = {"Input Dims": [[elements]], "Input type": ["float"]} if shapes else {}
            complete("cpu_op", "torch::autograd::AccumulateGrad", at + 60, 20, 1, **known)
    complete("cuda_runtime", "cudaDeviceSynchronize", 600, 4400, 1, correlation=99)
    devices = [{"id": 0, "name": "NVIDIA RTX A5000", "totalGlobalMem": 24 << 30}]
    file = folder / "one.pt.trace.json"
    file.write_text(json.dumps({"schemaVersion": 1, "deviceProperties": devices, "traceEvents": events}))
    return file


def names(graph: OpGraph, lane_name: str) -> list[str]:
    """What runs on a lane, in order."""
    program = graph.programs[0]
    (lane,) = (i for i, lane in enumerate(program.lanes) if lane.name == lane_name)
    return [getattr(op, "name", "") for op in program.ops if op.lane == lane]


def test_what_the_reducer_adds_and_where(tmp_path: Path) -> None:
    graph = read_replicated([trace(tmp_path)], "dp=4")
    assert [r.rank for r in graph.ranks] == [0, 1, 2, 3]
    assert graph.groups == {"dp": ((0, 1, 2, 3),)}
    # The first bucket is full with 1 MiB: the first gradient's 2 MiB.  The next with 25 MiB: the second's 30.
    # The third gradient is the last bucket.
    collectives = [op for op in graph.programs[0].ops if isinstance(op, Collective)]
    assert [(op.kind, op.bytes, op.seq) for op in collectives] == [
        ("all_reduce", 2 * MIB, 0), ("all_reduce", 30 * MIB, 1), ("all_reduce", MIB, 2),
    ]  # fmt: skip
    assert names(graph, "stream 7") == [
        "kernel0", "aten::mul", "kernel1", "aten::mul", "kernel2", "aten::mul",
        "aten::copy_", "aten::copy_", "aten::copy_", "kernel3",
    ]  # fmt: skip


def test_a_bucket_waits_for_its_gradients_and_the_optimizer_for_the_buckets(tmp_path: Path) -> None:
    timeline = replay(place(read_replicated([trace(tmp_path)], "dp=4"), load_topology("a5000x4")))
    timeline.check()
    spans = [s for s in timeline.spans if timeline.tracks[s.track].rank == 0 and s.kind != "host"]
    ends = {s.name: s.end_ns for s in spans}
    starts = {s.name: s.start_ns for s in spans}
    reduced = [s for s in spans if s.kind == "communication"]
    # The first all-reduce runs beside the kernels that follow it; the optimizer's kernel comes behind the last.
    assert ends["kernel0"] < reduced[0].start_ns < starts["kernel2"]
    assert starts["kernel3"] >= reduced[-1].end_ns
    assert reduced[1].start_ns >= reduced[0].end_ns


def test_one_gpu_s_step_is_still_in_it(tmp_path: Path) -> None:
    graph = read_replicated([trace(tmp_path)], "dp=2")
    kept = [op for op in graph.programs[0].ops if isinstance(op, Kernel) and op.name.startswith("kernel")]
    assert [op.measured_ns for op in kept] == [1_000_000] * 4
    added = [op for op in graph.programs[0].ops if isinstance(op, HostCall) and op.measured_ns is None]
    assert len(added) == 3 + 3 + 3  # into the buckets, all-reduces, out of the buckets


def test_without_memory_events_no_memory_is_added(tmp_path: Path) -> None:
    assert not any(isinstance(op, Alloc) for op in read_replicated([trace(tmp_path)], "dp=2").programs[0].ops)


def test_buckets_are_pytorch_s() -> None:
    # 1 MiB first: two of 0.6 MiB fill it; then 25 MiB: 10 + 10 + 10 are over it; the last alone.
    sizes = (0.6, 0.6, 10, 10, 10, 4)
    tensors = [TensorMeta("float32", (int(mib * MIB) // 4,)) for mib in sizes]
    assert bucket_of_each(tensors) == [[0, 1], [2, 3, 4], [5]]


def test_a_real_trace(shared_dir: Path) -> None:
    """ResNet-50 has 25,557,032 parameters: 102,228,128 bytes of gradients a step."""
    path = shared_dir / "data/traces/v100-resnet50-0workers.pt.trace.json.gz"
    graph = read_replicated([path], "dp=8")
    ops = graph.programs[0].ops
    steps = 6
    assert sum(op.bytes for op in ops if isinstance(op, Collective)) == steps * 102_228_128
    summary = summarize(replay(place(graph, load_topology("a5000x8"))))
    assert len(summary.ranks) == 8
    assert summary.memory_peaks[0].by_category["communication"] >= 102_228_128


# Synthesized workloads ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(model_folder(tmp_path_factory.mktemp("tiny"), "opt"))


def test_a_synthesized_workload_is_what_synth_makes(tiny: Path, tmp_path: Path) -> None:
    one = tmp_path / "one.workload.json.gz"
    spec = SynthSpec(model=str(tiny), batch=2, seq=16, mode="train")
    write(synthesize(spec), one)
    eight = synthesize(SynthSpec(model=str(tiny), batch=2, seq=16, mode="train", parallel="dp=8"))
    assert read_replicated([one], "dp=8") == eight


# What cannot be -----------------------------------------------------------------------------------------------------


def test_traces_that_cannot_be_replicated(tmp_path: Path) -> None:
    for changes, words in (
        ({"shapes": False}, "record it with record_shapes=True"),
        ({"gradients": False}, "no torch::autograd::AccumulateGrad in it"),
        ({"collective": True}, "has collectives already"),
    ):
        with pytest.raises(UserError, match=words):
            read_replicated([trace(tmp_path, **changes)], "dp=2")


@pytest.mark.parametrize("plan", ["tp=2", "dp=", "dp=0", "dp", "dp=2,tp=2"])
def test_plans_that_a_trace_cannot_have(tmp_path: Path, plan: str) -> None:
    with pytest.raises(UserError, match="data-parallel ranks only, as in dp=8"):
        read_replicated([trace(tmp_path)], plan)


def test_several_inputs_are_not_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give one workload file or one trace"):
        read_replicated([tmp_path], "dp=2")


def test_a_workload_of_several_ranks(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "two.workload.json.gz"
    write(synthesize(SynthSpec(model=str(tiny), batch=1, seq=8, mode="train", parallel="dp=2")), file)
    with pytest.raises(UserError, match="has 2 ranks already"):
        read_replicated([file], "dp=4")
