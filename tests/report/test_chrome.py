"""Trace files: the rules of Chrome trace events, exact times, and what the TensorBoard plugin reads back."""

from __future__ import annotations

import gzip
import json
import logging
import math
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from told_timelines import MS, Sketch, out_of_memory, random_timelines, two_ranks

from sim.errors import InputError
from sim.report.chrome import encode_trace, exact_us, write_trace, write_traces
from sim.timeline import RankInfo, Step, Timeline

Event = dict[str, Any]


def events_of(timeline: Timeline) -> list[Event]:
    return json.loads(encode_trace(timeline))["traceEvents"]


def slices(events: list[Event], *categories: str) -> list[Event]:
    return [e for e in events if e["ph"] == "X" and e["cat"] in categories]


def ns(us: float) -> int:
    return round(us * 1000)


def check_rules(events: list[Event]) -> None:
    """What viewers rely on; an assertion names the event that breaks it."""
    lanes: dict[tuple[object, object], list[Event]] = defaultdict(list)
    for event in events:
        assert event["ph"] in "XMCisf", event
        assert isinstance(event["name"], str) and event["name"], event
        assert event["ts"] >= 0, event
        if event["ph"] == "X":
            assert event["dur"] >= 0, event
            lanes[event["pid"], event["tid"]].append(event)
    for lane in lanes.values():
        check_nesting(lane)
    check_flows(events, lanes)
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert {key for key in lanes if key[0] != "Spans"} <= named


def check_nesting(lane: list[Event]) -> None:
    """In file order at equal starts, as viewers sort; in nanoseconds, as Perfetto counts."""
    stack: list[Event] = []
    for event in sorted(lane, key=lambda e: e["ts"]):
        while stack and end_ns(stack[-1]) <= ns(event["ts"]):
            stack.pop()
        if stack:
            assert end_ns(event) <= end_ns(stack[-1]), (stack[-1], event)
        stack.append(event)


def end_ns(event: Event) -> int:
    return ns(event["ts"]) + ns(event["dur"])


def check_flows(events: list[Event], lanes: dict[tuple[object, object], list[Event]]) -> None:
    ends = {ph: {e["id"]: e for e in events if e["ph"] == ph} for ph in "sf"}
    count = Counter((e["ph"], e["id"]) for e in events if e["ph"] in "sf")
    assert set(ends["s"]) == set(ends["f"])
    assert all(n == 1 for n in count.values())
    for arrow in [*ends["s"].values(), *ends["f"].values()]:
        assert any(e["ts"] == arrow["ts"] for e in lanes[arrow["pid"], arrow["tid"]]), arrow


def test_events_of_a_small_run() -> None:
    events = events_of(two_ranks())
    check_rules(events)
    # Rank 0: seven pieces of device work; rank 1: four.  A memcpy and a memset are not kernels.
    assert len(slices(events, "kernel")) == 9
    assert [e["name"] for e in slices(events, "gpu_memcpy")] == ["Memcpy DtoD (Device -> Device)"]
    assert [e["name"] for e in slices(events, "gpu_memset")] == ["Memset (Device)"]
    assert [e["name"] for e in slices(events, "user_annotation") if "Step" in e["name"]] == [
        "ProfilerStep#3", "ProfilerStep#4", "ProfilerStep#3", "ProfilerStep#4",
    ]  # fmt: skip
    # "old" has no launch, so 11 - 1 arrows.
    assert sum(e["ph"] == "s" for e in events) == 10


