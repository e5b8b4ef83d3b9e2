"""Rings over several hosts: every NIC is a rail."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from sim.place.collectives import plan
from sim.place.nccl_rings import Rings, find_rings
from sim.topology import load_topology
from sim.topology.machine import Machine

GIB = 1 << 30


def rings_of(machine: Machine, *gpus: int) -> Rings:
    return find_rings(machine, tuple(machine.gpus[g] for g in gpus) or machine.gpus)


def network_crossings(rings: Rings) -> dict[str, int]:
    return {lane: count for lane, count in rings.crossings.items() if lane.startswith("network:")}


def hosts_of(folder: Path, *, nics: int, switches: int = 2, version: str = "2.28") -> Machine:
    """Two hosts of four H100s behind an NVSwitch, PCIe switches and NICs dealt to them evenly."""
    raw = yaml.safe_load((Path(__file__).parents[2] / "topologies" / "dgx-h100x2-400g.yaml").read_text())
    raw["devices"]["count"] = 4
    counts = {"nic": nics, "pcisw": switches}
    raw["nodes"] = [{**node, "count": counts[node["id"]]} if node["id"] in counts else node for node in raw["nodes"]]
    raw["nccl"] = {"version": version}
    file = folder / "hosts.yaml"
    file.write_text(yaml.safe_dump(raw))
    return load_topology(str(file))


@pytest.mark.parametrize(("name", "gb_s"), [("dgx-h100x2-400g", 48.0), ("dgx-a100x2-200g", 24.0)])
@pytest.mark.parametrize("hosts", [2, 4])
def test_eight_nics_are_eight_rails(name: str, gb_s: float, hosts: int) -> None:
    machine = load_topology(name, {"hosts": hosts})
    rings = rings_of(machine)
    assert (len(rings.orders), rings.speed, rings.channels) == (8, gb_s, 16)
    assert rings.bus_gb_s == pytest.approx(8 * gb_s)
    # Each NIC sends one channel and receives one.
    assert network_crossings(rings) == dict.fromkeys(network_crossings(rings), 1)
    assert len(network_crossings(rings)) == 2 * 8 * hosts


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "reduce_scatter"])
def test_large_collectives_get_what_all_nics_carry(kind: str) -> None:
    machine = load_topology("dgx-h100x2-400g", {"nccl.NCCL_ALGO": "Ring", "nccl.NCCL_PROTO": "Simple"})
    made = plan(machine, kind, 16 * GIB, tuple(range(16)))
    assert made.busbw_gb_s == pytest.approx(8 * 48, rel=0.02)
    assert made.bound.startswith("network:nic")


@pytest.mark.parametrize("nics", [1, 2, 4])
def test_bandwidth_goes_with_the_number_of_nics(tmp_path: Path, nics: int) -> None:
    assert rings_of(hosts_of(tmp_path, nics=nics)).bus_gb_s == pytest.approx(nics * 48)


def test_a_chain_ends_at_the_card_beside_the_nic_it_began_at() -> None:
    machine = load_topology("dgx-a100x2-200g")
    for order in rings_of(machine).orders:
        first, last = order[0], order[7]
        assert machine.route(first, machine.own_nic(first) or "").path == "PIX"
        assert machine.route(last, machine.own_nic(first) or "").path == "PIX"
        assert {machine.gpu(name).host for name in order[:8]} == {0}


def test_a_card_far_from_the_nic_hands_its_data_to_the_nics_own_card(tmp_path: Path) -> None:
    # Every card and NIC on a switch of its own: no other card is near the NIC that a chain began at.
    rings = rings_of(hosts_of(tmp_path, nics=4, switches=4))
    across = [hop for hop in rings.hops if hop.path == "NET"]
    assert len(across) == 2 * len(rings.orders)
    assert all(hop.lanes[0].startswith("nvlink:") and not any("cpu" in lane for lane in hop.lanes) for hop in across)
    assert rings.bus_gb_s == pytest.approx(4 * 48)
    # Before 2.12 it went by way of the CPU.
    before = rings_of(hosts_of(tmp_path, nics=4, switches=4, version="2.11"))
    assert any("cpu" in lane for hop in before.hops if hop.path == "NET" for lane in hop.lanes)


def test_groups_of_one_card_a_host_each_have_a_nic_of_their_own() -> None:
    # What data-parallel groups beside tp=8 are: eight of them at once share nothing.
    machine = load_topology("dgx-h100x2-400g")
    used = Counter(lane for card in range(8) for lane in network_crossings(rings_of(machine, card, card + 8)))
    assert len(used) == 32
    assert set(used.values()) == {1}
    assert rings_of(machine, 3, 11).bus_gb_s == pytest.approx(48)


def test_sends_and_all_to_all_use_each_cards_own_nic() -> None:
    machine = load_topology("dgx-h100x2-400g")
    own = [machine.own_nic(gpu.name) for gpu in machine.gpus]
    assert sorted(own, key=lambda nic: int((nic or "")[3:])) == [f"nic{i}" for i in range(16)]
    made = plan(machine, "all_to_all", GIB, tuple(range(16)))
    bytes_on = [amount for lane, amount in made.loads if lane.startswith("network:")]
    assert len(bytes_on) == 32
    assert len(set(bytes_on)) == 1


def test_no_route_inside_a_host_leads_over_the_network() -> None:
    machine = load_topology("dgx-h100x2-400g")
    for gpu in machine.gpus[:8]:
        for nic in machine.nics(gpu.name):
            assert machine.route(gpu.name, nic).path != "NET"


def test_hosts_joined_without_nics_still_have_rings(tmp_path: Path) -> None:
    text = """
