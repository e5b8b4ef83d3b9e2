"""Commands as a user types them, and a small job they can be tried on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sim import graph as graphs
from sim.cli import main
from tests.whatif.layers import layered

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in this process, on a terminal of 100 columns: exit code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "100")

    def command(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = 0
        try:
            main([str(arg) for arg in args])
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return command


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layers of the closed form over eight ranks, as a workload file."""
    out = tmp_path_factory.mktemp("job") / "layers.workload.json.gz"
    graphs.write(layered(8), out)
    return out
