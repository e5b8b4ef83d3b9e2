"""What the tests share: the folder of measured data beside the checkout, where it is there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The measured data that is not part of the project; tests that need it skip where it is absent."""
    path = Path(os.environ.get("TRACESIM_SHARED", ROOT.parent / "shared"))
    if not path.is_dir():
        pytest.skip("the measured data (../shared) is not beside this checkout")
    return path


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT
