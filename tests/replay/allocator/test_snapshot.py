"""Recorded histories replayed: measured ones, ones made by hand, and damaged ones."""

from __future__ import annotations

import dataclasses
import gzip
import json
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sim.errors import InputError
from sim.replay.allocator import caching
from sim.replay.allocator.recording import typed_recording
from sim.replay.allocator.snapshot import Mismatch, SnapshotReplay, replay_recording, replay_snapshot
from sim.units import MIB

DATA = Path(__file__).parent / "data"
VERSIONS = ("2.11.0", "2.12.1", "2.13.0")


def histories(version: str) -> dict[str, Any]:
    return json.loads(gzip.decompress((DATA / f"histories-{version}.json.gz").read_bytes()))  # type: ignore[no-any-return]


RECORDED = {(version, case): history for version in VERSIONS for case, history in histories(version).items()}
HISTORIES = histories("2.11.0")
BASE = 0x7F0000000000
Event = dict[str, Any]


def replay(data: object) -> SnapshotReplay:
    return replay_recording(typed_recording(data, "snapshot.pickle"))


def everything_matched(done: SnapshotReplay) -> None:
    assert done.first_mismatch is None
    assert done.allocations_matched == done.allocations_checked
    assert done.segments_matched == done.segments_checked
    assert done.segments_released_matched == done.segments_released_checked
    assert done.out_of_memory_matched == done.out_of_memory_checked


# measured on GPUs


@pytest.mark.parametrize(
    ("name", "allocations", "requested"),
    [("forward_100", 785, 31), ("forward_backward_100", 3853, 65), ("forward_200_mixed", 995, 47)],
)
def test_complete_recordings_to_the_last_address(shared_dir: Path, name: str, allocations: int, requested: int) -> None:
    done = replay_snapshot(shared_dir / "data" / "snapshots" / f"{name}.pickle")
    everything_matched(done)
    # as many as the recording has alloc and segment_alloc events
    assert (done.allocations_checked, done.segments_checked) == (allocations, requested)
    assert done.not_predictable == 0


def test_a_recording_begun_midway_on_expandable_segments(shared_dir: Path) -> None:
    done = replay_snapshot(shared_dir / "data" / "snapshots" / "expandable_midrun.pickle")
    everything_matched(done)
    # all 1704 lie in memory that was there before; its state at the start follows from the segments at the end
    assert (done.allocations_checked, done.not_predictable) == (1704, 0)


