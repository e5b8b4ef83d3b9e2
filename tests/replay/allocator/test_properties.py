"""Laws of the allocator under random requests, streams and settings."""

from __future__ import annotations

import bisect
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.replay.allocator.blocks import Block, smallest_key
from sim.replay.allocator.caching import CachingAllocator
from sim.replay.allocator.config import parse_alloc_conf
from sim.replay.allocator.device import DeviceMemory
from sim.replay.allocator.free_list import FreeList
from sim.replay.allocator.intervals import Intervals
from sim.replay.allocator.ledger import SegmentEvent
from sim.replay.allocator.oom import OutOfMemoryError
from sim.replay.allocator.pools import BlockPool
from sim.replay.allocator.segments import SegmentView, restore, segments
from sim.units import GIB, MIB

CONFIGS = [
    "",
    "roundup_power2_divisions:4",
    "max_split_size_mb:25",
    "expandable_segments:True",
    "expandable_segments:True,large_segment_size_mb:12",
    "garbage_collection_threshold:0.4,per_process_memory_fraction:0.5",
    "expandable_segments:True,max_split_size_mb:30,garbage_collection_threshold:0.4,per_process_memory_fraction:0.5",
]

sizes = st.one_of(
    st.integers(1, 5000),
    st.integers(1, 2 * MIB),
    st.integers(1, 80 * MIB),
    st.sampled_from([MIB, MIB + 1, 10 * MIB - 1, 10 * MIB, 20 * MIB, 2 * MIB]),
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("alloc"), sizes, st.integers(0, 2)),
        st.tuples(st.just("free"), st.integers(0, 10**6), st.integers(0, 2)),
        st.tuples(st.just("record"), st.integers(0, 10**6), st.integers(0, 2)),
        st.tuples(st.just("over"), st.just(0), st.integers(0, 2)),
        st.tuples(st.just("empty"), st.just(0), st.just(0)),
    ),
    max_size=120,
)
Steps = list[tuple[str, int, int]]


class Run:
    """An allocator stepped through; what it handed out and asked for is kept."""

    def __init__(self, conf: str, total: int = GIB) -> None:
        self.events: list[SegmentEvent] = []
        self.device = DeviceMemory(total)
        self.allocator = CachingAllocator(parse_alloc_conf(conf), self.device, self.events.append)
        self.live: list[tuple[int, int]] = []
        self.addresses: list[int] = []

    def step(self, verb: str, number: int, stream: int) -> None:
        if verb == "alloc":
            try:
                got = self.allocator.malloc(number, stream)
            except OutOfMemoryError:
                return
            assert got.size >= number
            self.live.append(got)
            self.addresses.append(got.address)
        elif verb == "free" and self.live:
            self.allocator.free(self.live.pop(number % len(self.live))[0])
        elif verb == "record" and self.live:
            self.allocator.record_stream(self.live[number % len(self.live)][0], stream)
        elif verb == "over":
            self.allocator.complete_stream(stream)
        elif verb == "empty":
            self.allocator.empty_cache()

    def check(self) -> None:
        views = segments(self.allocator)
        ordered = sorted(self.live)
        assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(ordered)), "blocks overlap"
        assert sum(view.size for view in views) == self.allocator.reserved_bytes
        assert sum(size for _, size in self.live) == self.allocator.allocated_bytes
        assert self.device.free_bytes() == self.device.total_bytes - self.allocator.reserved_bytes
        came = sum(event.size for event in self.events if event.action in ("segment_alloc", "segment_map"))
        went = sum(event.size for event in self.events if event.action in ("segment_free", "segment_unmap"))
        assert came - went == self.allocator.reserved_bytes
        for view in views:
            _check_segment(view)
        assert {block.address for view in views for block in view.blocks if block.state == "active_allocated"} == {
            address for address, _ in self.live
        }


def _check_segment(view: SegmentView) -> None:
    reached = view.address
    for block in view.blocks:
        assert block.address == reached and block.size > 0 and block.size % 512 == 0
        reached += block.size
    assert reached == view.address + view.size
    states = [block.state for block in view.blocks]
    neighbours = itertools.pairwise(states)
    assert ("inactive", "inactive") not in neighbours, "free neighbours were not joined"


@pytest.mark.parametrize("conf", CONFIGS)
@given(steps=steps)
@settings(max_examples=40, deadline=None)
def test_blocks_never_overlap_and_the_books_balance(conf: str, steps: Steps) -> None:
    run = Run(conf)
    for step in steps:
        run.step(*step)
    run.check()
    # all freed and the cache emptied, nothing is left, and it behaves like a new allocator again
    for address, _ in run.live:
        run.allocator.free(address)
    run.allocator.empty_cache()
    assert segments(run.allocator) == () and list(run.allocator.blocks()) == []
    statistics = run.allocator.statistics()
    assert (statistics.allocated, statistics.active, statistics.requested, statistics.reserved) == (0, 0, 0, 0)


