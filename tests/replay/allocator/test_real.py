"""Against PyTorch itself: the answers of its compiled allocators to random requests, every address.

data/answers-*.json.gz were recorded by stub/record.py: libc10_cuda.so of the released wheels over a stub of the
CUDA runtime, which decides nothing but base addresses and room.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from sim.replay.allocator.caching import CachingAllocator
from sim.replay.allocator.config import parse_alloc_conf
from sim.replay.allocator.ordering import ordering_of
from tests.replay.allocator.requests import StubMemory, served


def answers(version: str) -> dict[str, Any]:
    path = Path(__file__).parent / "data" / f"answers-{version}.json.gz"
    return json.loads(gzip.decompress(path.read_bytes()))  # type: ignore[no-any-return]


VERSIONS = {"2.11.0": (2, 11), "2.12.1": (2, 12), "2.13.0": (2, 13)}
ANSWERS = {(version, case): answer for version in VERSIONS for case, answer in answers(version).items()}


@pytest.mark.parametrize(("version", "case"), ANSWERS)
def test_every_address_and_every_failure_is_that_of_pytorch(version: str, case: str) -> None:
    recorded = ANSWERS[version, case]
    device = StubMemory(recorded["total"], recorded["total"] - recorded["free"])
    allocator = CachingAllocator(parse_alloc_conf(recorded["conf"]), device, ordering=ordering_of(VERSIONS[version]))
    # until 2.12 use_mem_pool counts as a capture
    capturing = recorded["capturing"] or VERSIONS[version] < (2, 13)
    assert served(allocator, recorded["requests"], capturing=capturing) == recorded["answers"]


@pytest.mark.parametrize("ordering", ["address", "block"])
def test_the_order_of_another_release_gives_other_addresses(ordering: Any) -> None:
    recorded = ANSWERS["2.13.0", "streams"]
    allocator = CachingAllocator(device=StubMemory(recorded["total"], 0), ordering=ordering)
    assert served(allocator, recorded["requests"]) != recorded["answers"]


def test_the_recordings_exercise_what_they_are_for() -> None:
    assert len(ANSWERS) == 19 + 7 + 7
    failures = sum(isinstance(answer, str) for case in ANSWERS.values() for answer in case["answers"])
    assert failures >= 20  # real out-of-memory messages, their numbers compared as text
