"""nvidia-smi topo -m, as people posted it, becomes nodes and links."""

from __future__ import annotations

import pytest

from sim.errors import UserError
from sim.topology.smi import Wiring, layout_of, parse_topo

# A DGX A100 (NVIDIA/nccl issue 1505), without its NICs but two.
DGX_A100 = """
        GPU0    GPU1    GPU2    GPU3    GPU4    GPU5    GPU6    GPU7    NIC0    NIC1    CPU Affinity    NUMA Affinity   GPU NUMA ID
GPU0     X      NV12    NV12    NV12    NV12    NV12    NV12    NV12    PXB     PXB     48-63,176-191   3               N/A
GPU1    NV12     X      NV12    NV12    NV12    NV12    NV12    NV12    PXB     PXB     48-63,176-191   3               N/A
GPU2    NV12    NV12     X      NV12    NV12    NV12    NV12    NV12    SYS     SYS     16-31,144-159   1               N/A
GPU3    NV12    NV12    NV12     X      NV12    NV12    NV12    NV12    SYS     SYS     16-31,144-159   1               N/A
GPU4    NV12    NV12    NV12    NV12     X      NV12    NV12    NV12    SYS     SYS     112-127,240-255 7               N/A
GPU5    NV12    NV12    NV12    NV12    NV12     X      NV12    NV12    SYS     SYS     112-127,240-255 7               N/A
GPU6    NV12    NV12    NV12    NV12    NV12    NV12     X      NV12    SYS     SYS     80-95,208-223   5               N/A
GPU7    NV12    NV12    NV12    NV12    NV12    NV12    NV12     X      SYS     SYS     80-95,208-223   5               N/A
NIC0    PXB     PXB     SYS     SYS     SYS     SYS     SYS     SYS      X      PXB
NIC1    PXB     PXB     SYS     SYS     SYS     SYS     SYS     SYS     PXB      X

Legend:

  X    = Self
"""  # noqa: E501

# Five cards on two sockets (noonghunna/club-3090 issue 46), with tabs as nvidia-smi prints them.
FIVE = (
    "\tGPU0\tGPU1\tGPU2\tGPU3\tGPU4\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\n"
    "GPU0\t X \tSYS\tSYS\tSYS\tSYS\t8-15,24-31\t1\t\tN/A\n"
    "GPU1\tSYS\t X \tPHB\tNODE\tNODE\t0-7,16-23\t0\t\tN/A\n"
    "GPU2\tSYS\tPHB\t X \tNODE\tNODE\t0-7,16-23\t0\t\tN/A\n"
    "GPU3\tSYS\tNODE\tNODE\t X \tPHB\t0-7,16-23\t0\t\tN/A\n"
    "GPU4\tSYS\tNODE\tNODE\tPHB\t X \t0-7,16-23\t0\t\tN/A\n"
)

# A DGX-1 with V100s, an older driver: no NUMA column; cards in pairs behind PCIe switches (the NICs' PIX).
DGX_1 = """
        GPU0 GPU1 GPU2 GPU3 mlx5_0 CPU Affinity
GPU0    X    NV1  NV1  NV2  PIX    0-19,40-59
GPU1    NV1  X    NV2  NV1  PIX    0-19,40-59
GPU2    NV1  NV2  X    NV2  PHB    0-19,40-59
GPU3    NV2  NV1  NV2  X    PHB    0-19,40-59
mlx5_0  PIX  PIX  PHB  PHB  X
"""

# The same words in a made-up host: two pairs behind switches, one of them behind two, on two sockets.
SWITCHED = """
     GPU0 GPU1 GPU2 GPU3 CPU Affinity NUMA Affinity
GPU0  X   PIX  SYS  SYS  0-7   0
GPU1 PIX   X   SYS  SYS  0-7   0
GPU2 SYS  SYS   X   PXB  8-15  1
GPU3 SYS  SYS  PXB   X   8-15  1
"""


def test_a_dgx_has_an_nvswitch_and_a_cpu_for_each_numa_node() -> None:
    wiring = parse_topo(DGX_A100)
    assert wiring.gpus == 8
    assert set(wiring.joined.values()) == {"NV12"}
    assert wiring.domains == (1, 1, 0, 0, 3, 3, 2, 2)  # NUMA nodes 3, 1, 7, 5 in order: 1, 3, 5, 7
    layout = layout_of(wiring)
    # 12 links to each of 7 others would be 84, more than the 18 that any GPU has.
    assert layout.switched
    assert layout.nvlinks == {12: tuple((f"gpu{i}", "nvswitch") for i in range(8))}
    assert [node["kind"] for node in layout.nodes] == ["cpu", "nvswitch"]
    assert ("gpu0", "cpu1") in layout.pcie and ("gpu2", "cpu0") in layout.pcie
    assert len(layout.sockets) == 6  # every pair of four


def test_cards_without_nvlink_hang_on_the_cpu_of_their_numa_node() -> None:
    layout = layout_of(parse_topo(FIVE))
    assert layout.pcie == (("gpu0", "cpu1"), ("gpu1", "cpu0"), ("gpu2", "cpu0"), ("gpu3", "cpu0"), ("gpu4", "cpu0"))
    assert layout.sockets == (("cpu0", "cpu1"),)
    assert layout.nvlinks == {} and not layout.switched and layout.assumed == ()


def test_bonds_of_different_width_are_classes_of_links() -> None:
    layout = layout_of(parse_topo(DGX_1))
    assert layout.nvlinks == {
        1: (("gpu0", "gpu1"), ("gpu0", "gpu2"), ("gpu1", "gpu3")),
        2: (("gpu0", "gpu3"), ("gpu1", "gpu2"), ("gpu2", "gpu3")),
    }
    assert layout.sockets == ()


def test_four_gpus_with_four_links_each_are_a_mesh() -> None:
    # 3 x 4 = 12 links: what an A100 has, so no switch.
    wiring = Wiring({(i, j): "NV4" for i in range(4) for j in range(i + 1, 4)}, (0,) * 4)
    layout = layout_of(wiring)
    assert not layout.switched and len(layout.nvlinks[4]) == 6


def test_pix_and_pxb_are_a_switch() -> None:
    layout = layout_of(parse_topo(SWITCHED))
    assert layout.pcie == (
        ("switch0", "cpu0"), ("switch1", "cpu1"),
        ("gpu0", "switch0"), ("gpu1", "switch0"), ("gpu2", "switch1"), ("gpu3", "switch1"),
    )  # fmt: skip
    assert "several PCIe switches" in layout.assumed[0]


def test_of_some_gpus_their_links_and_nodes_alone() -> None:
    # GPUs 6, 2 and 3 of the DGX: NUMA nodes 5, 1 and 1, so 1, 0 and 0.
    some = parse_topo(DGX_A100).only((6, 2, 3))
    assert some == Wiring({(0, 1): "NV12", (0, 2): "NV12", (1, 2): "NV12"}, (1, 0, 0))
    assert parse_topo(FIVE).only((4, 3)).joined == {(0, 1): "PHB"}


@pytest.mark.parametrize("text", ["", "No devices were found", DGX_A100.replace("GPU5    NV12", "GPX5    NV12")])
def test_what_is_no_matrix_is_told(text: str) -> None:
    with pytest.raises(UserError, match="nvidia-smi topo -m: "):
        parse_topo(text)
