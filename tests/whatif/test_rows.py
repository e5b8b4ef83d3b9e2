"""What-if rows: what a change does, where the milliseconds went, and why nothing changed where nothing did."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.errors import UserError
from sim.graph import OpGraph
from sim.ops import HostCall, Kernel
from sim.replay import engine
from sim.replay.folding import unfolded
from sim.report import variants_text
from sim.report.variants import LedgerLine, Variant, WhatIf
from sim.whatif import vary
from sim.whatif.rows import what_if
from tests.whatif.layers import layered, ring_machine

RING = "links.ring.bandwidth_gb_s"
GIB_S = (1 << 30) / 1e9


def tried(graph: OpGraph, topology: Path | str, *varied: str, settings: dict[str, str] | None = None) -> WhatIf:
    given = vary.parse(varied)
    base = vary.base_machine(str(topology), settings or {}, given)
    return what_if(graph, base, vary.machines(str(topology), settings or {}, given)).told


def line(row: Variant, part: str) -> LedgerLine:
    (found,) = (each for each in row.ledger if each.part == part)
    return found


def test_where_the_milliseconds_went(tmp_path: Path) -> None:
    # See test_closed_form: at 12 GiB/s the first backward kernel (ends at 250 ms) is followed by 24 all-reduces of
    # 14.3115 ms back to back: path = 250 compute + 343.477 communication.  At 24 GiB/s an all-reduce takes 7.1908 ms
    # and only the last is on the path: 480 compute + 7.1908 communication, 23 all-reduces have left.
    (row,) = tried(layered(8), ring_machine(tmp_path, 8), f"{RING}={24 * GIB_S}").rows
    communication, compute = line(row, "communication"), line(row, "compute")
    assert (communication.base_ms, communication.ms) == (
        pytest.approx(343.477, rel=1e-5),
        pytest.approx(7.1908, rel=1e-4),
    )
    assert (communication.base_count, communication.count, communication.of) == (24, 1, 24)
    assert (compute.base_ms, compute.ms) == (250, 480)
    assert row.speedup == pytest.approx(593.477 / 487.1908, rel=1e-5)
    assert row.unchanged_because is None
    assert (row.bound_by.part, row.bound_by.op) == ("compute", "backward")


def test_a_ledger_of_folded_ranks_is_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = (layered(8, layers=3), "a5000x8", "links.pcie.bandwidth_gb_s=8,64")
    folded = tried(*asked)
    monkeypatch.setattr(engine, "fold", lambda placement, **_: unfolded(placement))
    assert tried(*asked) == folded


def test_the_next_bottleneck_is_what_decides_when_the_first_is_gone(tmp_path: Path) -> None:
    # Twice as slow as in the closed form: all-reduces of 14 x (2.0345 + 0.005) = 28.553 ms, 685.3 of 935.3 ms.  Were
    # they free, 480 ms of compute would be left.
    told = tried(layered(8), ring_machine(tmp_path, 8), f"{RING}={6 * GIB_S}")
    (row,) = told.rows
    assert row.bound_by.part == "communication"
    assert row.next_bottleneck is not None
    assert row.next_bottleneck.without == "communication"
    assert row.next_bottleneck.step_ms == pytest.approx(480)
    assert row.next_bottleneck.bound_by.part == "compute"


def test_a_host_that_launches_too_slowly_is_the_bottleneck(tmp_path: Path) -> None:
    # 48 launches of 30 ms one after another, kernels of 10 ms beside them: the thread decides (1.44 s), and the last
    # kernel, launched at the beginning of the last call, is done before that call returns.
    (row,) = tried(layered(2, launch_ns=30_000_000), ring_machine(tmp_path, 2), f"{RING}={24 * GIB_S}").rows
    assert row.step_ms == pytest.approx(48 * 30)
    assert row.bound_by.part == "host"
    assert row.unchanged_because is not None
    assert "24 all_reduce 100.00 MiB take" in row.unchanged_because
    assert row.unchanged_because.endswith(
        "but none of it is on the critical path: the host decides the step (100 % of its critical path)"
    )


# Why nothing changed ------------------------------------------------------------------------------------------------


def test_a_link_that_nothing_crosses(tmp_path: Path) -> None:
    (row,) = tried(layered(8), ring_machine(tmp_path, 8), "links.host.bandwidth_gb_s=48").rows
    assert row.speedup == 1
    assert row.unchanged_because == "no ring of the collectives and no copy crosses a host link; they cross ring links"


def test_a_workload_that_crosses_no_link(tmp_path: Path) -> None:
    (row,) = tried(layered(1), ring_machine(tmp_path, 2), f"{RING}=48").rows
    assert row.unchanged_because is not None and "nothing of this workload crosses a link" in row.unchanged_because


def test_a_link_that_is_crossed_but_bounds_nothing() -> None:
    told = tried(layered(8), "a5000x8", "links.socket.bandwidth_gb_s=80")
    assert (
        told.rows[0].unchanged_because
        == "socket links are crossed, but pcie links bound every transfer that crosses them"
    )


def test_memory_decides_what_fits_alone(tmp_path: Path) -> None:
    (row,) = tried(layered(8), ring_machine(tmp_path, 8), "devices.memory_gib=48").rows
    assert row.unchanged_because is not None and "decides only what fits" in row.unchanged_because


def test_the_value_of_the_base_is_the_base(tmp_path: Path) -> None:
    told = tried(layered(8), ring_machine(tmp_path, 8), f"{RING}=30,60", settings={RING: "30"})
    assert told.base.values == {RING: 30}
    assert told.rows[0].unchanged_because == "this is the base"
    assert told.rows[1].unchanged_because is None


def test_communication_behind_compute_is_not_felt(tmp_path: Path) -> None:
    # Both 8 and 9 times the bandwidth hide all but the last all-reduce; the step still changes by the last one.
    # A message of 1 byte instead: 14 hops of 5 us each way, the same for every bandwidth but for nanoseconds.
    told = tried(
        layered(8, nbytes=1 << 20, backward_ms=20), ring_machine(tmp_path, 8), f"{RING}=100", settings={RING: "90"}
    )
    (row,) = told.rows
    # 1 MiB: 14 x (131072 B / 90 GB/s) = 20.4 us against 18.4 us; 2 us of 720 ms are no change.
    assert row.unchanged_because is not None
    assert "only 2.04 us a step of it is on the critical path: compute decides the step" in row.unchanged_because


def test_calls_behind_compute_are_told_once_and_felt_where_the_first_kernel_waits(tmp_path: Path) -> None:
    # Eight calls of op_us each launch eight kernels: 5 us less a call are 40 us less, of which the step of 80 ms
    # feels the first call's alone.  The kernels begin so much sooner after their calls began, and wait for each other.
    graph = layered(1, layers=4, nbytes=0)
    ops = tuple(
        msgspec.structs.replace(op, measured_ns=None) if isinstance(op, HostCall) and op.name.startswith("launch")
        else msgspec.structs.replace(op, lag_ns=None) if isinstance(op, Kernel) else op
        for op in graph.programs[0].ops
    )  # fmt: skip
    unmeasured = msgspec.structs.replace(graph, programs=(msgspec.structs.replace(graph.programs[0], ops=ops),))
    (row,) = tried(unmeasured, ring_machine(tmp_path, 2), "host.op_us=10").rows
    assert row.unchanged_because is not None
    assert "4 launch backward and 4 launch forward take 40.00 us less a rank" in row.unchanged_because
    assert "only 5.00 us a step of it is on the critical path: compute decides the step" in row.unchanged_because


# Laws ---------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.floats(0.5, 200), min_size=1, max_size=2, unique=True),
    st.floats(0.1, 20), st.integers(0, 40_000_000), st.integers(0, 3_000_000),
)  # fmt: skip
def test_ledgers_add_up(
    tmp_path_factory: pytest.TempPathFactory, rates: list[float], ms: float, nbytes: int, launch: int
) -> None:
    """``what_if`` checks that every critical path adds up to its step and every ledger to the change."""
    machine = ring_machine(tmp_path_factory.mktemp("ring"), 4)
    graph = layered(4, layers=3, backward_ms=ms, nbytes=nbytes, launch_ns=launch)
    told = tried(graph, machine, f"{RING}={','.join(map(str, rates))}")
    for row in told.rows:
        # "Change nothing" is said exactly where the step changes by less than a table shows.
        same = abs(row.step_ms - told.base.step_ms) <= 0.0005 * told.base.step_ms
        assert (row.unchanged_because is not None) == same


# What is asked for --------------------------------------------------------------------------------------------------


def test_every_combination_in_the_order_given(tmp_path: Path) -> None:
    given = vary.parse(["host.op_us=1,2", f"{RING}=10,20"])
    values = [tuple(made.values.values()) for made in vary.machines(str(ring_machine(tmp_path, 2)), {}, given)]
    assert values == [(1, 10), (1, 20), (2, 10), (2, 20)]


def test_whole_topologies() -> None:
    given = vary.parse(["topology=a5000x2,a5000x2-bridged"])
    made = vary.machines("a5000x8", {}, given)
    assert [each.machine.name for each in made] == ["a5000x2", "a5000x2-bridged"]
    assert vary.base_machine("a5000x8", {}, given).values == {"topology": "a5000x8"}


def test_a_path_that_only_another_topology_has() -> None:
    given = vary.parse(["topology=a5000x2-bridged", "links.bridge.bandwidth_gb_s=40"])
    assert vary.base_machine("a5000x2", {}, given).values["links.bridge.bandwidth_gb_s"] is None


def test_a_list_is_one_value_and_told_as_it_is_typed() -> None:
    given = vary.parse(["links.pcie.between=[[gpu,cpu0]],[[gpu, cpu]]"])
    assert given[0].values == ("[[gpu,cpu0]]", "[[gpu, cpu]]")
    told = [made.values for made in vary.machines("a5000x8", {}, given)]
    assert variants_text.value_text(True) == "true"
    assert told == [{"links.pcie.between": "[[gpu, cpu0]]"}, vary.base_machine("a5000x8", {}, given).values]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("links.pcie.bandwidth_gb_s", "no values; write PATH=V1,V2"),
        ("links.pcie.bandwidth_gb_s=", "no values; write PATH=V1,V2"),
        ("=8", "no values"),
        ("links.pcie.bandwidth_gb_s=8,,16", "a value is empty"),
    ],
)
def test_what_is_no_list_of_values(given: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        vary.parse([given])


def test_too_much_at_once() -> None:
    numbers = ",".join(map(str, range(1, 101)))
    with pytest.raises(UserError, match="1100 combinations"):
        vary.parse([f"a={numbers}", "b=1,2,3,4,5,6,7,8,9,10,11"])
    with pytest.raises(UserError, match="is there twice"):
        vary.parse(["a=1", "a=2"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("links.pcy.bandwidth_gb_s=8", "did you mean 'links.pcie.bandwidth_gb_s'"),
        ("links.pcie.bandwidth_gb_s=0", "links.pcie.bandwidth_gb_s: must be > 0, found 0"),
        ("links.pcie.bandwidth_gb_s=fast", "links.pcie.bandwidth_gb_s: must be a number, found 'fast'"),
        ("topology=a5000x9", "unknown topology 'a5000x9'"),
    ],
)
def test_paths_and_values_that_cannot_be(given: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        vary.machines("a5000x8", {}, vary.parse([given]))
