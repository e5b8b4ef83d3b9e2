"""What the tests share: the measured data beside the checkout, and commands as a user types them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from sim.cli import main

Run = Callable[..., tuple[int, str, str]]

# A busy machine is no failure.  The same examples are drawn every time, on every machine, so that a test passes
# everywhere or nowhere; EXPLORE=1 draws new ones.
settings.register_profile("tracesim", deadline=None, derandomize=not os.environ.get("EXPLORE"))
settings.load_profile("tracesim")

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


@pytest.fixture
def refused(run: Run) -> Callable[..., str]:
    """Run a command that must be refused: one line on stderr, nothing on stdout, exit code 2."""

    def command(*args: object) -> str:
        code, out, err = run(*args)
        assert code == 2, (code, out, err)
        assert out == ""
        assert err.count("\n") == 1 and err.startswith("tracesim: error: "), err
        assert "Traceback" not in err
        return err

    return command
