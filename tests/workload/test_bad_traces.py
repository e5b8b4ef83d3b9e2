"""Traces that are broken: an error of one line with the cure, or tolerated and counted; never a traceback."""

from __future__ import annotations

import gzip
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sim.errors import InputError, UserError
from sim.workload.inputs import read_inputs
from sim.workload.kineto import read_trace
from sim.workload.link import link_traces
from tests.oracle import replay, steps
from tests.workload.made_machine import Machine

Event = dict[str, Any]


def small() -> Machine:
    """Two steps with everything in them: two threads, three streams, copies, events, a collective."""
    m = Machine(rank=0, world=1)
    for _ in range(2):
        m.begin_step()
        m.think(300)
        m.copy(50, "HtoD (Pageable -> Device)")
        for _ in range(4):
            m.op("mm", 20, 40)
        with m.backward():
            for _ in range(4):
                m.op("mm", 20, 80)
            m.all_reduce(1000, 300)
            m.wait_event(7, 20)
        m.op("_foreach_add_", 30, 60)
        m.synchronize("cudaDeviceSynchronize")
        m.end_step()
        m.think(50)
    return m


def write(path: Path, events: list[Event], **head: Any) -> Path:
    path.write_text(json.dumps({"traceEvents": events, **head}))
    return path


def warnings_of(path: Path) -> str:
    return "; ".join(read_inputs([path]).graph.warnings)


def refused(path: Path) -> str:
    with pytest.raises(InputError) as error:
        read_inputs([path])
    message = str(error.value)
    assert str(path) in message and "\n" not in message and "; " in message, message
    return message


def test_a_missing_file(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "none.json")


def test_a_truncated_gzip(tmp_path: Path) -> None:
    path = tmp_path / "cut.json.gz"
    path.write_bytes(gzip.compress(b'{"traceEvents": []}' * 100)[:-20])
    assert "not a whole gzip file" in refused(path)


def test_json_that_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "cut.json"
    path.write_text('{"traceEvents": [{"ph": "X"')
    assert "not JSON, or cut off" in refused(path)