name: plain
description: Two hosts whose CPUs are on the network themselves
source: a test
hosts: 2
devices: {count: 2, profile: rtx-a5000}
nodes: [{id: cpu, kind: cpu, count: 1}, {id: switch, kind: network-switch, shared: true}]
links:
  pcie: {kind: pcie, bandwidth_gb_s: 24, source: a test, between: [[gpu, cpu]]}
  network: {kind: network, bandwidth_gb_s: 3, source: a test, between: [[cpu, switch]]}
"""
    (tmp_path / "m.yaml").write_text(text)
    rings = rings_of(load_topology(str(tmp_path / "m.yaml")))
    assert rings.bus_gb_s == pytest.approx(3)
    assert rings.orders[0] == ("gpu0", "gpu1", "gpu2", "gpu3")


def test_rails_that_never_meet_are_joined_channel_by_channel(tmp_path: Path) -> None:
    # One switch a rail: nic0 and nic4 on the first, nic1 and nic5 on the second, and so on.
    raw = yaml.safe_load((Path(__file__).parents[2] / "topologies" / "dgx-h100x2-400g.yaml").read_text())
    raw["devices"]["count"] = 4
    raw["nodes"] = [node for node in raw["nodes"] if node["id"] not in ("switch", "nic", "pcisw")]
    raw["nodes"] += [{"id": "nic", "kind": "nic", "count": 4}, {"id": "pcisw", "kind": "pcie-switch", "count": 2}]
    raw["nodes"] += [{"id": f"rail{i}", "kind": "network-switch", "shared": True} for i in range(4)]
    raw["links"]["network"]["between"] = [[f"nic{i}", f"rail{i}"] for i in range(4)]
    (tmp_path / "rails.yaml").write_text(yaml.safe_dump(raw))
    rings = rings_of(load_topology(str(tmp_path / "rails.yaml")))
    assert rings.bus_gb_s == pytest.approx(4 * 48)
    # Four channels of 48 GB/s are cut into two each.
    assert network_crossings(rings) == dict.fromkeys(network_crossings(rings), 2)


def test_what_nccl_may_take_and_the_model_does_not_have_is_told() -> None:
    machine = load_topology("dgx-h100x2-400g")
    everyone = tuple(range(16))
    assert "NVLSTree" in plan(machine, "all_reduce", GIB, everyone).note
    assert plan(machine, "all_gather", GIB, everyone).note == ""
    assert plan(load_topology("dgx-h100x2-400g", {"nccl.NCCL_ALGO": "Ring"}), "all_reduce", GIB, everyone).note == ""
    assert plan(load_topology("dgx-a100x2-200g"), "all_reduce", GIB, everyone).note == ""


# GPUDirect RDMA -------------------------------------------------------------------------------------------------


def test_a_nic_farther_than_pcie_switches_stages_data_in_host_memory() -> None:
    # a5000x8x2-200g: the NIC is on a CPU, as the cards are.  One card a host: its link carries both ways at once, 0.605
    # of 24 GB/s; a send one way, 0.845; with NCCL_NET_GDR_LEVEL=SYS the NIC reads and writes the cards' own memory.
    machine = load_topology("a5000x8x2-200g")
    assert rings_of(machine, 0, 8).bus_gb_s == pytest.approx(0.605 * 24)
    sent = plan(machine, "recv", GIB, (4, 12))
    assert GIB / sent.transfer_ns == pytest.approx(0.845 * 24)
    assert machine.transfer_route("gpu4", "gpu12").via_host
    near = load_topology("a5000x8x2-200g", {"nccl.NCCL_NET_GDR_LEVEL": "SYS"})
    assert rings_of(near, 0, 8).bus_gb_s == pytest.approx(24)
    assert not near.transfer_route("gpu4", "gpu12").via_host


def test_the_nics_own_link_is_not_slowed_by_staging() -> None:
    # 100 Gbit: the NIC's DMA of host memory is no GPU kernel's access.
    route = load_topology("a5000x8x2-100g").transfer_route("gpu0", "gpu8")
    assert [hop.lane for hop in route.hops if hop.staged] == ["pcie:gpu0>cpu0", "pcie:cpu2>gpu8"]


def test_cards_without_peer_to_peer_stage_even_beside_the_nic() -> None:
    machine = load_topology("dgx-a100x2-200g", {"devices.profile": "rtx-4090", "links.nvlink.enabled": False})
    route = machine.transfer_route("gpu0", "gpu8")
    assert route.via_host
    assert "pcie:pcisw0>cpu0" in route.lanes
    assert not load_topology("dgx-a100x2-200g").transfer_route("gpu0", "gpu8").via_host


# Sends over the network -----------------------------------------------------------------------------------------


def test_a_send_between_rails_goes_over_nvlink_to_the_receivers_rail(tmp_path: Path) -> None:
    raw = yaml.safe_load((Path(__file__).parents[2] / "topologies" / "dgx-h100x2-400g.yaml").read_text())
    raw["nodes"] = [node for node in raw["nodes"] if node["id"] != "switch"]
    raw["nodes"] += [{"id": f"rail{i}", "kind": "network-switch", "shared": True} for i in range(8)]
    raw["links"]["network"]["between"] = [[f"nic{i}", f"rail{i}"] for i in range(8)]
    file = tmp_path / "rails.yaml"
    file.write_text(yaml.safe_dump(raw))
    machine = load_topology(str(file))
    route = machine.transfer_route("gpu0", "gpu13")
    assert [hop.link.kind for hop in route.hops] == [
        "nvlink", "nvlink", "pcie", "pcie", "network", "network", "pcie", "pcie",
    ]  # fmt: skip
    assert "network:nic5>rail5" in route.lanes
    # 15 of 16 pieces leave each card, 8 of them the host: an all-to-all takes what one switch for all takes.
    one = plan(load_topology("dgx-h100x2-400g"), "all_to_all", GIB, tuple(range(16)))
    assert plan(machine, "all_to_all", GIB, tuple(range(16))).transfer_ns == one.transfer_ns


def test_a_cards_sends_over_the_network_are_posted_one_by_one() -> None:
    # LL: 6.6 + 2.7 us, and 7 more of 8 cards in the other host: 1 us each on Intel, 2 on AMD.
    everyone = tuple(range(16))
    assert plan(load_topology("dgx-h100x2-400g"), "all_to_all", 16, everyone).latency_ns == 9_300 + 7_000
    assert plan(load_topology("dgx-a100x2-200g"), "all_to_all", 16, everyone).latency_ns == pytest.approx(23_300, abs=1)
    # 1 GiB moves long after all are posted; one send is posted once.
    assert plan(load_topology("dgx-h100x2-400g"), "all_to_all", GIB, everyone).latency_ns == 8_400 + 14_000
    assert plan(load_topology("dgx-h100x2-400g"), "send", 16, (0, 8)).latency_ns == 9_300


def test_an_all_to_all_of_512_cards_is_planned_in_seconds() -> None:
    machine = load_topology("dgx-h100x2-400g", {"hosts": 64})
    began = time.process_time()
    made = plan(machine, "all_to_all", GIB, tuple(range(512)))
    assert time.process_time() - began < 30
    # Each card sends 504 of its 512 pieces by its own NIC, at 48 GB/s.
    assert made.transfer_ns == pytest.approx(GIB / 512 * 504 / 48, rel=1e-6)


# LL128 over hosts -----------------------------------------------------------------------------------------------


def ll128_of(machine: Machine) -> bool:
    return plan(machine, "all_reduce", 1 << 20, tuple(range(len(machine.gpus)))).protocol == "ll128"


def test_ll128_crosses_hosts_where_nics_are_near_the_cards(tmp_path: Path) -> None:
    ampere = {"devices.profile": "a100-sxm4-80gb"}
    near = hosts_of(tmp_path, nics=4, switches=2)
    assert ll128_of(near)
    assert ll128_of(load_topology(str(tmp_path / "hosts.yaml"), ampere))
    # By a neighbour's NIC (PXN) from Hopper on only.
    assert ll128_of(hosts_of(tmp_path, nics=4, switches=4))
    assert not ll128_of(load_topology(str(tmp_path / "hosts.yaml"), ampere))
    # By way of a CPU never: before 2.12 a far card's data went so.
    assert not ll128_of(hosts_of(tmp_path, nics=4, switches=4, version="2.11"))
    assert not ll128_of(load_topology("a5000x8x2-100g"))


def test_ll128_over_two_hosts_by_hand() -> None:
    # Tree, 1 MiB on 2 x 8 A100: 14 + 2 (7 x 1.25 + 8.5) = 48.5 us; eight channels of 20 GB/s, half of that, x 0.6.
    made = plan(load_topology("dgx-a100x2-200g"), "all_reduce", 1 << 20, tuple(range(16)))
    assert (made.algorithm, made.protocol, made.latency_ns) == ("tree", "ll128", 48_500)
    assert made.transfer_ns == pytest.approx((1 << 20) / (8 * 20 / 2 * 0.6), abs=1)
    # Ring, 16 MiB on 2 x 8 H100, 16 turns: 14 us + 14 hops of 1.9 and 2 of 4.0 us; 14 of 16 channels have 4 grains of
    # 19200 bytes a turn: 16 x 76800 x 14 bytes at 0.92 x 384 GB/s take longer than packing, 16 x 76800 at 36.7.
    made = plan(load_topology("dgx-h100x2-400g"), "all_gather", 1 << 24, tuple(range(16)))
    assert (made.algorithm, made.protocol, made.latency_ns) == ("ring", "ll128", 14_000 + 14 * 1_900 + 2 * 4_000)
    assert made.transfer_ns == pytest.approx(16 * 76_800 * 14 / (0.92 * 384), abs=1)
