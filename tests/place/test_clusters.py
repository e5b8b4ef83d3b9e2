"""Laws of collectives over clusters that nobody drew by hand: hosts, cards, NICs and networks of every shape."""

from __future__ import annotations

import math
import time
from functools import cache
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.place.collectives import CollectivePlan, plan
from sim.place.nccl_rings import Rings, find_rings
from sim.topology.build import build_machine
from sim.topology.machine import Machine
from sim.topology.schema import TopologyFile
from sim.units import MIB

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce", "all_to_all")
RING_SIMPLE = {"NCCL_ALGO": "Ring", "NCCL_PROTO": "Simple"}


class Cluster(NamedTuple):
    """What a cluster is made of; equal ones are the same machine."""

    hosts: int
    cards: int
    nics: int
    nvlink: str = "switch"
    switches: int = 0
    network: str = "one"
    profile: str = "a100-sxm4-80gb"
    nic_gb_s: float = 24.0

    def machine(self, **nccl: str) -> Machine:
        return _built(self, tuple(sorted(nccl.items())))


@cache
def _built(cluster: Cluster, nccl: tuple[tuple[str, str], ...]) -> Machine:
    return build_machine(TopologyFile.model_validate(_raw(cluster, dict(nccl))), "a test")


def _raw(c: Cluster, nccl: dict[str, str]) -> dict[str, Any]:
    nodes: list[dict[str, object]] = [{"id": "cpu", "kind": "cpu", "count": 2 if c.cards % 2 == 0 else 1}]
    links: dict[str, dict[str, object]] = {}
    under = "pcisw" if c.switches else "cpu"
    pcie = [["gpu", under]]
    if c.switches:
        nodes.append({"id": "pcisw", "kind": "pcie-switch", "count": c.switches})
        pcie.append(["pcisw", "cpu"])
    if c.cards % 2 == 0:
        links["smp"] = {"kind": "smp", "bandwidth_gb_s": 40, "between": [["cpu0", "cpu1"]]}
    if c.nvlink == "switch":
        nodes.append({"id": "nvswitch", "kind": "nvswitch"})
        links["nvlink"] = {"kind": "nvlink", "bandwidth_gb_s": 240, "between": [["gpu", "nvswitch"]]}
    elif c.nvlink == "pairs":
        ends = [[f"gpu{i}", f"gpu{i + 1}"] for i in range(0, c.cards - 1, 2)]
        links["nvlink"] = {"kind": "nvlink", "bandwidth_gb_s": 100, "between": ends}
    if c.nics:
        nodes.append({"id": "nic", "kind": "nic", "count": c.nics})
        pcie.append(["nic", under])
    links["pcie"] = {"kind": "pcie", "bandwidth_gb_s": 24, "latency_us": 0.5, "between": pcie}
    if c.hosts > 1:
        links["network"] = {"kind": "network", "bandwidth_gb_s": c.nic_gb_s, "between": _network(c, nodes)}
    return {
        "name": "cluster",
        "description": "generated",
        "source": "a test",
        "hosts": c.hosts,
        "devices": {"count": c.cards, "profile": c.profile},
        "nodes": nodes,
        "links": {name: {"source": "a test", "latency_us": 1.0, **link} for name, link in links.items()},
        "host": {"cpu_vendor": "amd"},
        "nccl": nccl,
    }


def _network(c: Cluster, nodes: list[dict[str, object]]) -> list[list[str]]:
    """Ends of the network's links; what they lead to is added to the nodes."""
    if not c.nics:
        nodes.append({"id": "switch", "kind": "network-switch", "shared": True})
        return [["cpu0", "switch"]]
    if c.network == "rails":
        nodes += [{"id": f"rail{i}", "kind": "network-switch", "shared": True} for i in range(c.nics)]
        return [[f"nic{i}", f"rail{i}"] for i in range(c.nics)]
    if c.network == "leaf-spine":  # a leaf a host, as many links up as down
        nodes += [{"id": "leaf", "kind": "network-switch"}]
        nodes += [{"id": f"spine{i}", "kind": "network-switch", "shared": True} for i in range(c.nics)]
        return [["nic", "leaf"], *([["leaf", f"spine{i}"] for i in range(c.nics)])]
    nodes.append({"id": "switch", "kind": "network-switch", "shared": True})
    return [["nic", "switch"]]


