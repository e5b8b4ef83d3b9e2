"""Ranges: draws that are the intervals they are made from, steps they lead to, and the ledger of doubt."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

import sim
from sim.graph import OpGraph
from sim.place.placement import NONE, Doubts, Interval, Part, Placement, RankDoubt, Source
from sim.replay.engine import run
from sim.replay.replay import timeline_of
from sim.whatif.ranges import LOW, Ranges, factors_of, normal_draws, quantile, ranges
from tests.whatif.layers import layered

PRODUCTS, LINKS = Source("products", "calibrate"), Source("links", "calibrate --links")


def drawn(placement: Placement, samples: int = 64, *, folding: bool = True) -> Ranges:
    replayed = run(placement, folding=folding)
    return ranges(replayed, timeline_of(replayed), samples)


def in_doubt(graph: OpGraph, kernel: Interval | None, collective: Interval | None) -> Placement:
    """The layers on one or several GPUs, with these doubts alone."""
    placement = sim.place(graph, sim.load_topology("a5000x8"))
    kinds, of = [], {}
    for name, source, interval in (("Kernel", PRODUCTS, kernel), ("Collective", LINKS, collective)):
        if interval is not None:
            of[name] = len(kinds)
            kinds.append((Part(source, interval, name),))
    ops = graph.programs[0].ops
    rank = RankDoubt(tuple(of.get(type(op).__name__, NONE) for op in ops), NONE, NONE)
    doubts = Doubts(tuple(kinds), {r.rank: rank for r in placement.ranks})
    return msgspec.structs.replace(placement, doubts=doubts)


def test_draws_are_the_strata_each_once_and_the_same_again() -> None:
    # Two draws: the quantiles 1/4 and 3/4 of the normal distribution, 0.6745 from its middle.
    assert sorted(normal_draws("a", 2)) == pytest.approx([-0.6745, 0.6745], abs=1e-4)
    assert normal_draws("a", 64) == normal_draws("a", 64) != normal_draws("b", 64)
    assert sorted(normal_draws("a", 64)) == sorted(normal_draws("b", 64))


@pytest.mark.parametrize("interval", [Interval(0.8, 1.1, 1.0), Interval(0.8, 1.1, 0.3), Interval(1.05, 1.3, 0.0)])
def test_factors_have_the_interval_they_are_made_from(interval: Interval) -> None:
    factors = factors_of(Part(PRODUCTS, interval, "a"), 1000)
    assert quantile(factors, 0.1) == pytest.approx(interval.p10, rel=0.02)
    assert quantile(factors, 0.9) == pytest.approx(interval.p90, rel=0.02)


def test_a_step_of_kernels_alone_has_their_interval() -> None:
    # 48 kernels of 10 ms, all with one and the same error: 480 ms x 0.9 to 480 ms x 1.2.
    told = drawn(in_doubt(layered(1, nbytes=0), Interval(0.9, 1.2, 1.0), None))
    assert quantile(told.step_ms, 0.1) == pytest.approx(432, rel=0.01)
    assert quantile(told.step_ms, 0.9) == pytest.approx(576, rel=0.01)
    assert told.kernel_ms == pytest.approx(told.step_ms)
    assert told.doubt == (msgspec.structs.replace(told.doubt[0], source="products", share=1.0, cure="calibrate"),)


def test_hidden_transfers_carry_no_doubt() -> None:
    """An all-reduce of a kilobyte beside each 10 ms kernel: only the last one counts, if at all."""
    told = drawn(in_doubt(layered(2, nbytes=1024), Interval(0.9, 1.1, 1.0), Interval(0.5, 2.0, 1.0)))
    assert [row.source for row in told.doubt] == ["products"]


def test_the_ledger_names_what_the_step_waits_for() -> None:
    told = drawn(
        in_doubt(layered(8, forward_ms=1.0, backward_ms=1.0), Interval(0.9, 1.1, 1.0), Interval(0.9, 1.1, 1.0))
    )
    assert told.doubt[0].source == "links" and told.doubt[0].share > 0.9


def test_ranks_that_are_alike_are_in_doubt_alike() -> None:
    placement = in_doubt(layered(8), Interval(0.9, 1.1, 1.0), Interval(0.9, 1.1, 0.5))
    assert drawn(placement) == drawn(placement, folding=False)


def test_nothing_in_doubt_is_a_point() -> None:
    placement = msgspec.structs.replace(sim.place(layered(1), sim.load_topology("a5000x1")), doubts=Doubts())
    summary = sim.summarize(sim.replay(placement))
    told = drawn(placement).on(summary)
    assert told.step_ms_p10 == told.step_ms == told.step_ms_p90
    assert told.kernel_ms_p10 == told.kernel_ms == told.kernel_ms_p90 and told.doubt == ()


def test_more_draws_move_the_ends_little_and_the_same_draws_not_at_all(root: Path) -> None:
    placement = sim.place(
        sim.read(root / "traces" / "seed" / "clm-60m-x1.workload.json.gz").graph, sim.load_topology("a5000x1")
    )
    ends = [quantile(drawn(placement, samples).step_ms, LOW) for samples in (64, 64, 512)]
    assert ends[0] == ends[1] == pytest.approx(ends[2], rel=0.02)


def test_quantiles_lie_between_the_values_beside_them() -> None:
    # Of 0, 1, 2, 3, 4 the tenth percentile is at place 0.4, the ninetieth at 3.6.
    assert [quantile([3, 0, 4, 1, 2], share) for share in (0.0, 0.1, 0.5, 0.9, 1.0)] == [0, 0.4, 2, 3.6, 4]
    assert quantile([7.0], 0.9) == 7.0
    assert all(a <= b for a, b in pairwise(quantile(normal_draws("x", 20), s / 10) for s in range(11)))
