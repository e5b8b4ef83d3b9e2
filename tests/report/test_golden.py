"""Whole outputs as they were last looked at; after a wanted change: ``python tools/make_goldens.py``."""

from __future__ import annotations

from pathlib import Path

import pytest
from golden_cases import goldens

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", sorted(goldens()))
def test_output_is_the_golden(name: str) -> None:
    assert goldens()[name].decode() == (GOLDEN / name).read_text(encoding="utf-8")


def test_no_golden_is_left_over() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == set(goldens())
