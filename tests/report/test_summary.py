"""The numbers told of a timeline, worked out by hand, and the laws they obey."""

from __future__ import annotations

import json
import random
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from told_timelines import GIB, MS, Sketch, collective, out_of_memory, random_timelines, two_ranks, two_ranks_measured

from sim.errors import UserError
from sim.report import summary as told
from sim.report.steps import Splitter, rank_views
from sim.report.summarize import summarize
from sim.report.summary import Breakdown
from sim.timeline import Step, Timeline


def test_a_step_of_the_job_is_the_slowest_ranks() -> None:
    s = summarize(two_ranks())
    # Step 3: 10 ms on rank 0, 12 on rank 1.  Step 4: 14 on rank 0, 10 on rank 1.
    assert s.steps_ms == (12.0, 14.0)
    assert s.step_ms == 13.0
    assert [(row.name, row.rank) for row in s.per_step] == [("ProfilerStep#3", 1), ("ProfilerStep#4", 0)]


def test_steps_of_ranks_meet_by_number_even_where_one_rank_records_later() -> None:
    s = Sketch(2)
    s.step(0, 5, 0, 10)
    s.step(0, 6, 10, 20)
    s.step(1, 6, 10, 23)
    s.step(1, 7, 23, 30)
    # Step 5: rank 0 alone, 10.  Step 6: 10 and 13.  Step 7: rank 1 alone, 7.
    assert summarize(s.timeline()).steps_ms == (10.0, 13.0, 7.0)


def test_a_receive_that_only_waits_is_told_apart() -> None:
    s = Sketch(1)
    s.step(0, 0, 0, 20)
    s.work(0, 0, 4, "gemm")
    # Received from 3 on: alone on the device in [4, 11), of which the last 2 ms move data; then a collective waits.
    s.work(0, 3, 11, "recv", "communication", collective=collective("recv"), transfer=2, source="roofline")
    s.work(0, 12, 17, "all", "communication", collective=collective(), transfer=1, source="roofline")
    # Another receive, beside a send that moves data in [17, 18): what waits in [18, 19) does so alone.
    s.work(0, 17, 19, "recv", "communication", collective=collective("recv"), source="roofline")
    s.work(0, 17, 18, "send", "communication", collective=collective("send"), transfer=1, source="roofline")
    # Of a measured one it is not known how long it waited.
    s.work(0, 19, 20, "recv", "communication", collective=collective("recv"), source="measured")
    (rank,) = summarize(s.timeline()).ranks
    assert rank.waiting_ms == 5 + 1
    assert rank.breakdown_ms == Breakdown(4.0, 7.0 + 5 + 2 + 1, 0.0, 1.0)


def test_device_work_belongs_to_the_step_that_launched_it() -> None:
    s = summarize(two_ranks())
    # Rank 0: gemm 4 + all_reduce 5 + memcpy 1 + old 1 + gelu 2 (launched in step 3, runs in 4) + gemm 7
    # + relu 1 (launched in step 4, runs after it) = 21 over 2 steps.  Rank 1: 4 + 4 + 1 + 2 = 11.
    assert s.kernel_ms == 21 / 2
    assert [rank.kernel_ms for rank in s.ranks] == [10.5, 5.5]


def test_a_host_that_does_not_wait_is_told() -> None:
    # Two steps of 10 ms launch 12 and 13 ms of device work, side by side for 1 ms: 24 ms in 20, or 12 a step.
    s = Sketch(1)
    s.step(0, 0, 0, 10)
    s.step(0, 1, 10, 20)
    s.work(0, 1, 13, "gemm", launch=s.call(0, 0, 1))
    s.work(0, 12, 25, "copy", "memcpy", launch=s.call(0, 10, 11))
    (warning,) = summarize(s.timeline()).warnings
    assert "does not wait" in warning and "12.00 ms" in warning


def test_a_host_that_runs_a_little_ahead_is_not() -> None:
    s = Sketch(1)
    s.step(0, 0, 0, 10)
    s.work(0, 1, 11, "gemm", launch=s.call(0, 0, 1))
    assert summarize(s.timeline()).warnings == ()