def test_a_kernel_names_its_launch() -> None:
    events = events_of(two_ranks())
    (gelu,) = [e for e in slices(events, "kernel") if e["name"] == "gelu"]
    (call,) = [
        e for e in slices(events, "cuda_runtime") if e["args"]["correlation"] == gelu["args"]["correlation"]
    ]  # fmt: skip
    # The op aten::gelu, 9 to 10 ms, has no runtime call of its own, so it gets one of the same extent.
    (op,) = [e for e in slices(events, "cpu_op") if e["name"] == "aten::gelu"]
    assert (call["name"], call["ts"], call["dur"]) == ("cudaLaunchKernel", op["ts"], op["dur"])
    assert gelu["args"]["External id"] == op["args"]["External id"]
    assert (gelu["pid"], gelu["tid"], gelu["args"]["device"], gelu["args"]["stream"]) == (0, 7, 0, 7)
    assert gelu["args"]["duration from"] == "estimate"
    assert (gelu["ts"], gelu["dur"]) == (11000.0, 2000.0)


def test_a_collective_says_its_size_and_is_annotated() -> None:
    events = events_of(two_ranks())
    kernel = next(e for e in slices(events, "kernel") if "AllReduce" in e["name"])
    assert kernel["args"] | {
        "Collective name": "allreduce", "In msg nelems": 1 << 20, "Out msg nelems": 1 << 20, "dtype": "Byte",
        "Group size": 2, "algorithm": "ring", "protocol": "simple", "transfer (us)": 2000.0,
    } == kernel["args"]  # fmt: skip
    annotation = next(e for e in slices(events, "user_annotation") if e["name"] == "nccl:all_reduce")
    assert annotation["args"]["External id"] == kernel["args"]["External id"]


def test_memory_is_drawn_and_listed() -> None:
    events = events_of(two_ranks())
    counters = [e for e in events if e["ph"] == "C" and e["pid"] == 0]
    gib = 1 << 30
    assert [(e["ts"], e["args"]["bytes"]) for e in counters if e["name"] == "memory allocated"] == [
        (500.0, 2 * gib), (4000.0, 5 * gib), (9000.0, gib),
    ]  # fmt: skip
    assert [(e["ts"], e["args"]["bytes"]) for e in counters if e["name"] == "memory reserved"] == [
        (500.0, 4 * gib), (4000.0, 6 * gib),
    ]  # fmt: skip
    # Changes: 0 to 2, 2 to 5, 5 to 1 GiB.
    instants = [e["args"] for e in events if e["name"] == "[memory]" and e["args"]["Device Id"] == 0]
    assert [a["Bytes"] for a in instants] == [2 * gib, 3 * gib, -4 * gib]
    assert [a["Total Allocated"] for a in instants] == [2 * gib, 5 * gib, gib]
    assert all(a["Device Type"] == 1 for a in instants)


def test_a_measured_recording_does_not_say_what_its_first_sample_added() -> None:
    measured = msgspec.structs.replace(two_ranks(), origin="measured")
    instants = [e for e in events_of(measured) if e["name"] == "[memory]"]
    assert [e["args"]["Bytes"] >> 30 for e in instants] == [3, -4]


def test_an_unmarked_run_gets_no_step() -> None:
    timeline = msgspec.structs.replace(out_of_memory(), steps=(Step(0, 0, "trace", 0, 5 * MS),))
    events = events_of(timeline)
    check_rules(events)
    assert not [e for e in events if e["name"].startswith("ProfilerStep")]


def test_steps_go_to_a_thread_of_their_own_where_a_call_crosses_their_border() -> None:
    s = Sketch(1)
    s.step(0, 0, 0, 10)
    s.call(0, 8, 12, "aten::mm")
    events = events_of(s.timeline())
    check_rules(events)
    (step,) = slices(events, "user_annotation")
    (call,) = slices(events, "cpu_op")
    assert step["tid"] != call["tid"]


