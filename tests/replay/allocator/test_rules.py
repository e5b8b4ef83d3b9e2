"""Each rule of the allocator by itself, the expected number worked out above the assert.

Addresses are offsets from the first segment: the synthetic device puts segments one behind the other,
each on a multiple of 2 MiB.
"""

from __future__ import annotations

import pytest

from sim.errors import UserError
from sim.replay.allocator.caching import CachingAllocator
from sim.replay.allocator.config import AllocatorConfig, parse_alloc_conf
from sim.replay.allocator.device import SYNTHETIC_BASE, DeviceMemory
from sim.replay.allocator.ledger import SegmentEvent
from sim.replay.allocator.oom import OutOfMemoryError, format_size
from sim.replay.allocator.ordering import Ordering, ordering_of
from sim.replay.allocator.rounding import next_power2_division, round_size, segment_size
from sim.replay.allocator.segments import segments
from sim.units import GIB, KIB, MIB


class Machine:
    """An allocator, what it asked of the device, and addresses as offsets."""

    def __init__(self, conf: str = "", total: int = 16 * GIB, others: int = 0) -> None:
        self.events: list[SegmentEvent] = []
        self.device = DeviceMemory(total, others)
        self.allocator = CachingAllocator(parse_alloc_conf(conf), self.device, self.events.append)

    def malloc(self, nbytes: int, stream: int = 0) -> int:
        return self.allocator.malloc(nbytes, stream).address - SYNTHETIC_BASE

    def size(self, nbytes: int, stream: int = 0) -> int:
        return self.allocator.malloc(nbytes, stream).size

    def free(self, offset: int) -> None:
        self.allocator.free(offset + SYNTHETIC_BASE)

    def requested(self) -> list[tuple[str, int]]:
        asked, self.events[:] = [(event.action, event.size) for event in self.events], []
        return asked

    @property
    def reserved(self) -> int:
        return self.allocator.reserved_bytes


# rounding


@pytest.mark.parametrize(
    ("asked", "given"),
    [(1, 512), (511, 512), (512, 512), (513, 1024), (1024, 1024), (MIB + 1, MIB + 512)],
)
def test_blocks_are_multiples_of_512(asked: int, given: int) -> None:
    # the next multiple of 512, at least one
    assert round_size(asked) == given


def test_power_of_2_divisions() -> None:
    # 1200 lies between 1024 and 2048; four steps of 256: 1024, 1280. 1200 rounds up to 1280.
    assert next_power2_division(1200, 4) == 1280
    # a power of 2 stays
    assert next_power2_division(2048, 4) == 2048
    # 5 MiB between 4 and 8 MiB, steps of 1 MiB: 5 MiB is one; a byte more is 6 MiB
    assert round_size(5 * MIB, (4,) * 16) == 5 * MIB
    assert round_size(5 * MIB + 1, (4,) * 16) == 6 * MIB


def test_divisions_do_not_touch_small_sizes() -> None:
    # With 4 divisions sizes up to 4 x 512 = 2048 are rounded to 512: 1100 -> 1536.
    assert round_size(1100, (4,) * 16) == 1536
    # Above, 2049 lies between 2048 and 4096, steps of 512: 2560.
    assert round_size(2049, (4,) * 16) == 2560
    # 1 division is none: 5 MiB + 1 -> the next multiple of 512
    assert round_size(5 * MIB + 1, (1,) * 16) == 5 * MIB + 512


def test_divisions_by_interval() -> None:
    divisions = parse_alloc_conf("roundup_power2_divisions:[1:2,2:4,>:8]").roundup_power2_divisions
    # 600 KiB counts as the first interval (2 parts): between 512 KiB and 1 MiB, a step of 256 KiB: 768 KiB
    assert round_size(600 * KIB, divisions) == 768 * KIB
    # 2.1 MiB is in the second (4 parts): steps of 512 KiB: 2.5 MiB
    assert round_size(2 * MIB + 100 * KIB, divisions) == 2 * MIB + 512 * KIB
    # 4.1 MiB is above (8 parts): steps of 512 KiB: 4.5 MiB
    assert round_size(4 * MIB + 100 * KIB, divisions) == 4 * MIB + 512 * KIB


