"""What a collective takes of its device, worked out by hand."""

from __future__ import annotations

from pathlib import Path

from sim.ops import CollectiveKind
from sim.place.collectives import CollectivePlan
from sim.place.placement import Held
from sim.place.sharing import held_by
from sim.topology.load import load_topology
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


def test_what_takes_nothing(tmp_path: Path) -> None:
    machine = load_topology("a5000x8")
    assert held_by(planned(0), machine, machine.gpus[0], (0,)) is None
    textbook = load_topology(str(ring_machine(tmp_path, 8)))
    assert held_by(planned(2), textbook, textbook.gpus[0], tuple(range(8))) is None
    free = held_by(planned(2, ns=0), machine, machine.gpus[0], tuple(range(8)))
    assert free is not None and free.memory_ppm == 0
