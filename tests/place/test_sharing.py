"""What a collective takes of its device, worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from sim.ops import CollectiveKind, TensorMeta, Work
from sim.place.collectives import CollectivePlan, plan
from sim.place.placement import Held
from sim.place.sharing import held_by, losses
from sim.topology.device import load_device
from sim.topology.load import load_topology, shipped_topologies
from tests.whatif.layers import ring_machine


def planned(
    channels: int, *, nbytes: int = 1_000_000, ns: int = 100_000, kind: CollectiveKind = "all_reduce"
) -> CollectivePlan:
    return CollectivePlan(kind, nbytes, 8, 0, ns, ns, "ring", "simple", channels, "roofline", "", ())


def test_a_block_a_channel_and_three_accesses_a_byte() -> None:
    # 24 of an A100's 108 SMs: 222222 millionths.  1 MB all-reduced over 8 ranks: 1.75 MB cross each link in 100 us,
    # three times in memory: 52.5 GB/s of 2039 (the 80 GB card): 25748 millionths.
    machine = load_topology("dgx-a100")
    assert machine.gpus[0].profile.memory_bandwidth_gb_s == 2039
    assert held_by(planned(24), machine, machine.gpus[0], tuple(range(8))) == Held(222_222, 25_748)


def test_data_staged_in_host_memory_is_read_once() -> None:
    # 2 of 64 SMs; 17.5 GB/s once of 768: 22786 millionths.
    machine = load_topology("a5000x8")
    assert held_by(planned(2), machine, machine.gpus[0], tuple(range(8))) == Held(31_250, 22_786)


def product(m: int, n: int, k: int, dtype: str = "float16") -> Work:
    def tensor(*shape: int) -> TensorMeta:
        return TensorMeta(dtype, shape)

    return Work("aten::mm", (tensor(m, k), tensor(k, n)), (tensor(m, n),))


def test_a_product_of_few_tiles_loses_a_turn_and_one_of_many_its_share() -> None:
    # An H100 of 132 SMs with 24 held has 108.  A product of 2048 x 2048 has few tiles an SM, so it loses more than the
    # share of the SMs (24 / 132 = 0.18); one of 16384 x 16384 has so many that the last turn hardly counts.
    few, many = losses([product(2048, 2048, 2048), product(16384, 16384, 4096)], load_device("h100-sxm"), 181_818)
    assert many < 200_000 < few < 500_000


def test_what_is_bound_by_bytes_or_held_wholly() -> None:
    device = load_device("a100-sxm4-80gb")
    thin = product(1, 4096, 4096)  # a row: nearly all bytes
    assert losses([thin], device, 222_222)[0] < 10_000
    assert losses([thin], device, 1_000_000) == (1_000_000,)


@pytest.mark.parametrize("machine", shipped_topologies())
def test_no_collective_asks_for_half_of_the_memory(machine: str) -> None:
    """So compute takes none of it from a collective: shared max-min fairly, who asks for less than half gets it all."""
    loaded = load_topology(machine)
    members = tuple(gpu.index for gpu in loaded.gpus)
    for kind in ("all_reduce", "all_gather", "reduce_scatter"):
        for nbytes in (1 << 20, 1 << 26, 1 << 30):
            held = held_by(plan(loaded, kind, nbytes, members), loaded, loaded.gpus[0], members)
            assert held is None or held.memory_ppm < 500_000


def test_what_takes_nothing(tmp_path: Path) -> None:
    machine = load_topology("a5000x8")
    assert held_by(planned(0), machine, machine.gpus[0], (0,)) is None
    textbook = load_topology(str(ring_machine(tmp_path, 8)))
    assert held_by(planned(2), textbook, textbook.gpus[0], tuple(range(8))) is None
    free = held_by(planned(2, ns=0), machine, machine.gpus[0], tuple(range(8)))
    assert free is not None and free.memory_ppm == 0