@pytest.mark.parametrize(
    ("size", "segment"),
    [
        (512, 2 * MIB),
        (MIB, 2 * MIB),  # the last small one
        (MIB + 512, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),  # the last below 10 MiB
        (10 * MIB, 10 * MIB),  # from here multiples of 2 MiB
        (10 * MIB + 512, 12 * MIB),
        (21 * MIB, 22 * MIB),
    ],
)
def test_segment_sizes(size: int, segment: int) -> None:
    assert segment_size(size) == segment


def test_large_segment_size_setting() -> None:
    machine = Machine("large_segment_size_mb:40")
    machine.malloc(3 * MIB)
    machine.malloc(30 * MIB)
    # below 10 MiB a segment of 40 MiB, whose rest of 37 MiB then holds the 30 MiB
    assert machine.requested() == [("segment_alloc", 40 * MIB)]


# pools and splitting


def test_small_and_large_requests_lie_apart() -> None:
    machine = Machine()
    # 1 MiB is the largest small one (2 MiB segment at 0); a byte more is large (20 MiB segment at 2 MiB)
    assert [machine.malloc(MIB), machine.malloc(MIB + 1), machine.malloc(MIB)] == [0, 2 * MIB, MIB]
    assert machine.requested() == [("segment_alloc", 2 * MIB), ("segment_alloc", 20 * MIB)]


def test_small_blocks_split_down_to_512() -> None:
    machine = Machine()
    first = machine.malloc(2 * KIB)
    machine.malloc(MIB)  # keeps the neighbour in use
    machine.free(first)
    # the free 2048 holds 1536 and leaves 512, which is split off and serves the next
    assert (machine.size(1536), machine.malloc(512)) == (1536, 1536)


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        # a 20 MiB segment: what remains must be more than 1 MiB to be split off
        (19 * MIB, 20 * MIB),  # 1 MiB remains: not split
        (19 * MIB - 512, 19 * MIB - 512),  # 1 MiB + 512 remains: split
        (19 * MIB + 512, 20 * MIB),
    ],
)
def test_large_blocks_split_only_above_1_mib(asked: int, given: int) -> None:
    machine = Machine()
    machine.free(machine.malloc(20 * MIB))  # a cached segment of 20 MiB
    assert machine.size(asked) == given
    assert machine.reserved == 20 * MIB


def test_best_fit_by_size_then_address() -> None:
    machine = Machine()
    kept = [machine.malloc(size * MIB) for size in (14, 12, 16, 12)]
    # segments of 14, 12, 16, 12 MiB at 0, 14, 26, 42 MiB
    assert kept == [0, 14 * MIB, 26 * MIB, 42 * MIB]
    for offset in reversed(kept):
        machine.free(offset)
    # 11.5 MiB: the smallest that fits is 12 MiB, of two the lower address; then the other; then 14
    half = 11 * MIB + 512 * KIB
    assert [machine.malloc(half) for _ in range(3)] == [14 * MIB, 42 * MIB, 0]