def test_ranks_are_processes_and_devices_keep_their_numbers() -> None:
    ranks = (
        RankInfo(0, "gpu5", "NVIDIA RTX A5000", 24 << 30), RankInfo(1, "gpu2", "NVIDIA RTX A5000", 24 << 30),
    )  # fmt: skip
    file = json.loads(encode_trace(msgspec.structs.replace(two_ranks(), ranks=ranks)))
    assert {e["pid"] for e in slices(file["traceEvents"], "kernel")} == {5, 2}
    properties = file["deviceProperties"]
    assert [p["id"] for p in properties] == [0, 1, 2, 3, 4, 5]
    assert properties[5] == {"id": 5, "name": "NVIDIA RTX A5000", "totalGlobalMem": 24 << 30}
    assert file["distributedInfo"] == {"backend": "nccl", "world_size": 2, "ranks": [0, 1]}
    # Two ranks on devices of the same number: their places instead.
    same = tuple(msgspec.structs.replace(info, device=f"node{info.rank}.gpu0") for info in ranks)
    events = events_of(msgspec.structs.replace(two_ranks(), ranks=same))
    assert {e["pid"] for e in slices(events, "kernel")} == {0, 1}


def test_threads_of_two_ranks_that_share_a_number_are_told_apart() -> None:
    timeline = two_ranks()
    tracks = tuple(msgspec.structs.replace(t, id=1) if t.kind == "thread" else t for t in timeline.tracks)
    events = events_of(msgspec.structs.replace(timeline, tracks=tracks))
    check_rules(events)
    assert len({e["tid"] for e in slices(events, "cuda_runtime")}) == 2


@given(st.integers(0, 10**13), st.integers(0, 10**12))
@settings(deadline=None)
def test_times_come_back_to_the_nanosecond(start: int, duration: int) -> None:
    ts, dur = exact_us(start, duration)
    assert (ns(ts), ns(dur)) == (start, duration)
    # The plugin's sum is never past the end, so neighbours never overlap.
    end = (start + duration) / 1000
    assert math.nextafter(end, 0.0) <= ts + dur <= end


def test_neighbours_whose_sums_would_overlap_do_not() -> None:
    # 0.1 + 0.2 is more than 0.3 in floating point.
    ts, dur = exact_us(100, 200)
    assert ts + 0.2 > 0.3
    assert ts + dur == 0.3
    assert ns(dur) == 200


@given(random_timelines(ranks=2))
@settings(deadline=None)
def test_random_timelines_follow_the_rules_and_come_back(timeline: Timeline) -> None:
    events = events_of(timeline)
    check_rules(events)
    for track, info in enumerate(timeline.tracks):
        on_track = [exact_us(s.start_ns, s.duration_ns) for s in timeline.spans if s.track == track]
        assert all(a[0] + a[1] <= b[0] for a, b in pairwise(on_track)), info
    back = sorted(
        (e["name"], ns(e["ts"]), ns(e["dur"])) for e in slices(events, "kernel", "gpu_memcpy", "gpu_memset")
    )  # fmt: skip
    assert back == sorted((s.name, s.start_ns, s.duration_ns) for s in timeline.spans if s.kind != "host")
    calls = {
        e["args"]["External id"]: (ns(e["ts"]), ns(e["dur"]))
        for e in slices(events, "cpu_op", "cuda_runtime", "cuda_driver")
    }
    assert calls == {
        i + 1: (s.start_ns, s.duration_ns) for i, s in enumerate(timeline.spans) if s.kind == "host"
    }  # fmt: skip
    steps = [(e["name"], ns(e["ts"]), ns(e["dur"])) for e in slices(events, "user_annotation") if "Step" in e["name"]]
    assert steps == [(s.name, s.start_ns, s.duration_ns) for s in timeline.steps]


def test_the_same_timeline_gives_the_same_bytes(tmp_path: Path) -> None:
    names = ["a.pt.trace.json", "b.pt.trace.json", "c.pt.trace.json.gz", "d.pt.trace.json.gz"]
    for name in names:
        write_trace(two_ranks(), tmp_path / name)
    plain, again, packed, packed_again = ((tmp_path / name).read_bytes() for name in names)
    assert plain == again
    assert packed == packed_again
    assert gzip.decompress(packed) == plain
    # Flags 0: no file name in the header; bytes 4 to 8: no time.
    assert packed[3] == 0
    assert packed[4:8] == bytes(4)


