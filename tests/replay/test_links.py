"""Links shared in time: the laws of max-min sharing, worked out by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st

from sim.place.placement import Flow
from sim.replay.links import Links, fair_rates


def flow(ns: int, **shares: float) -> Flow:
    return Flow(0, ns, tuple(sorted(shares.items())))


def ends(*timed: tuple[int, Flow]) -> list[int]:
    """When each of (start, flow) is over."""
    env = simpy.Environment()
    links = Links(env)
    over: dict[int, int] = {}

    def run(i: int, start: int, moved: Flow) -> Iterator[simpy.Event]:
        yield env.timeout(start)
        yield links.transfer(moved)
        over[i] = int(env.now)

    for i, (start, moved) in enumerate(timed):
        env.process(run(i, start, moved))
    env.run()
    return [over[i] for i in range(len(timed))]


def test_one_flow_alone_runs_at_its_own_rate() -> None:
    assert ends((5, flow(1000, a=1.0, b=0.3))) == [1005]


def test_two_equal_flows_on_one_lane_take_twice_as_long() -> None:
    assert ends((0, flow(1000, a=1.0)), (0, flow(1000, a=1.0))) == [2000, 2000]


def test_flows_that_share_nothing_do_not_feel_each_other() -> None:
    assert ends((0, flow(1000, a=1.0)), (0, flow(700, b=1.0))) == [1000, 700]


def test_an_end_moves_when_others_come_and_go() -> None:
    # First alone for 400 of its 1000; then both at half. The second needs 300: 600 ns at half, over at 1000. By then
    # the first has done 400 + 300; its last 300 run alone again: over at 1300.
    assert ends((0, flow(1000, a=1.0)), (400, flow(300, a=1.0))) == [1300, 1000]


def test_a_small_load_leaves_room() -> None:
    # The first needs a quarter of the lane at its full rate, the second all of it. Rates grow together until
    # 0.25 r + r = 1, r = 0.8: the lane is full, both stay at 0.8. The first is over at 1000 / 0.8 = 1250. The second
    # has 3000 - 1000 = 2000 left then and runs alone: over at 3250.
    assert ends((0, flow(1000, a=0.25)), (0, flow(3000, a=1.0))) == [1250, 3250]


def test_max_min_is_fair_to_the_flow_on_two_lanes() -> None:
    # The classical chain: one flow over both lanes, one on each; all get half, the long one is not starved.
    assert fair_rates([flow(1, a=1.0, b=1.0), flow(1, a=1.0), flow(1, b=1.0)]) == [0.5, 0.5, 0.5]
    # With two more on lane a it fills at a third; lane b's own flow takes what the long one leaves: two thirds.
    rates = fair_rates([flow(1, a=1.0, b=1.0), flow(1, a=1.0), flow(1, a=1.0), flow(1, b=1.0)])
    assert rates == pytest.approx([1 / 3, 1 / 3, 1 / 3, 2 / 3])


flows = st.lists(
    st.builds(
        lambda ns, shares: Flow(0, ns, tuple(sorted(shares.items()))),
        st.integers(1, 10_000),
        st.dictionaries(st.sampled_from("abcd"), st.floats(0.01, 1.0), min_size=1),
    ),
    min_size=1,
    max_size=6,
)


@given(flows)
def test_no_lane_is_more_than_full_and_every_flow_is_held_by_something(drawn: Sequence[Flow]) -> None:
    rates = fair_rates(drawn)
    used: dict[str, float] = {}
    for rate, moved in zip(rates, drawn, strict=True):
        for lane, share in moved.shares:
            used[lane] = used.get(lane, 0.0) + rate * share
    assert all(0 < rate <= 1 + 1e-9 for rate in rates)
    assert all(total <= 1 + 1e-6 for total in used.values())
    for rate, moved in zip(rates, drawn, strict=True):
        assert rate > 1 - 1e-6 or any(used[lane] > 1 - 1e-6 for lane, _ in moved.shares)


@given(st.lists(st.tuples(st.integers(0, 5000), flows.map(lambda drawn: drawn[0])), min_size=1, max_size=6))
def test_nobody_is_faster_than_alone_and_a_lane_does_no_more_than_its_time(timed: list[tuple[int, Flow]]) -> None:
    over = ends(*timed)
    assert all(end >= start + moved.transfer_ns for end, (start, moved) in zip(over, timed, strict=True))
    for lane in "abcd":
        work = sum(moved.transfer_ns * share for _, moved in timed for name, share in moved.shares if name == lane)
        begun = min(start for start, _ in timed)
        assert max(over) - begun >= work - 10


@given(st.lists(st.tuples(st.integers(0, 5000), flows.map(lambda drawn: drawn[0])), min_size=1, max_size=6))
def test_the_order_in_which_flows_are_named_does_not_matter(timed: list[tuple[int, Flow]]) -> None:
    assert sorted(ends(*timed)) == pytest.approx(sorted(ends(*reversed(timed))), abs=2)
