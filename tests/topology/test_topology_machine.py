"""Routes, lanes and peers, worked out by hand on small machines."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from sim.errors import InputError
from sim.topology import Machine, load_topology, shipped_topologies
from sim.topology.plot import place_nodes, plot
from sim.topology.show import link_rows, show

PAIRS = """
name: pairs
description: four cards, two sockets, bridged in pairs
source: a test
devices: {count: 4, profile: rtx-a5000}
nodes:
  - {id: cpu, kind: cpu, count: 2}
links:
  pcie: {kind: pcie, bandwidth_gb_s: 24, latency_us: 1, source: t, between: [[gpu, cpu]]}
  socket: {kind: smp, bandwidth_gb_s: 20, latency_us: 0.5, source: t, between: [[cpu0, cpu1]]}
  bridge: {kind: nvlink, bandwidth_gb_s: 56.25, latency_us: 0.5, source: t, between: [[gpu0, gpu1], [gpu2, gpu3]]}
"""


def machine(folder: Path, text: str = PAIRS) -> Machine:
    (folder / "m.yaml").write_text(text)
    return load_topology(str(folder / "m.yaml"))


def test_routes_by_hand(tmp_path: Path) -> None:
    m = machine(tmp_path)
    assert m.route("gpu0", "gpu1").lanes == ("bridge:gpu0>gpu1",)
    assert m.route("gpu0", "gpu1").path == "NVL"
    # gpu1 and gpu2 sit on different sockets; no bridge joins them, and no path leads through gpu3.
    route = m.route("gpu1", "gpu2")
    assert route.lanes == ("pcie:gpu1>cpu0", "socket:cpu0>cpu1", "pcie:cpu1>gpu2")
    assert route.path == "SYS"
    assert route.bandwidth_gb_s == 20  # the socket link is the narrowest of 24, 20, 24
    assert route.latency_us == 2.5  # 1 + 0.5 + 1
    assert m.route("gpu2", "gpu2").hops == ()
    assert [g.name for g in m.gpus if m.route("gpu2", g.name).path == "NVL"] == ["gpu3"]


def test_lanes_have_each_directions_rate(tmp_path: Path) -> None:
    rates = machine(tmp_path).capacities
    assert rates["pcie:gpu0>cpu0"] == rates["pcie:cpu0>gpu0"] == 24
    assert len(rates) == 2 * (4 + 1 + 2)
    half = machine(tmp_path, PAIRS.replace("bandwidth_gb_s: 20,", "bandwidth_gb_s: 20, duplex: half,"))
    assert half.capacities["socket:cpu0-cpu1"] == 20
    assert half.route("gpu0", "gpu2").lanes[1] == half.route("gpu2", "gpu0").lanes[1] == "socket:cpu0-cpu1"


def test_links_drawn_twice_are_one_link_twice_as_wide(tmp_path: Path) -> None:
    # Three bridges of 56.25 join gpu0 and gpu1, in either order: 168.75 GB/s, for routes, lanes and NCCL.
    m = machine(tmp_path, PAIRS.replace("[[gpu0, gpu1],", "[[gpu0, gpu1], [gpu1, gpu0], [gpu0, gpu1],"))
    (bridge,) = (link for link in m.links if link.name == "bridge:gpu0-gpu1")
    assert (bridge.bandwidth_gb_s, bridge.nccl_gb_s) == (168.75, 168.75)
    assert m.route("gpu0", "gpu1").bandwidth_gb_s == m.capacities["bridge:gpu1>gpu0"] == 168.75
    assert m.route("gpu2", "gpu3").bandwidth_gb_s == 56.25
    assert [row[:4] for row in link_rows(m)[:2]] == [
        ("bridge", "nvlink", "1", "56.25"),
        ("bridge", "nvlink", "1", "168.75"),
    ]


def test_host_copies_go_to_the_nearest_socket(tmp_path: Path) -> None:
    m = machine(tmp_path)
    assert m.host_to_device("gpu2").lanes == ("pcie:cpu1>gpu2",)
    assert m.device_to_host("gpu1").lanes == ("pcie:gpu1>cpu0",)


def test_without_peer_to_peer_bytes_go_through_host_memory(tmp_path: Path) -> None:
    m = machine(tmp_path, PAIRS + "nccl: {NCCL_P2P_DISABLE: 1}\n")
    assert not m.p2p("gpu0", "gpu1")
    route = m.transfer_route("gpu0", "gpu1")
    assert route.via_host
    assert route.lanes == ("pcie:gpu0>cpu0", "pcie:cpu0>gpu1")


@pytest.mark.parametrize(
    ("vendor", "near", "far"), [("amd", True, True), ("intel", False, False), ("unknown", True, True)]
)
def test_nccls_rule_for_peer_to_peer_through_a_cpu(tmp_path: Path, vendor: str, near: bool, far: bool) -> None:
    text = PAIRS.replace("[gpu0, gpu1], [gpu2, gpu3]", "[gpu2, gpu3]") + f"host: {{cpu_vendor: {vendor}}}\n"
    m = machine(tmp_path, text)
    assert m.p2p("gpu0", "gpu1") == near
    assert m.p2p("gpu0", "gpu2") == far
    assert m.p2p("gpu2", "gpu3")  # the bridge


def test_geforce_cards_have_no_peer_to_peer_over_pcie(tmp_path: Path) -> None:
    m = machine(tmp_path, PAIRS.replace("rtx-a5000", "rtx-3090"))
    assert m.p2p("gpu0", "gpu1")
    assert not m.p2p("gpu0", "gpu2")


def test_two_hosts_are_numbered_on(tmp_path: Path) -> None:
    text = PAIRS.replace("source: a test", "source: a test\nhosts: 2").replace(
        "nodes:", "nodes:\n  - {id: nic, kind: nic, count: 1}\n  - {id: switch, kind: network-switch, shared: true}"
    )
    text += "  up: {kind: pcie, bandwidth_gb_s: 24, source: t, between: [[nic0, cpu0]]}\n"
    text += "  net: {kind: network, bandwidth_gb_s: 12.5, latency_us: 2, source: t, between: [[nic0, switch]]}\n"
    m = machine(tmp_path, text)
    assert [g.name for g in m.gpus] == [f"gpu{i}" for i in range(8)]
    assert [g.host for g in m.gpus] == [0] * 4 + [1] * 4
    assert m.route("gpu4", "gpu5").path == "NVL"
    route = m.route("gpu0", "gpu7")
    assert route.path == "NET"
    assert route.bandwidth_gb_s == 12.5
    # gpu0-cpu0-nic0-switch-nic1-cpu2-cpu3-gpu7
    assert [hop.end for hop in route.hops] == ["cpu0", "nic0", "switch", "nic1", "cpu2", "cpu3", "gpu7"]


@pytest.mark.parametrize("name", shipped_topologies())
def test_routes_are_whole_and_symmetric(name: str) -> None:
    m = load_topology(name)
    for a in m.gpus:
        for b in m.gpus:
            route, back = m.route(a.name, b.name), m.route(b.name, a.name)
            ends = [hop.end for hop in route.hops]
            starts = [hop.start for hop in route.hops]
            assert starts == [a.name, *ends][: len(starts)]
            assert ends[-1:] == ([b.name] if a != b else [])
            assert not set(ends[:-1]) & {g.name for g in m.gpus}
            assert route.path == back.path
            assert route.bandwidth_gb_s == back.bandwidth_gb_s
            assert all(lane in m.capacities for lane in route.lanes)


@pytest.mark.parametrize("name", shipped_topologies())
def test_a_machine_is_told_in_a_hundred_columns(name: str) -> None:
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    show(load_topology(name), console)
    text = console.export_text()
    assert name in text
    assert "GB/s" in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 100


def test_on_a_narrow_terminal_fewer_devices_are_in_the_matrix_and_no_path_is_cut() -> None:
    """Of 16 devices 80 columns hold 12: four columns of a name, six a path."""
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    show(load_topology("a5000x8x2-100g"), console)
    text = console.export_text()
    assert "Paths between devices, the first 12 of 16" in text
    assert "gpu0   X     PHB+  PHB+  PHB+  SYS+  SYS+  SYS+  SYS+  NET   NET   NET   NET" in text


@pytest.mark.parametrize("name", shipped_topologies())
def test_a_machine_is_drawn_without_one_node_on_another(name: str, tmp_path: Path) -> None:
    m = load_topology(name)
    spots = place_nodes(m)
    assert set(spots) == {g.name for g in m.gpus} | set(m.nodes)
    for a, (xa, ya) in spots.items():
        for b, (xb, yb) in spots.items():
            assert a == b or ya != yb or abs(xa - xb) >= 1.0
    plot(m, tmp_path / "m.png")
    first = (tmp_path / "m.png").read_bytes()
    plot(m, tmp_path / "m.png")
    assert first[:4] == b"\x89PNG"
    assert (tmp_path / "m.png").read_bytes() == first


def test_of_many_hosts_as_many_are_drawn_as_can_be_read(tmp_path: Path) -> None:
    for hosts in (2, 8):
        plot(load_topology("dgx-h100x2-400g", {"hosts": hosts}), tmp_path / f"{hosts}.svg")
    two, eight = ((tmp_path / f"{hosts}.svg").read_text() for hosts in (2, 8))
    assert "drawn: 2 of 8 hosts alike" in eight and "drawn:" not in two
    for node in ("gpu15", "nic15", "pcisw7", "nvswitch1", "switch"):
        assert f"<!-- {node} -->" in eight
    for node in ("gpu16", "nic16", "pcisw8", "nvswitch2"):
        assert f"<!-- {node} -->" not in eight


def test_a_long_title_has_lines_of_its_own(tmp_path: Path) -> None:
    """Two lines fit above the machine; each more one makes the picture higher by 0.22 inches of 110 dots."""
    heights = []
    for words in (10, 60):  # 60 x 5 letters: some lines of 80
        plot(machine(tmp_path, PAIRS.replace("four cards", "word " * words)), tmp_path / "m.png")
        heights.append(int.from_bytes((tmp_path / "m.png").read_bytes()[20:24], "big"))
    assert heights[1] - heights[0] == pytest.approx(3 * 0.22 * 110, abs=25)


def test_a_picture_that_cannot_be_is_told(tmp_path: Path) -> None:
    m = load_topology("a5000x1")
    with pytest.raises(InputError, match=r"ends in \.png, \.svg or \.pdf"):
        plot(m, tmp_path / "m.xyz")
    with pytest.raises(InputError, match="cannot be written"):
        plot(m, tmp_path / "no" / "m.png")