@pytest.mark.parametrize(
    ("ordering", "taken"),
    [
        # three equal free blocks of 20 MiB: the segments came in the order 40, 0, 20 MiB; freed in the order 20, 40, 0
        ("address", [0, 20, 40]),
        ("segment", [40, 0, 20]),  # the oldest segment first
        ("block", [40, 0, 20]),  # the oldest block first: none was split
    ],
)
def test_equal_sizes(ordering: Ordering, taken: list[int]) -> None:
    addresses = [40 * MIB, 0, 20 * MIB]

    class Chosen(DeviceMemory):
        def allocate(self, nbytes: int, stream: int) -> int | None:
            super().allocate(nbytes, stream)
            return SYNTHETIC_BASE + addresses.pop(0)

    allocator = CachingAllocator(device=Chosen(), ordering=ordering)
    for _ in range(3):
        allocator.malloc(20 * MIB)
    for offset in (20, 40, 0):
        allocator.free(SYNTHETIC_BASE + offset * MIB)
    assert [(allocator.malloc(20 * MIB).address - SYNTHETIC_BASE) // MIB for _ in range(3)] == taken


@pytest.mark.parametrize(("ordering", "taken"), [("address", 0), ("segment", 0), ("block", 2)])
def test_equal_sizes_within_a_segment(ordering: Ordering, taken: int) -> None:
    """Since 2.13 a segment's blocks share its age and the address decides; in 2.12 each block has its own."""
    allocator = CachingAllocator(ordering=ordering)
    # The segment is number 1. Splitting makes the front part the new block: numbers 2, 3, 4, 5, the rest stays 1.
    blocks = [allocator.malloc(512).address for _ in range(4)]
    allocator.free(blocks[0])
    allocator.free(blocks[1])  # joins the first and keeps its own number, 3
    # split again: the front part is number 6, the second block keeps 3 and serves the next
    assert [allocator.malloc(512).address for _ in range(2)] == blocks[:2]
    allocator.free(blocks[0])
    allocator.free(blocks[2])
    # free are the first block, number 6, and the third, number 4
    assert allocator.malloc(512).address == blocks[taken]


@pytest.mark.parametrize(
    ("version", "ordering"), [((2, 6), "address"), ((2, 11), "address"), ((2, 12), "block"), ((2, 13), "segment")]
)
def test_orderings_of_releases(version: tuple[int, int], ordering: str) -> None:
    assert ordering_of(version) == ordering


def test_streams_do_not_share_cached_blocks() -> None:
    machine = Machine()
    machine.free(machine.malloc(20 * MIB, stream=16))
    # the cached segment belongs to stream 16: stream 0 gets one of its own, behind it
    assert machine.malloc(20 * MIB, stream=0) == 20 * MIB
    assert machine.malloc(20 * MIB, stream=16) == 0


def test_freed_neighbours_are_joined() -> None:
    machine = Machine()
    a, b, c = machine.malloc(4 * MIB), machine.malloc(5 * MIB), machine.malloc(6 * MIB)
    assert (a, b, c) == (0, 4 * MIB, 9 * MIB)
    machine.free(a)
    machine.free(c)  # joins the 5 MiB left at the end
    machine.free(b)  # joins both sides: one free block of 20 MiB
    assert [view.blocks[0].size for view in segments(machine.allocator)] == [20 * MIB]
    assert machine.malloc(20 * MIB) == 0


def test_nothing_is_joined_across_segments() -> None:
    machine = Machine()
    a, b = machine.malloc(20 * MIB), machine.malloc(20 * MIB)
    machine.free(a)
    machine.free(b)
    # two neighbouring segments of 20 MiB do not make 40: a third segment is needed, at 40 MiB
    assert machine.malloc(40 * MIB) == 40 * MIB


# other streams


def test_a_block_used_elsewhere_returns_when_the_use_is_over() -> None:
    machine = Machine()
    block = machine.malloc(20 * MIB)
    machine.allocator.record_stream(SYNTHETIC_BASE + block, 7)
    (use,) = machine.allocator.free(SYNTHETIC_BASE + block)
    assert (use.stream, use.address) == (7, SYNTHETIC_BASE)
    # still in use: not allocated, but active; the next request needs a new segment
    assert machine.allocator.statistics().allocated == 0
    assert machine.allocator.statistics().active == 20 * MIB
    assert machine.malloc(20 * MIB) == 20 * MIB
    use.over()
    assert machine.malloc(20 * MIB) == 0


def test_uses_of_one_stream_end_in_order() -> None:
    machine = Machine()
    blocks = [machine.malloc(20 * MIB) for _ in range(2)]
    uses = []
    for block in blocks:
        machine.allocator.record_stream(SYNTHETIC_BASE + block, 7)
        uses += machine.allocator.free(SYNTHETIC_BASE + block)
    uses[1].over()
    # the first use on the stream is not over, so PyTorch does not look at the second
    assert machine.malloc(20 * MIB) == 40 * MIB
    uses[0].over()
    assert machine.malloc(20 * MIB) == 0


def test_the_own_stream_is_no_other_use() -> None:
    machine = Machine()
    block = machine.malloc(512, stream=3)
    machine.allocator.record_stream(SYNTHETIC_BASE + block, 3)
    assert machine.allocator.free(SYNTHETIC_BASE + block) == ()


def test_two_uses_must_both_end() -> None:
    machine = Machine()
    block = machine.malloc(20 * MIB)
    for stream in (7, 8, 7):
        machine.allocator.record_stream(SYNTHETIC_BASE + block, stream)
    uses = machine.allocator.free(SYNTHETIC_BASE + block)
    assert [use.stream for use in uses] == [7, 8]
    machine.allocator.complete_stream(7)
    assert machine.malloc(20 * MIB) == 20 * MIB
    machine.allocator.complete_stream(8)
    assert machine.malloc(20 * MIB) == 0


def test_emptying_the_cache_waits_for_streams() -> None:
    machine = Machine()
    block = machine.malloc(20 * MIB)
    machine.allocator.record_stream(SYNTHETIC_BASE + block, 7)
    machine.free(block)
    machine.allocator.empty_cache()
    assert machine.reserved == 0


# giving memory back


def test_emptying_the_cache_gives_back_whole_segments_only() -> None:
    machine = Machine()
    small = machine.malloc(512)
    machine.free(machine.malloc(20 * MIB))
    machine.free(machine.malloc(30 * MIB, stream=5))
    machine.requested()
    machine.allocator.empty_cache()
    # the large pool by (stream, size); the small segment is split, a block of it is in use
    assert machine.requested() == [("segment_free", 20 * MIB), ("segment_free", 30 * MIB)]
    machine.free(small)
    machine.allocator.empty_cache()
    assert machine.requested() == [("segment_free", 2 * MIB)]
    assert machine.reserved == 0


def test_a_full_device_makes_the_allocator_give_back_its_cache_and_try_again() -> None:
    machine = Machine(total=100 * MIB)
    machine.free(machine.malloc(30 * MIB, stream=1))
    machine.malloc(40 * MIB)
    machine.requested()
    # 70 of 100 MiB are taken, 30 of them cached for stream 1; 50 MiB fit only when those are given back
    machine.malloc(50 * MIB)
    assert machine.requested() == [("segment_free", 30 * MIB), ("segment_alloc", 50 * MIB)]
    assert machine.allocator.statistics().retries == 1


def test_out_of_memory_has_the_numbers_of_pytorchs_message() -> None:
    machine = Machine(total=100 * MIB, others=10 * MIB)
    machine.malloc(30 * MIB + 1)  # a segment of 32 MiB, split: 2 MiB - 512 remain, more than 1 MiB
    with pytest.raises(OutOfMemoryError) as failure:
        machine.allocator.malloc(61 * MIB)
    report = failure.value.report
    # the device has 100 - 10 - 32 = 58 MiB left, a segment of 62 MiB was tried
    assert (report.requested, report.tried, report.device_free) == (61 * MIB, 62 * MIB, 58 * MIB)
    # 32 MiB are reserved, 30 MiB + 512 allocated, so 2 MiB - 512 are cached but unusable
    assert (report.reserved, report.allocated) == (32 * MIB, 30 * MIB + 512)
    assert report.cached_but_unusable == 2 * MIB - 512
    assert str(failure.value) == (
        "CUDA out of memory. Tried to allocate 62.00 MiB. GPU 0 has a total capacity of 100.00 MiB of which "
        "58.00 MiB is free. Of the allocated memory 30.00 MiB is allocated by PyTorch, and 2.00 MiB is reserved "
        "by PyTorch but unallocated."
    )
    # nothing changed: a smaller request still works
    assert machine.malloc(58 * MIB) == 32 * MIB


def test_sizes_in_messages() -> None:
    # up to and including 1024 of a unit stay in the smaller unit
    assert [format_size(size) for size in (512, 1024, 1536, MIB, MIB + 1, GIB, 3 * GIB // 2)] == [
        "512 bytes", "1024 bytes", "1.50 KiB", "1024.00 KiB", "1.00 MiB", "1024.00 MiB", "1.50 GiB",
    ]  # fmt: skip


def test_memory_fraction() -> None:
    machine = Machine(total=100 * MIB)
    machine.allocator.set_memory_fraction(0.5)
    machine.malloc(30 * MIB)
    with pytest.raises(OutOfMemoryError, match=r"50\.00 MiB allowed"):
        machine.malloc(22 * MIB)  # 30 + 22 > 50
    assert machine.malloc(20 * MIB) == 30 * MIB  # exactly 50


# max_split_size_mb


def test_oversize_blocks_are_neither_split_nor_given_to_small_requests() -> None:
    machine = Machine("max_split_size_mb:30")
    machine.free(machine.malloc(30 * MIB))
    # 30 MiB is oversize (>= 30); a request of 12 MiB does not get it, though it fits
    assert machine.malloc(12 * MIB) == 30 * MIB
    # one of 30 MiB does
    assert machine.malloc(30 * MIB) == 0


def test_a_block_below_the_limit_is_split() -> None:
    machine = Machine("max_split_size_mb:30")
    machine.free(machine.malloc(28 * MIB))
    assert machine.size(12 * MIB) == 12 * MIB
    assert machine.malloc(14 * MIB) == 12 * MIB  # the rest of 16 MiB


def test_an_oversize_request_wastes_less_than_the_rounding() -> None:
    machine = Machine("max_split_size_mb:30")
    machine.free(machine.malloc(60 * MIB))
    # 60 MiB for 40 MiB wastes 20 MiB: not less than 20 MiB, so a new segment of 40 MiB at 60 MiB
    assert machine.malloc(40 * MIB) == 60 * MIB
    # for 40 MiB + 512 it wastes 20 MiB - 512, and is given whole
    assert machine.size(40 * MIB + 512) == 60 * MIB


def test_the_rounding_can_be_set() -> None:
    machine = Machine("max_split_size_mb:30,max_non_split_rounding_mb:25")
    machine.free(machine.malloc(60 * MIB))
    assert machine.size(40 * MIB) == 60 * MIB  # 20 MiB wasted < 25


def test_oversize_blocks_are_given_back_first() -> None:
    machine = Machine("max_split_size_mb:30", total=220 * MIB)
    for size in (70, 40, 31, 28):
        machine.malloc(size * MIB, stream=2)
    for view in segments(machine.allocator):
        machine.allocator.free(view.address)
    machine.malloc(20 * MIB, stream=1)
    machine.requested()
    # 70+40+32+28+20 = 190 of 220 MiB. A request of 50 MiB on stream 2: 70 MiB would waste 20, no fit, and the
    # device has only 30. The smallest oversize block of at least 50 MiB is the one of 70; the others stay.
    machine.malloc(50 * MIB, stream=2)
    assert machine.requested() == [("segment_free", 70 * MIB), ("segment_alloc", 50 * MIB)]


def test_several_oversize_blocks_largest_first() -> None:
    machine = Machine("max_split_size_mb:30", total=130 * MIB)
    for size in (32, 40, 36):
        machine.malloc(size * MIB)
    for view in segments(machine.allocator):
        machine.allocator.free(view.address)
    machine.requested()
    # no block of 70 MiB: the largest first, 40 + 36 = 76 are enough, 32 stays. 130 - 32 = 98 >= 70.
    machine.malloc(70 * MIB)
    assert machine.requested() == [
        ("segment_free", 40 * MIB), ("segment_free", 36 * MIB), ("segment_alloc", 70 * MIB),
    ]  # fmt: skip


# garbage collection


def test_garbage_collection_gives_back_whole_segments_above_the_threshold() -> None:
    machine = Machine("garbage_collection_threshold:0.5", total=200 * MIB)
    machine.allocator.set_memory_fraction(0.9)  # 180 MiB allowed, collected above 90
    old = machine.malloc(40 * MIB)
    new = machine.malloc(30 * MIB)
    machine.malloc(30 * MIB)
    machine.free(old)
    machine.malloc(MIB + 1)  # splits the free 40 MiB
    machine.free(new)
    machine.requested()
    # Reserved 100 MiB > 90. Of the free blocks only the one of 30 MiB is a whole segment; it is given back.
    machine.malloc(60 * MIB)
    assert machine.requested() == [("segment_free", 30 * MIB), ("segment_alloc", 60 * MIB)]


def test_garbage_collection_at_every_new_segment() -> None:
    machine = Machine("garbage_collection_threshold:0.5", total=200 * MIB)
    machine.allocator.set_memory_fraction(0.9)
    blocks = [machine.malloc(30 * MIB) for _ in range(4)]
    machine.free(blocks[0])
    machine.requested()
    # reserved 120 > 90 and blocks[0] is the only free segment: its age is the average, so it goes
    machine.malloc(31 * MIB)
    assert machine.requested() == [("segment_free", 30 * MIB), ("segment_alloc", 32 * MIB)]
    machine.free(blocks[1])
    # reserved 3 x 30 + 32 = 122 > 90: now blocks[1] is the only one
    machine.malloc(33 * MIB)
    assert machine.requested() == [("segment_free", 30 * MIB), ("segment_alloc", 34 * MIB)]


def test_garbage_collection_needs_a_memory_fraction() -> None:
    machine = Machine("garbage_collection_threshold:0.1", total=200 * MIB)
    machine.free(machine.malloc(60 * MIB))
    machine.requested()
    machine.malloc(70 * MIB)
    assert machine.requested() == [("segment_alloc", 70 * MIB)]


def test_garbage_collection_goes_by_average_age() -> None:
    machine = Machine("garbage_collection_threshold:0.1", total=1000 * MIB)
    machine.allocator.set_memory_fraction(0.9)  # collected above 90 MiB
    a, b, c = (machine.malloc(size * MIB) for size in (20, 22, 24))
    machine.free(a)  # searches so far: 3; its age counts from here
    machine.malloc(40 * MIB)  # search 4: no fit, reserved 66 < 90: nothing collected
    machine.free(b)
    machine.free(c)
    machine.requested()
    # search 5 for 50 MiB; reserved 106 > 90, target 16. Ages: a 2, b 1, c 1; the average is 4/3, only a is
    # at least that old. Its 20 MiB reach the target.
    machine.malloc(50 * MIB)
    assert machine.requested() == [("segment_free", 20 * MIB), ("segment_alloc", 50 * MIB)]


# expandable segments


def expandable(conf: str = "expandable_segments:True", total: int = 160 * MIB) -> Machine:
    return Machine(conf, total)


def test_expandable_segments_grow_by_pages() -> None:
    machine = expandable()
    machine.malloc(512)
    machine.malloc(3 * MIB)
    machine.malloc(30 * MIB)
    # small pool: a page of 2 MiB; large pool: a page of 20 MiB; the 17 MiB left there count towards the 30: 13
    # are missing, one page
    assert machine.requested() == [("segment_map", 2 * MIB), ("segment_map", 20 * MIB), ("segment_map", 20 * MIB)]


def test_expandable_blocks_lie_behind_one_another() -> None:
    machine = expandable()
    first = machine.malloc(3 * MIB)
    # split down to 512 bytes, unlike ordinary large segments: the next block starts right behind
    assert machine.malloc(30 * MIB) - first == 3 * MIB
    assert machine.malloc(512 + MIB) - first == 33 * MIB
    # 34 MiB + 512 of 40 MiB are used, one segment on the books
    assert len(segments(machine.allocator)) == 1


def test_expandable_pages_are_given_back_one_by_one() -> None:
    machine = expandable()
    blocks = [machine.malloc(25 * MIB) for _ in range(4)]  # 100 MiB: five pages of 20 MiB
    machine.requested()
    machine.free(blocks[1])  # 25 to 50 MiB: the pages 20 to 40 and 40 to 60 are both in use by others
    machine.allocator.empty_cache()
    assert machine.requested() == []
    machine.free(blocks[2])  # 25 to 75 MiB: whole pages are 40 to 60 MiB
    machine.allocator.empty_cache()
    assert machine.requested() == [("segment_unmap", 20 * MIB)]
    assert [(view.address - blocks[0] - SYNTHETIC_BASE, view.size) for view in segments(machine.allocator)] == [
        (0, 40 * MIB), (60 * MIB, 40 * MIB),
    ]  # fmt: skip


def test_the_lowest_gap_is_filled_first() -> None:
    machine = expandable()
    blocks = [machine.malloc(20 * MIB) for _ in range(4)]
    machine.free(blocks[1])
    machine.allocator.empty_cache()
    machine.requested()
    # the gap of one page at 20 MiB holds 20 MiB; it is mapped again
    assert machine.malloc(20 * MIB) == blocks[1]
    # 20 MiB + 512 would not have fitted there
    machine.free(blocks[1])
    machine.allocator.empty_cache()
    assert machine.malloc(20 * MIB + 512) == blocks[0] + 80 * MIB


def test_best_fit_counts_what_a_block_can_grow_into() -> None:
    machine = expandable()
    blocks = [machine.malloc(size * MIB) for size in (12, 5, 20)]  # 0-12, 12-17, 17-37 of 40 MiB; 3 MiB free behind
    machine.free(blocks[0])
    # 2 MiB: the free 3 MiB at the end fit best by size, but they can grow to the whole range; the 12 MiB cannot,
    # so they count as smaller and are taken
    assert machine.malloc(2 * MIB) == blocks[0]


def test_a_range_that_is_all_given_back_is_given_up() -> None:
    machine = expandable()
    first = machine.malloc(30 * MIB)
    machine.free(first)
    machine.allocator.empty_cache()
    assert machine.reserved == 0
    # a new range: 160 MiB * 9/8 = 180 MiB of addresses, 9 pages of 20 MiB, further on
    assert machine.malloc(30 * MIB) == first + 180 * MIB


def test_expandable_out_of_memory_gives_back_and_tries_again() -> None:
    machine = expandable(total=100 * MIB)
    machine.free(machine.malloc(70 * MIB, stream=1))  # four pages
    machine.requested()
    machine.malloc(30 * MIB)  # two pages; the device has 20 MiB left
    assert machine.requested() == [("segment_unmap", 80 * MIB), ("segment_map", 40 * MIB)]


def test_switched_off_expandable_blocks_are_passed_over() -> None:
    machine = expandable()
    block = machine.malloc(30 * MIB)
    machine.free(block)
    machine.allocator.reconfigure(AllocatorConfig())
    # the free expandable block is not used; an ordinary segment is asked for
    machine.requested()
    assert machine.malloc(30 * MIB) == 0
    assert machine.requested() == [("segment_alloc", 30 * MIB)]
    machine.allocator.reconfigure(AllocatorConfig(expandable_segments=True))
    assert machine.malloc(30 * MIB) == block


# private pools


def test_a_private_pool_keeps_its_memory_until_it_is_released() -> None:
    machine = Machine()
    machine.allocator.begin_pool((1, 0), lambda stream: stream == 5)
    inside = machine.malloc(20 * MIB, stream=5)
    outside = machine.malloc(20 * MIB, stream=0)
    machine.allocator.end_pool((1, 0))
    machine.free(inside)
    machine.free(outside)
    # stream 5 outside the capture does not get the pool's block, though it is its own stream's
    assert machine.malloc(20 * MIB, stream=5) == 40 * MIB
    machine.requested()
    machine.allocator.empty_cache()
    assert machine.requested() == [("segment_free", 20 * MIB)]  # stream 0's; the pool keeps its own
    machine.allocator.release_pool((1, 0))
    machine.allocator.empty_cache()
    assert machine.requested() == [("segment_free", 20 * MIB)]


def test_nothing_is_given_back_during_a_capture() -> None:
    machine = Machine(total=50 * MIB)
    machine.free(machine.malloc(30 * MIB))
    machine.allocator.begin_pool((1, 0))
    with pytest.raises(OutOfMemoryError):
        machine.malloc(30 * MIB, stream=5)
    machine.allocator.end_pool((1, 0))
    # after it, the cache is given back for the request
    assert machine.malloc(30 * MIB, stream=5) == 30 * MIB


def test_uses_recorded_during_a_capture_end_with_it() -> None:
    machine = Machine()
    block = machine.malloc(20 * MIB)
    machine.allocator.begin_pool((1, 0), lambda stream: stream == 9)
    machine.allocator.record_stream(SYNTHETIC_BASE + block, 9)
    assert machine.allocator.free(SYNTHETIC_BASE + block) == ()
    assert machine.malloc(20 * MIB) == 20 * MIB  # not free during the capture
    machine.allocator.end_pool((1, 0))
    assert machine.malloc(20 * MIB) == 0


def test_private_free_memory_is_named_when_memory_runs_out() -> None:
    machine = Machine(total=60 * MIB)
    machine.allocator.begin_pool((1, 0))
    block = machine.malloc(20 * MIB)
    machine.allocator.end_pool((1, 0))
    machine.free(block)
    with pytest.raises(OutOfMemoryError) as failure:
        machine.malloc(50 * MIB)
    # 20 MiB lie free in the pool: PyTorch counts them as allocated
    assert failure.value.report.private_pools == 20 * MIB
    assert "with 20.00 MiB allocated in private pools (e.g., CUDA Graphs), and 0 bytes is reserved" in str(
        failure.value
    )


# statistics and misuse


def test_statistics() -> None:
    machine = Machine()
    block = machine.malloc(1000)
    machine.malloc(3 * MIB)
    machine.free(block)
    now = machine.allocator.statistics()
    # 1000 is a block of 1024; 3 MiB stay; segments of 2 and 20 MiB
    assert (now.allocated, now.peak_allocated) == (3 * MIB, 3 * MIB + 1024)
    assert (now.requested, now.peak_requested) == (3 * MIB, 3 * MIB + 1000)
    assert (now.reserved, now.peak_reserved, now.allocations) == (22 * MIB, 22 * MIB, 2)
    machine.allocator.reset_peaks()
    assert machine.allocator.statistics().peak_allocated == 3 * MIB


def test_nothing_is_nothing() -> None:
    machine = Machine()
    # PyTorch answers 0 bytes with the null pointer
    assert machine.allocator.malloc(0) == (0, 0)
    machine.allocator.free(0)
    assert machine.reserved == 0


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda allocator: allocator.malloc(-5), "-5 bytes cannot be allocated"),
        (lambda allocator: allocator.free(4096), "nothing is allocated at 0x1000"),
        (lambda allocator: allocator.record_stream(4096, 1), "nothing is allocated at 0x1000"),
        (lambda allocator: allocator.set_memory_fraction(1.5), "a memory fraction of 1.5"),
        (lambda allocator: allocator.end_pool((1, 0)), r"memory pool \(1, 0\) is not in use"),
        (lambda allocator: allocator.release_pool((1, 0)), r"memory pool \(1, 0\) is unknown"),
        (lambda allocator: [allocator.begin_pool((1, 0)) for _ in range(2)], "in use already"),
    ],
)
def test_misuse_is_told_in_one_line(act, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=said) as problem:
        act(Machine().allocator)
    assert "\n" not in str(problem.value)


def test_a_double_free_is_refused() -> None:
    machine = Machine()
    block = machine.malloc(512)
    machine.free(block)
    with pytest.raises(UserError, match="freed already"):
        machine.free(block)


def test_an_exabyte_is_refused_before_anything_is_tried() -> None:
    machine = Machine()
    with pytest.raises(OutOfMemoryError):
        machine.malloc(1 << 60)
    assert machine.requested() == []
