"""Against PyTorch 2.13.0 itself: its compiled allocator's answers to random requests, every address.

data/answers-2.13.0.json.gz was recorded by stub/record.py: libc10_cuda.so of the released wheel over a stub of
the CUDA runtime, which decides nothing but base addresses and room.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from sim.replay.allocator.caching import CachingAllocator
from sim.replay.allocator.config import parse_alloc_conf
from tests.replay.allocator.requests import StubMemory, served

ANSWERS: dict[str, Any] = json.loads(
    gzip.decompress((Path(__file__).parent / "data" / "answers-2.13.0.json.gz").read_bytes())
)


@pytest.mark.parametrize("case", ANSWERS)
def test_every_address_and_every_failure_is_that_of_pytorch(case: str) -> None:
    recorded = ANSWERS[case]
    device = StubMemory(recorded["total"], recorded["total"] - recorded["free"])
    allocator = CachingAllocator(parse_alloc_conf(recorded["conf"]), device)
    assert served(allocator, recorded["requests"], capturing=recorded["capturing"]) == recorded["answers"]


def test_the_recordings_exercise_what_they_are_for() -> None:
    failures = sum(isinstance(answer, str) for case in ANSWERS.values() for answer in case["answers"])
    assert len(ANSWERS) == 19
    assert failures >= 20  # real out-of-memory messages, their numbers compared as text