@pytest.mark.parametrize("text", ['{"a": 1}', "5", '"trace"', '{"traceEvents": 3}', "null", "[1, 2]", "[" * 100_000])
def test_json_that_is_no_trace(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    refused(path)


def test_an_empty_file_and_an_empty_folder(tmp_path: Path) -> None:
    path = tmp_path / "empty.json"
    path.write_bytes(b"")
    assert "is empty" in refused(path)
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "no traces in this folder" in refused(folder)


def test_a_trace_without_gpu_events(tmp_path: Path, shared_dir: Path) -> None:
    cpu_only = shared_dir / "data/traces/cpu-only-rank34.pt.trace.json.gz"
    assert "no GPU events" in refused(cpu_only)
    host = [e for e in small().events if e["cat"] == "cpu_op"]
    assert "no GPU events" in refused(write(tmp_path / "host.json", host))


def test_kernels_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    kernel = {"ph": "X", "cat": "kernel", "name": "k", "ts": 1, "dur": -5, "pid": 0, "tid": 7}
    path = write(tmp_path / "negative.json", [kernel, {**kernel, "ts": "x"}])
    told = "can be used (skipped: 1 because of a negative duration, 1 because of fields of the wrong type)"
    assert told in refused(path)


def test_an_allocation_beyond_any_memory_is_skipped(tmp_path: Path) -> None:
    memory = {"ph": "i", "name": "[memory]", "ts": 1, "pid": 1, "tid": 1, "args": {"Device Type": 1, "Bytes": 1 << 60}}
    path = write(tmp_path / "memory.json", [*small().events, memory])
    assert "1 events skipped because of missing or unusable fields" in warnings_of(path)


def test_names_are_text_and_nothing_that_a_terminal_obeys(tmp_path: Path) -> None:
    kernel = {"ph": "X", "cat": "kernel", "name": "\x1b[31mred\nhot", "ts": 1, "dur": 5, "pid": 0, "tid": 7}
    (event,) = read_trace(write(tmp_path / "colour.json", [kernel])).device
    assert event.name == " [31mred hot"


def test_a_trace_that_says_the_cpu_is_its_device_is_read(tmp_path: Path) -> None:
    host = [e for e in small().events if e["cat"] in ("cpu_op", "user_annotation") and "nccl" not in e["name"]]
    linked = link_traces([read_trace(write(tmp_path / "host.json", host, tracesim_device="cpu"))])
    assert [s.name for s in linked.measured.steps] == ["ProfilerStep#0", "ProfilerStep#1"]


def test_two_files_of_the_same_rank(tmp_path: Path) -> None:
    for name in ("a.pt.trace.json", "b.pt.trace.json"):
        small().write(tmp_path / name)
    with pytest.raises(InputError, match=r"rank 0 again: a\.pt\.trace\.json is the same rank; give one file per rank"):
        read_inputs([tmp_path])


def test_kernels_without_a_launch_and_launches_without_a_kernel(tmp_path: Path) -> None:
    events = [e for e in small().events if not (e["cat"] == "cuda_runtime" and e["name"] == "cudaLaunchKernel")]
    # 2 steps of 4 + 4 + 1 kernels and one collective.
    assert "20 device operations without a launch" in warnings_of(write(tmp_path / "kernels.json", events))
    events = [e for e in small().events if e["cat"] != "kernel"]
    assert "20 launches without a kernel" in warnings_of(write(tmp_path / "launches.json", events))


def test_a_process_with_two_devices_is_told(tmp_path: Path) -> None:
    events = small().events
    for event in events:
        if event["cat"] == "kernel" and event["tid"] == 20:
            event["args"]["device"] = 1
    assert "2 devices that one process uses" in warnings_of(write(tmp_path / "two.json", events))


def test_overlapping_kernels_on_one_stream(tmp_path: Path) -> None:
    events = small().events
    kernels = [e for e in events if e["cat"] == "kernel" and e["tid"] == 7]
    kernels[0]["dur"] += 30
    path = write(tmp_path / "overlap.json", events)
    assert "1 device operations that overlap another" in warnings_of(path)
    linked = read_inputs([path])
    assert steps(linked.graph, replay(linked.graph))[0][1][1] == linked.measured.steps[1].duration_ns


def test_a_clock_that_jumps(tmp_path: Path) -> None:
    events = small().events
    events[5]["ts"] = 1e15
    events[9]["ts"] = -5e12
    assert "2 events skipped because of a clock that jumps" in warnings_of(write(tmp_path / "jump.json", events))


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("ts", None, "missing or unusable fields"),
        ("dur", -1, "a negative duration"),
        ("dur", 1e300, "a time that is none"),
        ("ts", "soon", "fields of the wrong type"),
        ("args", 7, "fields of the wrong type"),
    ],
)
def test_events_with_unusable_fields_are_skipped_and_counted(field: str, value: Any, why: str, tmp_path: Path) -> None:
    events = small().events
    events[3][field] = value
    events[8][field] = value
    assert f"2 events skipped because of {why}" in warnings_of(write(tmp_path / "fields.json", events))


def test_json_that_only_lenient_readers_take(tmp_path: Path) -> None:
    text = json.dumps({"traceEvents": small().events}).replace('"device": 0', '"device": 0, "bandwidth": inf', 3)
    path = tmp_path / "nan.json"
    path.write_text(text.replace("aten::mm", "aten\t::mm", 1))
    assert read_trace(path).skipped == {}


def test_a_step_that_one_rank_does_not_have(tmp_path: Path) -> None:
    a, b = small(), small()
    a.rank, b.rank, a.world, b.world = 0, 1, 2, 2
    a.write(tmp_path / "rank0.pt.trace.json")
    last = max(e["ts"] for e in b.events if e["name"] == "ProfilerStep#1")
    b.events = [e for e in b.events if e["ts"] < last - 1]
    b.write(tmp_path / "rank1.pt.trace.json")
    linked = read_inputs([tmp_path])
    told = "; ".join(linked.graph.warnings)
    assert "ProfilerStep#1 is not in the trace of rank 1" in told
    assert "1 collectives that rank 1 has no part in: met without it" in told
    replay(linked.graph)