def test_a_name_that_no_viewer_opens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ends in \.pt\.trace\.json"):
        write_trace(two_ranks(), tmp_path / "trace.txt")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="folder"):
        write_traces(two_ranks(), tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_one_file_or_a_folder_of_ranks(tmp_path: Path) -> None:
    assert write_traces(two_ranks(), tmp_path / "all.pt.trace.json") == (tmp_path / "all.pt.trace.json",)
    files = write_traces(two_ranks(), tmp_path / "run")
    assert [f.name for f in files] == ["rank0.pt.trace.json.gz", "rank1.pt.trace.json.gz"]
    together = json.loads((tmp_path / "all.pt.trace.json").read_bytes())["traceEvents"]
    apart = [json.loads(gzip.decompress(f.read_bytes())) for f in files]
    assert [a["distributedInfo"]["rank"] for a in apart] == [0, 1]
    assert slices(together, "kernel") == [e for a in apart for e in slices(a["traceEvents"], "kernel")]


@pytest.fixture
def plugin_log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    pytest.importorskip("torch_tb_profiler", reason="the TensorBoard plugin is not installed")
    caplog.set_level(logging.WARNING)
    return caplog


def read_with_plugin(path: Path, cache: Path):  # type: ignore[no-untyped-def]
    from torch_tb_profiler.profiler.data import RunProfileData

    return RunProfileData.parse("rank0", None, str(path), str(cache))


def test_the_plugin_reads_back_steps_kernels_and_device(tmp_path: Path, plugin_log: pytest.LogCaptureFixture) -> None:
    file, _ = write_traces(two_ranks(), tmp_path)
    run = read_with_plugin(file, tmp_path)
    assert run.steps_names == ["3", "4"]
    # Host windows of 10 and 14 ms.
    assert [costs.costs[-1] for costs in run.steps_costs] == [10_000.0, 14_000.0]
    found = {name: (row["count"], row["sum"]) for name, row in run.kernel_stat.iterrows()}
    assert found == {
        "gemm": (2, 11_000.0), "ncclDevKernel_AllReduce": (1, 5_000.0), "gelu": (1, 2_000.0), "old": (1, 1_000.0),
        "relu": (1, 1_000.0),
    }  # fmt: skip
    assert run.used_devices == [0]
    assert run.device_props[0]["name"] == "NVIDIA RTX A5000"
    assert run.gpu_metrics_parser.gpu_ids == {0}
    assert {op.name for op in run.op_list_groupby_name} == {"aten::gelu", "c10d::allreduce_"}
    # From the calls' place in the steps the plugin takes communication, from the instants memory.
    assert run.has_communication
    assert [(node.name, node.step_name) for node in run.comm_node_list] == [("nccl:all_reduce", "3")]
    assert set(run.memory_snapshot.get_peak_memory().values()) == {5 << 30}
    assert [r.message for r in plugin_log.records if r.levelno >= logging.WARNING] == []


def test_the_plugin_loads_a_folder_of_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_tb_profiler", reason="the TensorBoard plugin is not installed")
    monkeypatch.setenv("TORCH_PROFILER_START_METHOD", "fork")
    from torch_tb_profiler import io
    from torch_tb_profiler.profiler.loader import RunLoader

    write_traces(two_ranks(), tmp_path)
    with io.Cache(str(tmp_path)) as cache:
        run = RunLoader("run", str(tmp_path), cache).load()
    assert sorted(profile.worker for profile in run.profiles.values() if profile.worker != "All") == ["rank0", "rank1"]
    (together,) = [profile for profile in run.profiles.values() if profile.worker == "All"]
    # Each rank runs one all_reduce in step 3: rank 0 for 5 ms, rank 1 for 4.
    table = together.comm_ops["data"]
    calls = {worker: rows["rows"] for worker, rows in table.items()}
    assert {worker: row[0][:2] for worker, row in calls.items()} == {
        "rank0": ["nccl:all_reduce", 1], "rank1": ["nccl:all_reduce", 1],
    }  # fmt: skip
