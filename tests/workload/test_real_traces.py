"""Real traces: what is replayed from durations and order is what was measured, and what-ifs go the right way."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from sim.ops import Alloc, Collective, Free, HostCall, Kernel
from sim.place.captured import place_as_captured
from sim.replay.replay import replay
from sim.timeline import Timeline
from sim.workload.inputs import Workload, read_inputs
from sim.workload.kineto import read_trace
from sim.workload.link import link_traces
from tests.oracle import replay as oracle_replay
from tests.oracle import steps
from tests.workload.scaling import scaled

# Whether the first step of the trace was cut by the profiler's start: it is left out of what is claimed.
TRACES = {
    "a100-cuda-event-sync.pt.trace.json.gz": False,
    "a100-cuda-event-sync-multistream.pt.trace.json.gz": False,
    "a100-ddp-rank0of2.pt.trace.json.gz": False,
    "h100-qwen0.5b-forward.pt.trace.json.gz": False,
    "v100-1gpu-steady.pt.trace.json.gz": True,
    "v100-dlrm-8ranks": False,
    "v100-resnet50-0workers.pt.trace.json.gz": True,
    "v100-resnet50-4workers.pt.trace.json.gz": True,
}


@cache
def linked(path: Path) -> Workload:
    return read_inputs([path])


@pytest.fixture
def traces(shared_dir: Path) -> Path:
    return shared_dir / "data/traces"


def predicted_ms(of: Workload, kernels: float = 1.0, host: float = 1.0) -> list[float]:
    graph = scaled(of.graph, kernels, host)
    return [ns / 1e6 for rank_steps in steps(graph, oracle_replay(graph)).values() for _, ns in rank_steps]


def measured_ms(timeline: Timeline) -> list[float]:
    return [step.duration_ns / 1e6 for step in timeline.steps]


@pytest.mark.parametrize("name", TRACES)
def test_every_step_is_replayed(name: str, traces: Path) -> None:
    """The issue asks for 3 % a step and 1 % on average; what is reached is held, with room for rounding."""
    of = linked(traces / name)
    first = 1 if TRACES[name] else 0
    pairs = list(zip(predicted_ms(of), measured_ms(of.measured), strict=True))[first:]
    errors = [abs(p / m - 1) for p, m in pairs]
    assert max(errors) < 0.002, pairs
    assert sum(errors) / len(errors) < 0.001


@pytest.mark.parametrize("name", TRACES)
def test_the_event_loop_and_the_oracle_agree(name: str, traces: Path) -> None:
    of = linked(traces / name)
    of.measured.check()
    times = oracle_replay(of.graph)
    timeline = replay(place_as_captured(of.graph))
    timeline.check()
    assert timeline.spans
    for span in timeline.spans:
        assert (span.start_ns, span.end_ns) == times[timeline.tracks[span.track].rank][span.op]


def test_each_collective_of_eight_ranks_ends_when_it_did(traces: Path) -> None:
    of = linked(traces / "v100-dlrm-8ranks")
    times = oracle_replay(of.graph)
    shortest_step = min(step.duration_ns for step in of.measured.steps)
    checked = 0
    for span in of.measured.spans:
        if span.kind == "communication":
            rank = of.measured.tracks[span.track].rank
            assert abs(times[rank][span.op][1] - span.end_ns) < 0.01 * shortest_step
            checked += 1
    assert checked == 8 * 8
    assert {r.rank for r in of.graph.ranks} == set(range(8))
    collectives = [op for op in of.graph.programs[3].ops if isinstance(op, Collective)]
    assert [(c.kind, c.seq) for c in collectives] == [
        ("all_to_all", 0), ("all_to_all", 1), ("all_to_all", 2), ("all_to_all", 3),
        ("all_reduce", 4), ("all_to_all", 5), ("all_reduce", 6), ("all_reduce", 7),
    ]  # fmt: skip
    # nccl:all_reduce of 394,241 floats of 4 bytes
    assert (collectives[4].bytes, collectives[4].dtype) == (4 * 394_241, "float32")


def test_faster_kernels_halve_a_step_that_the_gpu_bounds(traces: Path) -> None:
    of = linked(traces / "v100-1gpu-steady.pt.trace.json.gz")
    as_is, faster, slower = (predicted_ms(of, kernels=k)[3:] for k in (1.0, 0.5, 2.0))
    for base, half, double in zip(as_is, faster, slower, strict=True):
        assert half == pytest.approx(base / 2, rel=0.03)
        assert double == pytest.approx(base * 2, rel=0.02)
    for base, same in zip(as_is, predicted_ms(of, host=0.5)[3:], strict=True):
        assert same == pytest.approx(base, rel=0.005)


@pytest.mark.parametrize(
    "name", ["a100-ddp-rank0of2.pt.trace.json.gz", "v100-dlrm-8ranks", "v100-resnet50-0workers.pt.trace.json.gz"]
)
def test_a_faster_host_nears_half_a_step_that_the_host_bounds(name: str, traces: Path) -> None:
    of = linked(traces / name)
    as_is = predicted_ms(of)
    for base, same in zip(as_is, predicted_ms(of, kernels=0.5), strict=True):
        assert same == pytest.approx(base, rel=0.02)
    for base, half in zip(as_is, predicted_ms(of, host=0.5), strict=True):
        assert 0.5 * base <= half < 0.65 * base


def test_host_gaps_are_the_bottleneck_where_they_are_made_longer(traces: Path) -> None:
    """At twice the host time a step of 95.7 ms is bound by the GPU still; at six times by the host (31 ms alone)."""
    of = linked(traces / "v100-1gpu-steady.pt.trace.json.gz")
    base = predicted_ms(of)[4]
    assert predicted_ms(of, host=2.0)[4] == pytest.approx(base, rel=0.02)
    assert predicted_ms(of, host=6.0)[4] > 1.6 * base


def test_the_two_resnets_do_the_same_gpu_work_and_differ_in_the_host(traces: Path) -> None:
    """Without loader workers the main thread spends 60 to 70 ms more before its first copy of each step."""
    none = linked(traces / "v100-resnet50-0workers.pt.trace.json.gz")
    four = linked(traces / "v100-resnet50-4workers.pt.trace.json.gz")

    def device_ms(of: Workload) -> float:
        return sum(span.duration_ns for span in of.measured.spans if span.kind != "host") / 6e6

    assert device_ms(none) == pytest.approx(device_ms(four), rel=0.02)
    # With an infinitely fast GPU the loader's stall is left.
    steps_none, steps_four = predicted_ms(none, kernels=0.0)[1:], predicted_ms(four, kernels=0.0)[1:]
    assert min(steps_none) > 160
    assert sorted(steps_four)[2] < 125


def test_a_single_rank_names_who_is_missing(traces: Path) -> None:
    graph = linked(traces / "a100-ddp-rank0of2.pt.trace.json.gz").graph
    assert graph.groups == {"0": ((0, 1),)}
    assert any("1 ranks are not among the traces (1)" in warning for warning in graph.warnings)
    collectives = [op for op in graph.programs[0].ops if isinstance(op, Collective)]
    assert len(collectives) == 21
    # Each step broadcasts its two buffers' worth of statistics, then reduces five buckets; the first is 2,049,000
    # floats of 4 bytes, as record_param_comms says.
    assert [c.kind for c in collectives[:7]] == ["broadcast"] * 2 + ["all_reduce"] * 5
    assert (collectives[2].bytes, collectives[2].dtype) == (8_196_000, "float32")


def test_the_trace_holds_no_recorded_time(traces: Path) -> None:
    """Shifting a whole trace in time changes nothing: only differences are in the graph."""
    path = traces / "a100-cuda-event-sync.pt.trace.json.gz"
    first = [read_trace(path)]
    shifted = [read_trace(path)]
    for events in (shifted[0].host, shifted[0].runtime, shifted[0].device):
        for event in events:
            event.start_ns += 12_345_678_901
            event.end_ns += 12_345_678_901
    assert link_traces(first).graph == link_traces(shifted).graph


def test_memory_events_become_blocks(traces: Path) -> None:
    """The peak of live bytes is the trace's own largest Total Allocated."""
    of = linked(traces / "h100-qwen0.5b-forward.pt.trace.json.gz")
    live, peak = 0, 0
    sizes: dict[int, int] = {}
    for op in of.graph.programs[0].ops:
        if isinstance(op, Alloc):
            sizes[op.block] = op.bytes
            live += op.bytes
        elif isinstance(op, Free):
            live -= sizes.pop(op.block)
        peak = max(peak, live)
    assert peak == max(sample.allocated_bytes for sample in of.measured.memory)


def test_kernels_know_their_op_and_shapes(traces: Path) -> None:
    graph = linked(traces / "h100-qwen0.5b-forward.pt.trace.json.gz").graph
    kernels = [op for op in graph.programs[0].ops if isinstance(op, Kernel) and op.launch is not None]
    known = [graph.works[k.work] for k in kernels if k.work is not None]
    # All but one of them are launched from an aten op (the odd one by cuLaunchKernel, from Triton).
    assert len(known) >= len(kernels) - 1
    embedding = next(work for work in known if work.op in ("aten::embedding", "aten::index_select"))
    assert embedding.inputs[0].dtype == "bfloat16"
    assert embedding.inputs[0].shape == (151_936, 1_024)


def test_waits_are_dependencies(traces: Path) -> None:
    """The DeviceSynchronize at the H100 step's beginning took 14.1 ms, and none of it was its own work."""
    graph = linked(traces / "h100-qwen0.5b-forward.pt.trace.json.gz").graph
    calls = [op for op in graph.programs[0].ops if isinstance(op, HostCall) and op.name == "cudaDeviceSynchronize"]
    assert calls[0].waits
    assert calls[0].measured_ns is not None and calls[0].measured_ns < 100_000