def test_a_wrong_rule_would_be_seen(shared_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # requests of exactly 1 MiB counted as large, and another split threshold
    monkeypatch.setattr(caching, "SMALL_SIZE", 511)
    done = replay_snapshot(shared_dir / "data" / "snapshots" / "forward_backward_100.pickle")
    assert done.first_mismatch is not None and done.allocations_matched < done.allocations_checked


# recorded from PyTorch's compiled allocator over a stub of the CUDA runtime (stub/record.py)


@pytest.mark.parametrize(("version", "case"), RECORDED)
def test_recorded_histories(version: str, case: str) -> None:
    data = RECORDED[version, case]
    done = replay(data)
    everything_matched(done)
    events = [event["action"] for trace in data["device_traces"] for event in trace]
    counted = done.allocations_checked + done.segments_checked + done.segments_released_checked
    counted += done.out_of_memory_checked + done.not_predictable
    kinds = ("alloc", "segment_alloc", "segment_map", "segment_free", "segment_unmap", "oom")
    assert counted == sum(events.count(kind) for kind in kinds)
    assert not any("left out" in note for note in done.notes)
    if "midway" not in case or (version == "2.11.0" and "garbage" not in case):
        assert done.not_predictable == 0
    else:
        # how old segments are that were there before is not known, and 2.12 and 2.13 take the oldest
        assert done.not_predictable < 0.05 * counted


def test_the_release_is_found_out() -> None:
    notes = {version: replay(RECORDED[version, "streams"]).notes for version in VERSIONS}
    assert notes["2.11.0"] == ()
    assert notes["2.12.1"] == ("of free blocks of one size the oldest block is taken, as in PyTorch 2.12",)
    assert notes["2.13.0"] == ("of free blocks of one size the oldest segment is taken, as in PyTorch since 2.13",)


@pytest.mark.parametrize("case", ["streams", "expandable, little memory", "max split"])
def test_ring_buffers_that_dropped_the_beginning(case: str) -> None:
    data = HISTORIES[case]
    for kept in (1000, 400, 50, 3, 1):
        cut = {**data, "device_traces": [trace[-kept:] for trace in data["device_traces"]]}
        done = replay(cut)
        everything_matched(done)
        assert done.not_predictable == 0


def test_without_the_list_of_segments_only_new_memory_is_checked() -> None:
    data = HISTORIES["streams, begun midway"]
    done = replay({**data, "segments": []})
    everything_matched(done)
    assert done.not_predictable > 0 and done.segments_checked > 0 and "left out" in done.notes[0]


def test_several_devices_are_added_up() -> None:
    one, two = HISTORIES["streams"], HISTORIES["little memory, begun midway"]
    moved = [{**segment, "device": 1} for segment in two["segments"]]
    done = replay(
        {
            "segments": one["segments"] + moved,
            "device_traces": [one["device_traces"][0], two["device_traces"][0], []],
            "allocator_settings": two["allocator_settings"],
        }
    )
    alone = [replay(data) for data in (one, two)]
    everything_matched(done)
    assert done.allocations_checked == sum(each.allocations_checked for each in alone)
    assert done.segments_checked == sum(each.segments_checked for each in alone)
    # the peaks are those of the device that allocates most
    assert done.peak_allocated_bytes == max(each.peak_allocated_bytes for each in alone)


def test_settings_are_those_of_the_snapshot() -> None:
    data = HISTORIES["max split"]
    assert data["allocator_settings"]["max_split_size"] == 25 * MIB
    without = {**data, "allocator_settings": {**data["allocator_settings"], "max_split_size": -1}}
    without["allocator_settings"]["PYTORCH_CUDA_ALLOC_CONF"] = ""
    assert replay(without).first_mismatch is not None


@pytest.mark.parametrize("left_out", ["free_requested", "snapshot"])
def test_histories_without_some_actions(left_out: str) -> None:
    data = HISTORIES["little memory"]
    traces = [[event for event in trace if event["action"] != left_out] for trace in data["device_traces"]]
    everything_matched(replay({**data, "device_traces": traces}))


# made by hand


def event(action: str, address: int, size: int, stream: int = 0) -> Event:
    return {"action": action, "addr": BASE + address, "size": size, "stream": stream, "time_us": 0}


def failure(size: int, free: int = 0) -> Event:
    return {"action": "oom", "device_free": free, "size": size, "stream": 0}


def free(address: int, size: int) -> list[Event]:
    return [event("free_requested", address, size), event("free_completed", address, size)]


def trace(*events: Event | list[Event]) -> dict[str, Any]:
    flat: list[Event] = []
    for each in events:
        flat += each if isinstance(each, list) else [each]
    return {"segments": [], "device_traces": [flat]}


def test_peaks_and_fragmentation() -> None:
    done = replay(
        trace(
            event("segment_alloc", 0, 20 * MIB),
            event("alloc", 0, 5 * MIB),
            event("alloc", 5 * MIB, 4 * MIB),
            free(0, 5 * MIB),
            event("segment_alloc", 20 * MIB, 2 * MIB),
            event("alloc", 20 * MIB, 100),
        )
    )
    everything_matched(done)
    # at most 5 + 4 MiB are allocated, of 20 MiB reserved then: 11/20 are not in use; 22 MiB are reserved at the end
    assert (done.peak_allocated_bytes, done.peak_reserved_bytes) == (9 * MIB, 22 * MIB)
    assert done.fragmentation_at_peak == pytest.approx(11 / 20)


def test_a_wrong_address_is_named() -> None:
    done = replay(
        trace(event("segment_alloc", 0, 20 * MIB), event("alloc", 0, 5 * MIB), event("alloc", 6 * MIB, 4 * MIB))
    )
    assert done.first_mismatch == Mismatch(2, "alloc", BASE + 6 * MIB, BASE + 5 * MIB)
    assert (done.allocations_matched, done.allocations_checked) == (1, 2)


def test_a_wrong_segment_size_is_named() -> None:
    done = replay(trace(event("segment_alloc", 0, 22 * MIB), event("alloc", 0, 5 * MIB)))
    assert done.first_mismatch == Mismatch(0, "segment_alloc", 22 * MIB, 20 * MIB)
    assert (done.segments_matched, done.segments_checked) == (0, 1)


def test_a_segment_that_was_not_needed_is_named() -> None:
    done = replay(
        trace(
            event("segment_alloc", 0, 20 * MIB), event("alloc", 0, 5 * MIB),
            event("segment_alloc", 20 * MIB, 20 * MIB), event("alloc", 20 * MIB, 5 * MIB),
            event("alloc", 25 * MIB, 3 * MIB),
        )
    )  # fmt: skip
    # the first segment had 15 MiB left
    assert done.first_mismatch == Mismatch(2, "segment_alloc", 20 * MIB, None)
    assert (done.segments_matched, done.segments_checked) == (1, 2)
    assert (done.allocations_matched, done.allocations_checked) == (1, 3)


def test_a_segment_that_was_needed_is_named() -> None:
    done = replay(
        trace(event("segment_alloc", 0, 20 * MIB), event("alloc", 0, 15 * MIB), event("alloc", 16 * MIB, 9 * MIB))
    )
    # 10 MiB segments serve 15 MiB with a segment of 16: the recorded 20 MiB differ first
    assert done.first_mismatch == Mismatch(0, "segment_alloc", 20 * MIB, 16 * MIB)


def test_a_wrong_order_of_releases_is_named() -> None:
    segments = [event("segment_alloc", 0, 20 * MIB), event("alloc", 0, 20 * MIB)]
    segments += [event("segment_alloc", 20 * MIB, 30 * MIB), event("alloc", 20 * MIB, 30 * MIB)]
    freed = free(0, 20 * MIB) + free(20 * MIB, 30 * MIB)
    small_first = [event("segment_free", 0, 20 * MIB), event("segment_free", 20 * MIB, 30 * MIB)]
    everything_matched(replay(trace(segments, freed, small_first)))
    done = replay(trace(segments, freed, small_first[::-1]))
    assert done.first_mismatch == Mismatch(8, "segment_free", BASE + 20 * MIB, BASE)
    assert (done.segments_released_matched, done.segments_released_checked) == (0, 2)


def test_a_block_in_use_elsewhere_is_not_reused_until_its_free_is_completed() -> None:
    start = [event("segment_alloc", 0, 20 * MIB), event("alloc", 0, 20 * MIB), event("free_requested", 0, 20 * MIB)]
    second = [event("segment_alloc", 20 * MIB, 20 * MIB), event("alloc", 20 * MIB, 20 * MIB)]
    third = [event("free_completed", 0, 20 * MIB), event("alloc", 0, 20 * MIB)]
    done = replay(trace(start, second, third))
    everything_matched(done)
    assert done.allocations_checked == 3


def test_a_failed_request_after_the_cache_was_emptied() -> None:
    done = replay(
        trace(
            event("segment_alloc", 0, 20 * MIB), event("alloc", 0, 20 * MIB), free(0, 20 * MIB),
            event("segment_free", 0, 20 * MIB), failure(1 << 40, free=30 * MIB),
        )
    )  # fmt: skip
    everything_matched(done)
    assert (done.out_of_memory_checked, done.segments_released_checked) == (1, 1)


def test_a_failure_where_the_cache_had_room_is_named() -> None:
    done = replay(trace(event("segment_alloc", 0, 20 * MIB), event("alloc", 0, 5 * MIB), failure(4 * MIB)))
    assert done.first_mismatch == Mismatch(2, "oom", None, BASE + 5 * MIB)
    assert (done.out_of_memory_matched, done.out_of_memory_checked) == (0, 1)


def test_the_state_at_the_start_is_worked_out_backwards() -> None:
    """A block of 19.5 MiB in a segment of 20 was not split: freed, it leaves all 20 MiB, and 20 MiB fit."""
    data = trace(free(0, 19 * MIB + MIB // 2), event("alloc", 0, 20 * MIB))
    data["segments"] = [
        {
            "device": 0, "address": BASE, "total_size": 20 * MIB, "stream": 0, "segment_type": "large",
            "blocks": [{"size": 20 * MIB, "requested_size": 20 * MIB, "state": "active_allocated"}],
        }
    ]  # fmt: skip
    done = replay(data)
    everything_matched(done)
    assert (done.allocations_checked, done.not_predictable) == (1, 0)
    # 20 MiB were there from the start, 19.5 + 0.5 allocated
    assert done.peak_allocated_bytes == 20 * MIB


# what is no recording


SMALL = event("segment_alloc", 0, 2 * MIB)


class Evil:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (print, ("executed",))


def write(path: Path, data: object) -> Path:
    path.write_bytes(pickle.dumps(data))
    return path


def one(**changes: object) -> dict[str, Any]:
    return {"segments": [], "device_traces": [[{**event("alloc", 0, 512), **changes}]]}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([1, 2], "not a memory snapshot but a list"),
        ({"segments": []}, "has no device_traces"),
        ({"segments": [], "device_traces": []}, "device_traces are empty"),
        ({"segments": [], "device_traces": [[], []]}, "device_traces are empty"),
        ({"segments": [], "device_traces": 5}, "device_traces is a int"),
        ({"segments": [], "device_traces": [5]}, r"device_traces\[0\] is a int"),
        ({"segments": 5, "device_traces": [[]]}, "segments is a int"),
        ({"segments": [5], "device_traces": [[]]}, r"segments\[0\] is a int"),
        ({"segments": [], "device_traces": [[5]]}, r"device_traces\[0\]\[0\] is a int"),
        ({"segments": [], "device_traces": [[{}]]}, "has no action"),
        (one(action="aloc"), "did you mean 'alloc'"),
        (one(size=-5), "size is -5, which cannot be negative"),
        (one(addr=-5), "addr is -5, which cannot be negative"),
        (one(addr=1 << 64), "beyond every address"),
        (one(size=1.5), "size is 1.5, not a whole number"),
        (one(size=True), "size is True, not a whole number"),
        (one(addr=None), "addr is missing"),
        (one(stream="x"), "stream is 'x', not a whole number"),
        (one(pool_id="x"), "not a pair of whole numbers"),
        (trace(SMALL, free(4096, 512)), "a free of an unknown address: nothing was allocated"),
        (trace(SMALL, event("alloc", 0, 9), free(1 << 30, 512)), "a free of an unknown address: no event"),
        (trace(SMALL, event("alloc", 0, 9), event("free_requested", 4, 9)), "a free of an unknown address: nothing"),
        (
            trace(SMALL, event("alloc", 0, 9), event("free_requested", 1 << 30, 9), event("free_completed", 0, 9)),
            "a free of an unknown address: nothing was allocated there",
        ),
        (trace(free(0, 512)), "a free of an unknown address: no event allocates it"),
        (
            trace(event("segment_alloc", 0, 2 * MIB), event("alloc", 0, 9), free(0, 9), free(0, 9)),
            "a free of an unknown address: it is freed already",
        ),
        (trace(event("segment_alloc", 0, 2 * MIB), event("alloc", 0, 9), event("alloc", 0, 9)), "is allocated already"),
        (trace(event("segment_alloc", 0, 2 * MIB), event("segment_alloc", 512, 2 * MIB)), "overlaps memory"),
        (
            trace(event("segment_alloc", 0, 2 * MIB), event("alloc", 0, 9), event("free_completed", 0, 9),
                  event("free_requested", 0, 9)),
            "nobody requested the free",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_named_in_one_line(data: object, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "snapshot.pickle", data)
    with pytest.raises(InputError, match=said) as problem:
        replay_snapshot(path)
    assert str(problem.value).startswith(str(path)) and "\n" not in str(problem.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"total_size": 1}, "do not add up"),
        ({"address": -1}, "cannot be negative"),
        ({"segment_type": "middle"}, "not 'small' or 'large'"),
        ({"blocks": None}, "blocks is a NoneType"),
        ({"blocks": [7]}, "is a int, not a block"),
        ({"blocks": [{"size": 2 * MIB, "state": "busy"}]}, "state 'busy'"),
        ({"blocks": [{"state": "inactive"}]}, "size is missing"),
        ({"segment_pool_id": 7}, "not a pair"),
    ],
)
def test_mistakes_in_segments(changes: dict[str, Any], said: str) -> None:
    segment = {
        "address": BASE, "total_size": 2 * MIB, "segment_type": "small",
        "blocks": [{"size": 2 * MIB, "state": "inactive"}],
    }  # fmt: skip
    data = trace(event("segment_alloc", 0, 2 * MIB), event("alloc", 0, 512))
    with pytest.raises(InputError, match=said):
        replay({**data, "segments": [{**segment, **changes}]})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("garbage", "allocator_settings is a str, not settings by name"),
        ([1], "allocator_settings is a list"),
        ({"max_split_size": "20"}, "max_split_size is '20', not int"),
        ({"PYTORCH_CUDA_ALLOC_CONF": 7}, "PYTORCH_CUDA_ALLOC_CONF is 7, not str"),
        ({"expandable_segments": 1, "garbage_collection_threshold": None}, "and 1 more problems"),
    ],
)
def test_settings_that_are_none(settings: object, said: str) -> None:
    data = trace(event("segment_alloc", 0, 2 * MIB), event("alloc", 0, 512))
    with pytest.raises(InputError, match=said):
        replay({**data, "allocator_settings": settings})