def test_ranks_that_disagree_about_a_collective(tmp_path: Path) -> None:
    for rank in range(2):
        machine = small()
        machine.rank, machine.world = rank, 2
        for event in machine.events:
            if rank and event["name"] == "nccl:all_reduce":
                event["args"]["Input Dims"] = [[999]]
        machine.write(tmp_path / f"rank{rank}.pt.trace.json")
    # 1,000 and 999 floats of 4 bytes
    with pytest.raises(UserError, match=r"ranks 0 and 1 disagree about collective 0 .* 4000 bytes and .* 3996 bytes"):
        read_inputs([tmp_path])


_values = st.one_of(
    st.none(), st.integers(-(10**30), 10**30), st.floats(), st.text(max_size=3), st.booleans(), st.just([])
)
_damage = st.lists(
    st.tuples(
        st.integers(0, 200),
        st.sampled_from(["drop", "again", "swap", "ts", "dur", "tid", "pid", "name", "cat", "args"]),
        _values,
    ),
    max_size=12,
)  # fmt: skip


def _damaged(events: list[Event], damage: list[tuple[int, str, Any]]) -> list[Event]:
    for place, what, value in damage:
        if not events:
            break
        i = place % len(events)
        if what == "drop":
            del events[i]
        elif what == "again":
            events.append(deepcopy(events[i]))
        elif what == "swap":
            events[i]["ts"], events[-1]["ts"] = events[-1].get("ts"), events[i].get("ts")
        elif what == "args" and isinstance(events[i].get("args"), dict) and events[i]["args"]:
            events[i]["args"][sorted(events[i]["args"])[place % len(events[i]["args"])]] = value
        else:
            events[i][what] = value
    return events


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=_damage)
def test_damaged_traces_are_read_or_refused(damage: list[tuple[int, str, Any]], tmp_path: Path) -> None:
    path = write(tmp_path / "damaged.json", _damaged(small().events, damage))
    try:
        linked = read_inputs([path])
    except UserError as error:
        assert "\n" not in str(error)
        return
    linked.graph.check()
    linked.measured.check()
    replay(linked.graph)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 10_000), insert=st.binary(max_size=4))
def test_damaged_bytes_are_read_or_refused(cut: int, insert: bytes, tmp_path: Path) -> None:
    raw = json.dumps({"traceEvents": small().events[:30]}).encode()
    path = tmp_path / "bytes.json"
    path.write_bytes(raw[: cut % len(raw)] + insert + raw[cut % len(raw) + len(insert) :])
    try:
        replay(read_inputs([path]).graph)
    except UserError as error:
        assert "\n" not in str(error)


def test_kernels_alone_are_replayed_with_the_gaps_between_them(tmp_path: Path) -> None:
    events = [e for e in small().events if e["cat"] == "kernel"]
    path = write(tmp_path / "kernels.json", events)
    assert "1 traces without host events" in warnings_of(path)
    linked = read_inputs([path])
    assert [s.name for s in linked.measured.steps] == ["trace"]
    assert steps(linked.graph, replay(linked.graph))[0] == [("trace", linked.measured.steps[0].duration_ns)]


def test_a_device_clock_that_is_behind_is_set_forward(tmp_path: Path) -> None:
    events = small().events
    as_it_is = link_traces([read_trace(write(tmp_path / "right.json", events))])
    for event in events:
        if event["pid"] == 0:
            event["ts"] -= 500
    path = write(tmp_path / "behind.json", events)
    assert "1 device clocks that ran behind" in warnings_of(path)
    behind = read_inputs([path])
    right, wrong = (steps(of.graph, replay(of.graph))[0] for of in (as_it_is, behind))
    for (_, a), (_, b) in zip(right, wrong, strict=True):
        assert b == pytest.approx(a, rel=0.02)


def test_linking_leaves_the_traces_as_they_are(tmp_path: Path) -> None:
    traces = [read_trace(small().write(tmp_path / "made.json"))]
    assert link_traces(traces) == link_traces(traces)