def test_work_that_no_step_launched_belongs_to_none() -> None:
    s = Sketch(1)
    s.step(0, 0, 10, 20)
    s.work(0, 12, 14, "warm-up", launch=s.call(0, 5, 6))  # runs in the step, launched before it
    s.work(0, 15, 18, "unknown launch")
    s.work(0, 20, 21, "unknown launch, after the end")
    told_of = summarize(s.timeline())
    assert told_of.kernel_ms == 3.0
    # What runs in the window still divides the window: [12, 14) and [15, 18).
    assert told_of.breakdown_ms == Breakdown(5.0, 0.0, 0.0, 5.0)


def test_breakdown_divides_the_slowest_ranks_windows() -> None:
    s = summarize(two_ranks())
    # Step 3 on rank 1, [0, 12): gemm [2, 6) 4; all_reduce [4, 8) alone in [6, 8) 2; memset [8, 9) 1; idle 5.
    assert s.per_step[0].breakdown_ms == Breakdown(4.0, 2.0, 1.0, 5.0)
    # Step 4 on rank 0, [10, 24): gelu and gemm [11, 20) 9; idle 5.
    assert s.per_step[1].breakdown_ms == Breakdown(9.0, 0.0, 0.0, 5.0)
    assert s.breakdown_ms == Breakdown(6.5, 1.0, 0.5, 5.0)
    assert s.breakdown_ms.total == s.step_ms == 13.0


def test_a_copy_under_communication_is_not_exposed() -> None:
    rank = summarize(two_ranks()).ranks[0]
    # Step 3 on rank 0, [0, 10): compute [1, 5) and [6, 7) 5; all_reduce [3, 8) alone in [5, 6) and [7, 8) 2; the
    # memcpy [5, 6) runs under it; idle [0, 1) and [8, 10) 3.  Step 4 as above: 9, 0, 0, 5.
    assert rank.breakdown_ms == Breakdown(7.0, 1.0, 0.0, 4.0)
    assert rank.step_ms == 12.0
    assert rank.busy_ms == (7 + 9) / 2


def test_host_time_is_the_recorded_calls_of_the_slowest_rank() -> None:
    # Step 3 on rank 1: three calls of 1 ms.  Step 4 on rank 0: calls at [10, 11) and [20, 21).
    assert [row.host_ms for row in summarize(two_ranks()).per_step] == [3.0, 2.0]
    assert summarize(two_ranks()).host_ms == 2.5


def test_measured_steps_stand_beside_the_predicted_ones() -> None:
    s = summarize(two_ranks(), two_ranks_measured())
    # Slowest of 11 and 10, of 16 and 15.
    assert s.measured_steps_ms == (11.0, 16.0)
    assert s.measured_step_ms == 13.5
    assert s.step_error == pytest.approx(13 / 13.5 - 1)
    assert [row.error for row in s.per_step] == [pytest.approx(12 / 11 - 1), pytest.approx(14 / 16 - 1)]
    assert [rank.measured_step_ms for rank in s.ranks] == [13.5, 12.5]
    assert s.warnings == ("1 op has no formula", "a launch is missing")


def test_a_measured_trace_without_marks_is_no_step() -> None:
    whole = Sketch(1).timeline(origin="measured", steps=(Step(0, 0, "trace", 0, 7 * MS),))
    s = summarize(two_ranks(), whole)
    assert (s.measured_step_ms, s.measured_steps_ms, s.measured_trace_ms) == (None, None, 7.0)
    assert s.step_error is None
    assert all(rank.measured_step_ms is None for rank in s.ranks)