@st.composite
def clusters(draw: st.DrawFn, least_hosts: int = 1) -> Cluster:
    """Cards in even blocks, as a topology file deals them."""
    hosts = draw(st.integers(least_hosts, 4))
    cards = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    sockets = 2 if cards % 2 == 0 else 1
    switches = draw(st.sampled_from([0, *(n for n in range(1, cards + 1) if cards % n == 0 and n % sockets == 0)]))
    # NICs are dealt evenly to the CPUs or switches.
    ports = switches or sockets
    nics = draw(st.sampled_from([0, *(n for n in range(1, 9) if n % ports == 0 or ports % n == 0)]))
    nvlink = draw(st.sampled_from(["none", "switch", "pairs"] if cards > 1 else ["none"]))
    network = draw(st.sampled_from(["one", "rails", "leaf-spine"]))
    profile = draw(st.sampled_from(["a100-sxm4-80gb", "h100-sxm", "rtx-a5000", "rtx-4090"]))
    if network == "rails" and nvlink != "switch":
        network = "one"  # cards of different rails could not reach one another
    return Cluster(hosts, cards, nics, nvlink, switches, network, profile)


@st.composite
def groups(draw: st.DrawFn, cluster: Cluster) -> tuple[int, ...]:
    """All cards, or those of a tp, dp or pp group, or any."""
    total = cluster.hosts * cluster.cards
    every = tuple(range(total))
    shape = draw(st.sampled_from(["all", "tp", "dp", "any"]))
    if shape == "tp":
        host = draw(st.integers(0, cluster.hosts - 1))
        return every[host * cluster.cards : (host + 1) * cluster.cards]
    if shape == "dp":
        return every[draw(st.integers(0, cluster.cards - 1)) :: cluster.cards]
    if shape == "any":
        return tuple(sorted(draw(st.sets(st.sampled_from(every), min_size=1))))
    return every


@st.composite
def asked(draw: st.DrawFn, least_hosts: int = 1) -> tuple[Cluster, tuple[int, ...]]:
    cluster = draw(clusters(least_hosts))
    return cluster, draw(groups(cluster))


def rings_of(machine: Machine, group: tuple[int, ...]) -> Rings:
    return find_rings(machine, tuple(machine.gpus[g] for g in group))


def out_of(made: CollectivePlan, card: str) -> int:
    """Bytes on the lanes that leave a card."""
    return sum(n for lane, n in made.loads if lane.split(":")[1].startswith(f"{card}>"))


@settings(max_examples=60, deadline=None)
@given(case=asked(), kind=st.sampled_from(KINDS), nbytes=st.sampled_from([0, 1, 1000, MIB, 64 * MIB + 3]))
def test_every_collective_has_a_plan_over_lanes_that_are_there(
    case: tuple[Cluster, tuple[int, ...]], kind: str, nbytes: int
) -> None:
    cluster, group = case
    machine = cluster.machine()
    made = plan(machine, kind, nbytes, group)
    if len(group) == 1:
        assert made.ns == 0
        return
    assert 0 < made.ns < 3600e9
    assert made.call_ns >= made.ns
    assert math.isfinite(made.busbw_gb_s)
    for lane, amount in made.loads:
        assert amount >= 0
        assert made.transfer_ns + 1 >= amount / machine.capacities[lane]


@settings(max_examples=40, deadline=None)
@given(case=asked())
def test_each_ring_visits_every_card_once_and_its_hops_lead_on(case: tuple[Cluster, tuple[int, ...]]) -> None:
    cluster, group = case
    if len(group) == 1:
        return
    machine = cluster.machine()
    rings = rings_of(machine, group)
    names = {machine.gpus[g].name for g in group}
    hops = iter(rings.hops)
    for order in rings.orders:
        assert set(order) == names
        assert len(order) == len(names)
        for here, there in zip(order, (*order[1:], order[0]), strict=True):
            node = here
            for hop in next(hops).hops:
                assert hop.start == node
                assert hop.lane in machine.capacities
                node = hop.end
            assert node == there
    assert next(hops, None) is None