@pytest.mark.parametrize("conf", CONFIGS)
@given(steps=steps)
@settings(max_examples=15, deadline=None)
def test_same_input_same_addresses(conf: str, steps: Steps) -> None:
    first, second = Run(conf), Run(conf)
    for step in steps:
        first.step(*step)
        second.step(*step)
    assert first.addresses == second.addresses and first.events == second.events


@pytest.mark.parametrize("conf", CONFIGS)
@given(steps=steps)
@settings(max_examples=25, deadline=None)
def test_all_freed_equals_an_empty_allocator_with_cached_segments(conf: str, steps: Steps) -> None:
    """Freed memory is whole again: every ordinary segment is one free block, and serves what a new one would."""
    run = Run(conf)
    for step in steps:
        run.step(*step)
    for address, _ in run.live:
        run.allocator.free(address)
    run.allocator.synchronize()
    for view in segments(run.allocator):
        assert [block.state for block in view.blocks] == ["inactive"]
    assert run.allocator.allocated_bytes == 0


@pytest.mark.parametrize("conf", [conf for conf in CONFIGS if "garbage" not in conf])
@given(before=steps, after=steps)
@settings(max_examples=25, deadline=None)
def test_a_restored_allocator_goes_on_alike(conf: str, before: Steps, after: Steps) -> None:
    """An allocator given another's segments answers every request as that one does."""
    run = Run(conf, total=64 * GIB)
    for step in before:
        if step[0] != "record":  # a snapshot does not tell who else uses a block
            run.step(*step)
    run.allocator.synchronize()
    twin = CachingAllocator(run.allocator.config, run.device)
    view = segments(run.allocator)
    restore(twin, view)
    assert segments(twin) == view
    twin_asked: list[int] = []
    live = [address for address, _ in run.live]
    for verb, number, stream in after:
        if verb == "alloc":
            pool = run.allocator.pool_for_size(number, (0, 0))
            fits = run.allocator.best_fit(pool, stream, -(-number // 512) * 512)
            if fits is None or conf.startswith("roundup"):
                continue  # a new segment would have another address in each
            address = run.allocator.malloc(number, stream).address
            twin_asked.append(twin.malloc(number, stream).address)
            assert twin_asked[-1] == address
            live.append(address)
        elif verb == "free" and live:
            address = live.pop(number % len(live))
            run.allocator.free(address)
            twin.free(address)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40), st.integers(0, 40)), max_size=200), st.integers(0, 45))
@settings(max_examples=80, deadline=None)
def test_free_lists_are_ordered_sets(changes: list[tuple[bool, int, int]], size: int) -> None:
    """Against a plain sorted list, with buckets so full that they split."""
    pool = BlockPool(small=True)
    free = FreeList()
    plain: list[tuple[int, int]] = []
    held: dict[tuple[int, int], Block] = {}
    for add, blocks, address in changes:
        for spread in range(12):
            key = (blocks * 512, (address * 12 + spread) * 512)
            if add and key not in held:
                held[key] = Block(key[1], key[0], 0, pool)
                free.add(held[key])
                bisect.insort(plain, key)
            elif not add and key in held:
                free.remove(held.pop(key))
                plain.remove(key)
    assert [(block.size, block.address) for block in free] == plain and len(free) == len(plain)
    at = bisect.bisect_left(plain, (size * 512, 0))
    first = free.first_from(smallest_key(size * 512))
    assert (None if first is None else (first.size, first.address)) == (plain[at] if at < len(plain) else None)
    assert [(block.size, block.address) for block in free.upward_from(smallest_key(size * 512))] == plain[at:]
    assert [(block.size, block.address) for block in free.downward_from(smallest_key(size * 512))] == plain[:at][::-1]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 60), st.integers(1, 20)), max_size=60))
@settings(max_examples=100, deadline=None)
def test_intervals_are_sets_of_numbers(changes: list[tuple[bool, int, int]]) -> None:
    ranges, numbers = Intervals(), set[int]()
    for add, start, length in changes:
        wanted = set(range(start, start + length))
        done = ranges.add(start, start + length) if add else ranges.remove(start, start + length)
        assert done == (not wanted & numbers if add else wanted <= numbers)
        if done:
            numbers = numbers | wanted if add else numbers - wanted
    assert {number for low, high in ranges for number in range(low, high)} == numbers
    assert all((number in ranges) == (number in numbers) for number in range(90))


@pytest.mark.parametrize("conf", ["", "max_split_size_mb:25"])
def test_a_block_is_never_handed_out_twice_under_pressure(conf: str) -> None:
    run = Run(conf, total=100 * MIB)
    for number in range(2000):
        run.step("alloc" if number % 3 else "free", 1 + number * 7919 % (12 * MIB), number % 3)
    run.check()