def test_collectives_are_told_of_the_busiest_rank_that_takes_part() -> None:
    s = Sketch(2)
    s.step(0, 0, 0, 100)
    s.step(1, 0, 0, 100)
    for seq, (start, end) in enumerate([(0, 5), (5, 9)]):
        s.work(0, start, end, "ar", "communication", collective=collective(seq=seq), transfer=2)
    s.work(0, 20, 60, "gemm")
    s.work(1, 0, 30, "ar", "communication", collective=collective(), transfer=2)
    s.work(1, 30, 31, "send", "communication", collective=collective("send", 8), transfer=1)
    s.work(1, 31, 33, "send", "communication", collective=collective("send", 8, 1), transfer=1)
    rows = summarize(s.timeline()).collectives
    # Rank 0 is the busiest (49 ms against 33): two all_reduces of 5 and 4 ms.  It sends nothing; rank 1 sends twice.
    assert [(r.kind, r.bytes, r.ranks, r.algorithm, r.protocol) for r in rows] == [
        ("all_reduce", 1 << 20, 2, "ring", "simple"),
        ("send", 8, 2, "ring", "simple"),
    ]
    assert [(r.count, r.total_ms, r.transfer_ms) for r in rows] == [(2, 9.0, 4.0), (2, 3.0, 2.0)]


def test_where_durations_came_from_counts_all_ranks() -> None:
    # Rank 0: gemm, memcpy, old, relu measured; all_reduce roofline; gelu estimate; gemm profile.
    # Rank 1: gemm, memset measured; all_reduce roofline; gemm profile.
    assert summarize(two_ranks()).durations_from == told.DurationsFrom(measured=6, profile=2, roofline=2, estimate=1)


def test_top_ops_of_the_busiest_rank() -> None:
    top = summarize(two_ranks()).top_ops
    # Of 21 ms: gemm 4 + 7, all_reduce 5, gelu 2, then of 1 ms each in order of name.
    assert [(row.name, row.count, row.total_ms) for row in top] == [
        ("gemm", 2, 11.0), ("ncclDevKernel_AllReduce", 1, 5.0), ("gelu", 1, 2.0),
        ("Memcpy DtoD (Device -> Device)", 1, 1.0), ("old", 1, 1.0), ("relu", 1, 1.0),
    ]  # fmt: skip
    assert top[0].share == 11 / 21


def test_peaks_are_the_largest_over_the_ranks() -> None:
    s = summarize(two_ranks())
    assert (s.peak_allocated_bytes, s.peak_reserved_bytes) == (5 * GIB, 6 * GIB)
    assert [r.peak_allocated_bytes for r in s.ranks] == [5 * GIB, 3 * GIB]
    assert s.memory_peaks[0].by_category == {"activation": 4 * GIB, "parameter": GIB}
    assert not s.out_of_memory


def test_without_memory_events_nothing_is_claimed_of_memory() -> None:
    s = summarize(two_ranks_measured())
    assert (s.peak_allocated_bytes, s.peak_reserved_bytes) == (None, None)


def test_out_of_memory_says_by_how_much_even_where_no_step_was_finished() -> None:
    s = summarize(out_of_memory())
    assert s.out_of_memory
    # 23 GiB reserved + 3 GiB asked - 24 GiB there are = 2 GiB short.
    assert s.out_of_memory_at[0].short_bytes == 2 * GIB
    # No step: the whole run, 0 to the end of the last span at 5 ms, is told as one.
    assert s.steps_ms == (5.0,)
    assert s.warnings == ("no step is marked: the whole run is told as one step",)


def test_a_run_on_the_cpu_is_told_the_same_way() -> None:
    s = Sketch(1)
    s.step(0, 0, 0, 10)
    s.spans.append(msgspec.structs.replace(_host_span(s, 1, 4), kind="compute", name="aten::mm"))
    s.spans.append(msgspec.structs.replace(_host_span(s, 4, 6), kind="communication", name="gloo:all_reduce"))
    # On the thread: 3 ms of compute, 2 ms of communication, 5 ms of neither.
    assert summarize(s.timeline()).breakdown_ms == Breakdown(3.0, 2.0, 0.0, 5.0)


def _host_span(sketch: Sketch, start: float, end: float):  # type: ignore[no-untyped-def]
    sketch.call(0, start, end)
    return sketch.spans.pop()


