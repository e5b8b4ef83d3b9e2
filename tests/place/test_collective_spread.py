"""Which spread a plan gets: its host's own curve, bound by bytes, bound by latency."""

from __future__ import annotations

from sim.place import collective_spread as spreads
from sim.place.collective_spread import spread_of
from sim.place.collectives import plan
from sim.topology import load_topology
from sim.units import MIB


def test_bytes_and_latency_have_their_own_spread() -> None:
    machine = load_topology("dgx-a100")
    assert spread_of(plan(machine, "all_reduce", 256 * MIB, tuple(range(8)))) == spreads.BYTES_ELSEWHERE
    assert spread_of(plan(machine, "all_reduce", 1024, tuple(range(8)))) == spreads.BOUND_BY_LATENCY


def test_a_curve_measured_with_as_many_ranks_is_closest() -> None:
    machine = load_topology("a5000x8")
    assert spread_of(plan(machine, "all_reduce", 64 * MIB, tuple(range(8)))) == spreads.ON_ITS_OWN_CURVE
    assert spread_of(plan(machine, "all_reduce", 64 * MIB, (1, 2))) == spreads.CARRIED_OVER


def test_a_curve_over_changed_links_is_no_longer_measured() -> None:
    faster = load_topology("a5000x8", {"links.pcie.bandwidth_gb_s": 48})
    assert spread_of(plan(faster, "all_reduce", 64 * MIB, tuple(range(8)))) == spreads.CARRIED_OVER


def test_one_rank_takes_no_time_and_has_no_spread() -> None:
    assert spread_of(plan(load_topology("dgx-a100"), "all_reduce", MIB, (0,))) == (1.0, 1.0)
