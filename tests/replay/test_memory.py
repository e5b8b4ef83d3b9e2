"""A rank's memory on the replay's clock: workspaces, what would be needed where it does not fit."""

from __future__ import annotations

import sim
from sim.graph import OpGraph, Program, RankProgram
from sim.ops import Alloc, Free, HostCall, Kernel, Op, TensorMeta, Work
from sim.place.outside import CUDA_CONTEXT_BYTES
from sim.replay.allocator.config import parse_alloc_conf
from sim.timeline import Timeline
from sim.units import GIB, MIB
from tests.programs import LANES, MAIN, STREAM

PRODUCT = Work("aten::mm", (TensorMeta("float16", (8, 8)),) * 2, (TensorMeta("float16", (8, 8)),))


def on_one_a5000(*ops: Op) -> Timeline:
    graph = OpGraph("made", (Program(LANES, ops),), (RankProgram(0, 0),), works=(PRODUCT,))
    graph.check()
    return sim.replay(sim.place(graph, sim.load_topology("a5000x1")))


def alloc(block: int, nbytes: int) -> Alloc:
    return Alloc(lane=MAIN, block=block, bytes=nbytes, stream=STREAM, category="activation", name=f"block {block}")


def test_the_first_product_of_a_stream_takes_a_workspace() -> None:
    # Two products on one stream: one workspace of 2 x 4 MiB + 8 x 16 KiB on compute capability 8.6.
    launch = HostCall(lane=MAIN, name="aten::mm")
    first, second = (Kernel(lane=STREAM, name="aten::mm", work=0, launch=i) for i in (0, 2))
    (peak,) = on_one_a5000(launch, first, launch, second).peaks
    assert peak.by_category == {"workspace": 8 * MIB + 128 * 1024}


def test_what_does_not_fit_is_named_and_the_need_still_told() -> None:
    # 20 GiB, then 5 GiB on a card of 24: refused; had it fitted, 25 GiB would be held.
    timeline = on_one_a5000(alloc(1, 20 * GIB), alloc(2, 5 * GIB), Free(lane=MAIN, block=1))
    (failure,) = timeline.out_of_memory
    assert (failure.op, failure.requested_bytes, failure.allocated_bytes) == ("block 2", 5 * GIB, 20 * GIB)
    assert failure.capacity_bytes == 24 * GIB - CUDA_CONTEXT_BYTES
    assert timeline.peaks[0].allocated_bytes == 25 * GIB


def test_one_tensor_beyond_the_range_of_expandable_segments_is_no_failure_of_ours() -> None:
    # A range is 9/8 of the card, 27 GiB: no place for 30 GiB, nor is the card.  The need is told as ever.
    graph = OpGraph("made", (Program(LANES, (alloc(1, 30 * GIB),)),), (RankProgram(0, 0),))
    config = parse_alloc_conf("expandable_segments:True")
    timeline = sim.replay(sim.place(graph, sim.load_topology("a5000x1")), allocator=config)
    assert [failure.requested_bytes for failure in timeline.out_of_memory] == [30 * GIB]
    assert timeline.peaks[0].allocated_bytes == 30 * GIB


def test_a_part_of_the_card_is_all_there_is() -> None:
    # A tenth of 24 GiB, asked for 3 GiB: refused at 2.4 GiB, whatever the card itself has, and the need is still told.
    graph = OpGraph("made", (Program(LANES, (alloc(1, 3 * GIB),)),), (RankProgram(0, 0),))
    config = parse_alloc_conf("per_process_memory_fraction:0.1")
    timeline = sim.replay(sim.place(graph, sim.load_topology("a5000x1")), allocator=config)
    (failure,) = timeline.out_of_memory
    assert (failure.op, failure.requested_bytes) == ("block 1", 3 * GIB)
    assert failure.capacity_bytes == int(0.1 * 24 * GIB)
    assert timeline.peaks[0].allocated_bytes == 3 * GIB


def test_reserved_stays_when_allocated_falls() -> None:
    timeline = on_one_a5000(alloc(1, 100 * MIB), Free(lane=MAIN, block=1))
    assert [(m.allocated_bytes, m.reserved_bytes) for m in timeline.memory] == [(100 * MIB, 100 * MIB), (0, 100 * MIB)]


def test_a_freed_block_serves_the_next_request() -> None:
    # 100 MiB freed, then 60 MiB from the same segment: nothing new is reserved.
    timeline = on_one_a5000(alloc(1, 100 * MIB), Free(lane=MAIN, block=1), alloc(2, 60 * MIB))
    assert timeline.memory[-1].reserved_bytes == 100 * MIB
    assert timeline.memory[-1].allocated_bytes == 60 * MIB
