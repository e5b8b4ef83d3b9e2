"""The event loop: its rules one by one, its laws on random programs."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.errors import DeadlockError, UserError
from sim.ops import Alloc, Collective, Copy, Free, HostCall, Kernel, Mark, Op
from tests.programs import COMM, MAIN, STREAM, replayed, span


def call(name: str, ns: int, *, before: int = 0, waits: tuple[int, ...] = (), after: tuple[int, ...] = ()) -> HostCall:
    return HostCall(lane=MAIN, name=name, measured_ns=ns, before_ns=before, waits=waits, after=after)


def kernel(name: str, ns: int, launch: int, *, lag: int = 0, gap: int = 0, after: tuple[int, ...] = ()) -> Kernel:
    return Kernel(lane=STREAM, name=name, measured_ns=ns, launch=launch, lag_ns=lag, gap_ns=gap, after=after)


def all_reduce(ns: int, seq: int = 0, launch: int | None = None, nbytes: int = 64, **more: int) -> Collective:
    return Collective(
        lane=COMM, name="all_reduce", measured_ns=ns, launch=launch, group="dp", seq=seq, bytes=nbytes, **more
    )


def test_a_kernel_waits_for_its_launch_and_for_its_stream() -> None:
    # a: launched at 0, lag 5 -> [5, 105). b: its call starts at 10, so it could start at 15, but the stream is free
    # at 105, and it needs 3 to turn around -> [108, 118). c: the call starts at 30 + 500 -> [535, 545).
    ops = [
        call("la", 10), kernel("a", 100, 0, lag=5),
        call("lb", 20), kernel("b", 10, 2, lag=5, gap=3),
        call("lc", 1, before=500), kernel("c", 10, 4, lag=5, gap=3),
    ]  # fmt: skip
    timeline = replayed(ops)
    assert [(s.start_ns, s.end_ns) for s in (span(timeline, n) for n in "abc")] == [(5, 105), (108, 118), (535, 545)]


def test_a_synchronizing_call_ends_after_the_device() -> None:
    # The kernel runs [7, 107); the call starts at 10 and returns 4 after the kernel's end: [10, 111).
    timeline = replayed([call("launch", 10), kernel("k", 100, 0, lag=7), call("sync", 4, waits=(1,))])
    assert (span(timeline, "sync").start_ns, span(timeline, "sync").end_ns) == (10, 111)


def test_a_stream_waits_for_an_event_of_another() -> None:
    # The copy runs [0, 50) on the other stream; the kernel could start at 10 and waits for it, then turns around.
    copy = Copy(lane=COMM, name="copy", kind="h2d", bytes=1, measured_ns=50, launch=0)
    timeline = replayed([call("l0", 10), copy, call("l1", 10), kernel("k", 10, 2, gap=4, after=(1,))])
    assert span(timeline, "k").start_ns == 54


def test_a_thread_waits_for_another_operation_then_works_on() -> None:
    # `after` ends at 100 (launched at 0), then 7 of the thread's own work, then the call of 5: [107, 112).
    timeline = replayed([call("l", 1), kernel("k", 100, 0), call("next", 5, before=7, after=(1,))])
    assert (span(timeline, "next").start_ns, span(timeline, "next").end_ns) == (107, 112)


def test_a_collective_ends_on_all_ranks_after_the_last_arrival() -> None:
    # Rank 0 arrives at 10, rank 1 at 300; the transfer takes 40: both end at 340.
    early = [call("l", 5, before=10), all_reduce(40, launch=0)]
    late = [call("l", 5, before=300), all_reduce(40, launch=0)]
    timeline = replayed(early, late, groups={"dp": ((0, 1),)})
    zero, one = span(timeline, "all_reduce", 0), span(timeline, "all_reduce", 1)
    assert (zero.start_ns, one.start_ns) == (10, 300)
    assert zero.end_ns == one.end_ns == 340
    assert zero.transfer_ns == 40


def test_a_rank_that_is_not_there_is_not_waited_for() -> None:
    timeline = replayed([call("l", 5), all_reduce(40, launch=0)], groups={"dp": ((0, 1, 2),)})
    assert span(timeline, "all_reduce").duration_ns == 40


def test_a_deadlock_names_ranks_and_collectives() -> None:
    # Rank 0 enters the collectives of groups a and b in the order a, b; rank 1 in the order b, a.
    groups = {"a": ((0, 1),), "b": ((0, 1),)}

    def rank(first: str, second: str) -> list[Op]:
        return [Collective(lane=COMM, name=f"of {g}", measured_ns=1, group=g, seq=0, bytes=8) for g in (first, second)]

    with pytest.raises(DeadlockError) as error:
        replayed(rank("a", "b"), rank("b", "a"), groups=groups)
    assert "ranks 0 wait in all_reduce 0 of group 'a' (of a) for ranks 1" in str(error.value)
    assert "ranks 1 wait in all_reduce 0 of group 'b' (of b) for ranks 0" in str(error.value)


def sends_and_receives(*kinds: str) -> list[Op]:
    """What one rank does on the one stream of its pair: sends go over the group there, receives over the one back."""
    here = {"send": "0 to 1", "recv": "1 to 0"}
    return [
        Collective(lane=COMM, name=kind, measured_ns=1, kind=kind, group=here[kind], seq=kinds[:i].count(kind), bytes=8)  # type: ignore[arg-type]
        for i, kind in enumerate(kinds)
    ]


def test_two_ranks_that_both_send_first_wait_for_each_other() -> None:
    groups = {"0 to 1": ((0, 1),), "1 to 0": ((1, 0),)}
    there = [op for op in sends_and_receives("send", "recv") if isinstance(op, Collective)]
    swapped = [msgspec.structs.replace(op, group={"0 to 1": "1 to 0"}.get(op.group, "0 to 1")) for op in there]
    with pytest.raises(DeadlockError) as error:
        replayed(there, swapped, groups=groups)
    assert "ranks 0 wait in send 0 of group '0 to 1' (send) for ranks 1" in str(error.value)
    assert "ranks 1 wait in send 0 of group '1 to 0' (send) for ranks 0" in str(error.value)
    # Where one of them receives first, both get on: one nanosecond each way.
    assert span(replayed(there, swapped[::-1], groups=groups), "recv").end_ns == 2


def test_ranks_that_disagree_about_a_collective_are_named() -> None:
    with pytest.raises(UserError, match="64 bytes on rank 1 but all_reduce of 32 bytes on rank 0"):
        replayed([all_reduce(1, nbytes=32)], [all_reduce(1, nbytes=64)], groups={"dp": ((0, 1),)})


def test_steps_are_what_the_host_thread_sees() -> None:
    # The mark's own 10 before it, then the step: launch 5, the kernel [10 + 1, 111), the sync returns at 111.
    ops = [
        Mark(lane=MAIN, name="ProfilerStep#3", step=3, edge="begin", before_ns=10),
        call("l", 5), kernel("k", 100, 1, lag=1), call("sync", 0, waits=(2,)),
        Mark(lane=MAIN, name="ProfilerStep#3", step=3, edge="end"),
    ]  # fmt: skip
    (step,) = replayed(ops).steps
    assert (step.name, step.start_ns, step.end_ns) == ("ProfilerStep#3", 10, 111)


def test_memory_follows_the_host_clock() -> None:
    # 600 bytes take 1024 after rounding to 512; allocated at 10, freed at 15.
    ops = [
        Alloc(lane=MAIN, block=1, bytes=600, before_ns=10, category="activation", name="x"),
        Free(lane=MAIN, block=1, before_ns=5),
    ]
    timeline = replayed(ops)
    assert [(m.time_ns, m.allocated_bytes) for m in timeline.memory] == [(10, 1024), (15, 0)]
    assert timeline.peaks[0].by_category == {"activation": 1024}


# Laws on random programs ----------------------------------------------------------------------------------------


@st.composite
def programs(draw: st.DrawFn) -> list[Op]:
    """One rank: host calls, kernels and copies that refer backwards at random."""
    ops: list[Op] = []
    times = st.integers(0, 1000)
    for i in range(draw(st.integers(1, 40))):
        earlier = tuple(draw(st.lists(st.integers(0, i - 1), max_size=2, unique=True))) if i else ()
        hosts = [j for j, op in enumerate(ops) if isinstance(op, HostCall)]
        if hosts and draw(st.booleans()):
            lane = draw(st.sampled_from([STREAM, COMM]))
            ops.append(
                Kernel(
                    lane=lane,
                    name=f"k{i}",
                    measured_ns=draw(times),
                    launch=draw(st.sampled_from(hosts)),
                    lag_ns=draw(times),
                    gap_ns=draw(times),
                    after=earlier,
                )
            )
        else:
            waits = earlier if draw(st.booleans()) else ()
            ops.append(
                HostCall(
                    lane=MAIN,
                    name=f"h{i}",
                    measured_ns=draw(times),
                    before_ns=draw(times),
                    waits=waits,
                    after=() if waits else earlier,
                )
            )
    return ops


def scaled(ops: list[Op], factor: int) -> list[Op]:
    """Every duration times ``factor``."""
    times = ("measured_ns", "before_ns", "lag_ns", "gap_ns")
    return [
        msgspec.structs.replace(op, **{t: getattr(op, t) * factor for t in times if getattr(op, t, None)}) for op in ops
    ]


@given(programs())
def test_two_runs_are_equal(ops: list[Op]) -> None:
    assert replayed(ops) == replayed(ops)


@given(programs(), st.integers(2, 5))
def test_every_duration_times_n_makes_every_moment_times_n(ops: list[Op], factor: int) -> None:
    once, more = replayed(ops), replayed(scaled(ops, factor))
    assert [(s.start_ns * factor, s.end_ns * factor) for s in once.spans] == [
        (s.start_ns, s.end_ns) for s in more.spans
    ]


@given(programs())
def test_the_event_loop_does_what_the_rules_say(ops: list[Op]) -> None:
    """The rules of sim.ops again, as one pass over the list: references point backwards."""
    start: list[int] = []
    end: list[int] = []
    free = {MAIN: 0, STREAM: 0, COMM: 0}
    for op in ops:
        after = [end[i] for i in op.after]
        if isinstance(op, HostCall):
            begin = max([free[op.lane], *after]) + op.before_ns
            finish = max([begin, *(end[i] for i in op.waits)]) + (op.measured_ns or 0)
        else:
            assert isinstance(op, Kernel) and op.launch is not None
            begin = max(max([free[op.lane], *after]) + (op.gap_ns or 0), start[op.launch] + (op.lag_ns or 0))
            finish = begin + (op.measured_ns or 0)
        start.append(begin)
        end.append(finish)
        free[op.lane] = finish
    assert [(s.start_ns, s.end_ns) for s in replayed(ops).spans] == list(zip(start, end, strict=True))


@given(programs(), st.integers(2, 4))
def test_alike_ranks_without_communication_need_no_network(ops: list[Op], ranks: int) -> None:
    alone, together = replayed(ops), replayed(*[ops] * ranks)
    one = [(s.start_ns, s.end_ns) for s in alone.spans]
    assert [(s.start_ns, s.end_ns) for s in together.spans] == one * ranks
