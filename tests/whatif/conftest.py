"""A small job that what-ifs can be tried on."""

from __future__ import annotations

from pathlib import Path

import pytest

from sim import graph as graphs
from tests.whatif.layers import layered


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layers of the closed form over eight ranks, as a workload file."""
    out = tmp_path_factory.mktemp("job") / "layers.workload.json.gz"
    graphs.write(layered(8), out)
    return out