def test_all_problems_are_counted() -> None:
    data = one(size=-5)
    data["device_traces"][0] *= 3
    with pytest.raises(InputError, match="and 2 more problems"):
        replay(data)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (pickle.dumps({"device_traces": [[Evil()]]}), "wants to run builtins.print"),
        (pickle.dumps(OrderedDict()), "wants to run collections.OrderedDict"),
        (pickle.dumps({"device_traces": [[]] * 9})[:20], "not a whole pickle"),
        (b"", "not a whole pickle"),
        (b"\x80\x04garbage", "not a whole pickle"),
        (b"not a pickle at all", "not a whole pickle"),
    ],
)
def test_pickles_that_are_not_plain_data(content: bytes, said: str, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(content)
    with pytest.raises(InputError, match=said) as problem:
        replay_snapshot(path)
    assert "\n" not in str(problem.value) and "executed" not in capsys.readouterr().out


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        replay_snapshot(tmp_path / "none.pickle")


def test_containers_of_plain_data_are_read(tmp_path: Path) -> None:
    data: dict[str, Any] = trace(event("segment_alloc", 0, 2 * MIB), event("alloc", 0, 512))
    data["external_annotations"] = [{"seen": {1, 2}, "kept": frozenset({3}), "raw": bytearray(b"x")}]
    everything_matched(replay_snapshot(write(tmp_path / "snapshot.pickle", data)))


def test_the_result_is_frozen() -> None:
    done = replay(trace(event("segment_alloc", 0, 2 * MIB), event("alloc", 0, 512)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        done.not_predictable = 7  # type: ignore[misc]