@settings(max_examples=30, deadline=None)
@given(case=asked(), kind=st.sampled_from(["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]))
def test_no_card_sends_less_than_the_algorithm_does(case: tuple[Cluster, tuple[int, ...]], kind: str) -> None:
    cluster, group = case
    machine, ranks = cluster.machine(**RING_SIMPLE), len(group)
    nbytes = 720_720 * ranks  # divides by up to 16 channels
    made = plan(machine, kind, nbytes, group)
    sent = nbytes * (2 if kind == "all_reduce" else 1) * (ranks - 1) / ranks
    own = [out_of(made, machine.gpus[g].name) for g in group]
    # What crosses a card's own links for others (PXN) comes on top.
    assert min(own) >= sent - ranks * ranks
    if cluster.nvlink == "none":
        assert max(own) <= sent + ranks * ranks


@settings(max_examples=25, deadline=None)
@given(case=asked(), kind=st.sampled_from(KINDS), data=st.data())
def test_the_order_of_the_ranks_changes_nothing(
    case: tuple[Cluster, tuple[int, ...]], kind: str, data: st.DataObject
) -> None:
    cluster, group = case
    machine = cluster.machine()
    shuffled = tuple(data.draw(st.permutations(group)))
    assert plan(machine, kind, 5 * MIB, shuffled) == plan(machine, kind, 5 * MIB, group)


@settings(max_examples=30, deadline=None)
@given(cluster=clusters(least_hosts=2), kind=st.sampled_from(["all_reduce", "all_gather", "reduce_scatter"]))
def test_no_ring_beats_a_hosts_nics_or_its_cards_links(cluster: Cluster, kind: str) -> None:
    machine = cluster.machine(**RING_SIMPLE)
    made = plan(machine, kind, 1 << 32, tuple(range(len(machine.gpus))))
    assert made.busbw_gb_s <= max(cluster.nics, 1) * cluster.nic_gb_s * (1 + 1e-9)
    card = sum(k.bandwidth_gb_s for k in machine.links if "gpu0" in (k.a, k.b))
    assert made.busbw_gb_s <= card * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(case=asked(least_hosts=2), times=st.sampled_from([2]))
def test_more_nics_never_give_less(case: tuple[Cluster, tuple[int, ...]], times: int) -> None:
    cluster, group = case
    if len(group) == 1:
        return
    ports = cluster.switches or (2 if cluster.cards % 2 == 0 else 1)
    fewer = cluster._replace(nics=ports)
    more = cluster._replace(nics=ports * times)
    got = [rings_of(c.machine(), group) for c in (fewer, more)]
    # What NCCL's search makes most of; staging in host memory, of which it knows nothing, can turn that around.
    assert got[1].believed_gb_s >= got[0].believed_gb_s * (1 - 1e-9)
    if not any(hop.via_host for rings in got for hop in rings.hops):
        assert got[1].bus_gb_s >= got[0].bus_gb_s * (1 - 1e-9)


@settings(max_examples=20, deadline=None)
@given(cluster=clusters(least_hosts=2))
def test_groups_alike_in_other_hosts_cost_the_same(cluster: Cluster) -> None:
    machine = cluster.machine()
    first, last = range(cluster.cards), range(len(machine.gpus) - cluster.cards, len(machine.gpus))
    for kind in ("all_reduce", "all_to_all"):
        assert plan(machine, kind, MIB, tuple(first)).ns == plan(machine, kind, MIB, tuple(last)).ns


@pytest.mark.parametrize("kind", ["all_reduce", "all_to_all"])
@pytest.mark.parametrize("nics", [1, 4, 8])
def test_spines_share_what_leaves_send_up(kind: str, nics: int) -> None:
    # As many links up from a leaf as down to its NICs: no slower than one switch that is never full.
    one, many = (
        plan(Cluster(4, 8, nics, "switch", 4, network).machine(**RING_SIMPLE), kind, 1 << 30, tuple(range(32)))
        for network in ("one", "leaf-spine")
    )
    assert many.transfer_ns == one.transfer_ns


@pytest.mark.parametrize("kind", KINDS)
def test_512_cards_are_planned_in_seconds(kind: str) -> None:
    machine = Cluster(64, 8, 8, "switch", 4).machine()
    began = time.process_time()
    plan(machine, kind, MIB, tuple(range(512)))
    assert time.process_time() - began < 30