def test_json_has_the_keys_that_are_promised() -> None:
    obj = json.loads(told.encode(summarize(two_ranks(), two_ranks_measured(), ops=123, replay_seconds=0.5)))
    promised = {
        "step_ms", "steps_ms", "kernel_ms", "peak_allocated_bytes", "peak_reserved_bytes", "out_of_memory",
        "measured_step_ms", "measured_steps_ms", "breakdown_ms", "ranks", "collectives", "durations_from", "ops",
        "replay_seconds", "warnings",
    }  # fmt: skip
    assert promised <= set(obj)
    assert list(obj["breakdown_ms"]) == ["compute", "exposed_communication", "exposed_memcpy", "idle"]
    assert {
        "rank", "device", "step_ms", "busy_ms", "peak_allocated_bytes", "peak_reserved_bytes",
    } <= set(obj["ranks"][0])  # fmt: skip
    assert {"kind", "bytes", "ranks", "algorithm", "protocol", "count", "total_ms"} <= set(obj["collectives"][0])
    assert set(obj["durations_from"]) == {"measured", "profile", "roofline", "estimate"}
    assert (obj["ops"], obj["replay_seconds"]) == (123, 0.5)


def test_json_round_trip_and_file(tmp_path: Path) -> None:
    s = summarize(two_ranks(), two_ranks_measured())
    assert told.decode(told.encode(s)) == s
    told.write(s, tmp_path / "s.json")
    assert (tmp_path / "s.json").read_bytes() == told.encode(s)
    with pytest.raises(UserError, match="not a summary"):
        told.decode(b'{"step_ms": "long"}')


def test_nothing_to_tell_is_said() -> None:
    with pytest.raises(UserError, match="without ranks"):
        summarize(Timeline("empty", "measured", (), (), (), ()))


@given(random_timelines(ranks=2))
@settings(deadline=None)
def test_laws(timeline: Timeline) -> None:
    s = summarize(timeline)
    s.check()
    for view, rank in zip(rank_views(timeline), s.ranks, strict=True):
        splitter = Splitter(view)
        for step in view.steps:
            split = splitter.split(step.start_ns, step.end_ns)
            # Exact in integers, and no part is negative.
            assert split.busy + split.idle == step.duration_ns
            assert min(split.compute, split.exposed_communication, split.exposed_memcpy, split.idle) >= 0
        assert rank.busy_ms <= rank.step_ms
    assert sum(msgspec.structs.astuple(s.durations_from)) == sum(span.kind != "host" for span in timeline.spans)


@given(random_timelines(ranks=2), st.integers(0, 2**32))
@settings(deadline=None)
def test_the_order_of_spans_does_not_matter(timeline: Timeline, seed: int) -> None:
    order = list(range(len(timeline.spans)))
    random.Random(seed).shuffle(order)
    place = {old: new for new, old in enumerate(order)}
    spans = tuple(
        msgspec.structs.replace(timeline.spans[old], launch=place.get(timeline.spans[old].launch, -1)) for old in order
    )
    assert summarize(msgspec.structs.replace(timeline, spans=spans)) == summarize(timeline)


@given(random_timelines(ranks=1))
@settings(deadline=None)
def test_twice_as_slow_takes_twice_as_long(timeline: Timeline) -> None:
    """Stretching all times by two doubles every part."""
    spans = tuple(
        msgspec.structs.replace(s, start_ns=2 * s.start_ns, duration_ns=2 * s.duration_ns) for s in timeline.spans
    )
    steps = tuple(msgspec.structs.replace(s, start_ns=2 * s.start_ns, end_ns=2 * s.end_ns) for s in timeline.steps)
    once, twice = summarize(timeline), summarize(msgspec.structs.replace(timeline, spans=spans, steps=steps))
    assert twice.breakdown_ms.compute == 2 * once.breakdown_ms.compute
    assert twice.step_ms == 2 * once.step_ms
    assert twice.kernel_ms == 2 * once.kernel_ms
