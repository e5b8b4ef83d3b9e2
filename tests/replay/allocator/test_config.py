"""PYTORCH_CUDA_ALLOC_CONF.  The accepted strings and their values were compared with PyTorch 2.13.0."""

from __future__ import annotations

import pytest

from sim.errors import UserError
from sim.replay.allocator.config import AllocatorConfig, parse_alloc_conf
from sim.units import MIB


def test_nothing_said_is_the_default() -> None:
    assert parse_alloc_conf("") == AllocatorConfig()
    assert AllocatorConfig().max_split_size is None


def test_all_keys_at_once_white_space_ignored() -> None:
    config = parse_alloc_conf(
        " max_split_size_mb: 40 , garbage_collection_threshold : 0.5,expandable_segments:True,"
        "max_non_split_rounding_mb:30,large_segment_size_mb:24,per_process_memory_fraction:0.25,backend:native,"
    )
    assert (config.max_split_size, config.max_non_split_rounding) == (40 * MIB, 30 * MIB)
    assert (config.large_segment_size, config.garbage_collection_threshold) == (24 * MIB, 0.5)
    assert (config.expandable_segments, config.per_process_memory_fraction) == (True, 0.25)


@pytest.mark.parametrize(
    ("text", "divisions"),
    [
        ("roundup_power2_divisions:4", [4] * 16),
        # MiB 256 is the interval of index 8: all below take its value, > all above the last named
        ("roundup_power2_divisions:[256:1,512:2,1024:4,>:8]", [1] * 8 + [1, 2, 4] + [8] * 5),
        # with nothing named, > starts after the first interval
        ("roundup_power2_divisions:[>:4]", [0] + [4] * 15),
        ("roundup_power2_divisions:[1:0,65536:2]", [0] * 15 + [2]),
    ],
)
def test_roundups(text: str, divisions: list[int]) -> None:
    assert list(parse_alloc_conf(text).roundup_power2_divisions) == divisions


def test_the_later_key_wins_and_numbers_are_read_as_pytorch_does() -> None:
    # std::stoull reads leading digits
    assert parse_alloc_conf("max_split_size_mb:21,max_split_size_mb:100MB").max_split_size == 100 * MIB
    assert parse_alloc_conf("garbage_collection_threshold:0.8x").garbage_collection_threshold == 0.8


def test_keys_without_effect_are_named() -> None:
    config = parse_alloc_conf(
        "pinned_use_background_threads:True,release_lock_on_cudamalloc:True,pinned_num_register_threads:8,"
        "throw_on_cudamalloc_oom:True,pinned_reserve_segment_size_mb:5,pinned_max_cached_size_mb:7"
    )
    assert config.without_effect == (
        "pinned_use_background_threads", "release_lock_on_cudamalloc", "pinned_num_register_threads",
        "throw_on_cudamalloc_oom", "pinned_reserve_segment_size_mb", "pinned_max_cached_size_mb",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_split_size:40", "did you mean 'max_split_size_mb'"),
        ("max_split_size_mb=100", "unknown key"),
        ("max_split_size_mb", "ends where ':' is expected"),
        ("max_split_size_mb:", "ends where a number is expected"),
        ("max_split_size_mb:abc", "max_split_size_mb:abc is not a whole number"),
        ("max_split_size_mb:-5", "max_split_size_mb:-5 is not a whole number of 0 or more"),
        ("max_split_size_mb:19", "must be at least 20"),
        ("max_split_size_mb:30,large_segment_size_mb:40", "max_split_size_mb:30 is too small: it must be at least 40"),
        ("large_segment_size_mb:10", "must be larger than 10"),
        ("max_non_split_rounding_mb:10", "must be at least 20"),
        ("garbage_collection_threshold:1.0", "between 0 and 1"),
        ("garbage_collection_threshold:0", "between 0 and 1"),
        ("per_process_memory_fraction:1.5", "must lie in 0 to 1"),
        ("expandable_segments:true", "must be True or False"),
        ("roundup_power2_divisions:3", "must be a power of 2"),
        ("roundup_power2_divisions:0", "must be a power of 2"),
        ("roundup_power2_divisions:[256:3]", "power of 2, or 0"),
        ("roundup_power2_divisions:[3:2]", "no power of 2"),
        ("roundup_power2_divisions:[256:1", "expected after"),
        ("roundup_power2_divisions:[256:1,", "ends where"),
        ("expandable_segments:True garbage_collection_threshold:0.5", "must be True or False"),
        ("expandable_segments:True:", "',' expected after"),
        (",", "unknown key"),
        ("backend:cudaMallocAsync", "is not simulated"),
        ("backend:foo", "unknown"),
        ("pinned_num_register_threads:3", "power of 2"),
        ("pinned_num_register_threads:256", "at most 128"),
        ("pinned_reserve_segment_size_mb:0", "larger than 0"),
    ],
)
def test_mistakes_are_named_in_one_line(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said.replace("[", r"\[")) as problem:
        parse_alloc_conf(text)
    assert "\n" not in str(problem.value)
