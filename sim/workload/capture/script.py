"""A script as it is: run as ``__main__`` with its own arguments, in this process, and stopped when all is recorded."""

from __future__ import annotations

import runpy
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from sim.workload.capture.cutting import cut_by_optimizer
from sim.workload.capture.session import Session
from sim.workload.capture.spec import ENDED, EXITED, ScriptRun


class _Enough(BaseException):
    """Unwinds the script when all is recorded: ``finally`` and ``with`` run, ``except Exception`` does not catch it."""


def run_script(run: ScriptRun, session: Session) -> str:
    """Run until the session has its steps; returns how the script ended, for people (empty: it was stopped)."""

    def step_ended() -> None:
        if session.step_ended() and not run.to_the_end:
            raise _Enough

    session.record_memory()
    session.begin()
    with _as_main(run), cut_by_optimizer(step_ended):
        try:
            runpy.run_path(str(run.path), run_name="__main__")
        except _Enough:
            _leave_process_group()
            return ""
        except SystemExit as ended:
            return f"{EXITED} {ended.code if ended.code is not None else 0}"
        except Exception as error:
            said = error.msg if isinstance(error, SyntaxError) else error
            return f"raised {type(error).__name__}: {said} ({_where(run, error)})"
        finally:
            session.stop()
    return ENDED


def _leave_process_group() -> None:
    """A script that was stopped could not; its peers stop after the same step, so nobody waits for this rank."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _as_main(run: ScriptRun) -> Iterator[None]:
    """The interpreter's own view of ``python SCRIPT ARGS``: its arguments, and its folder first on the path."""
    argv, path = sys.argv, list(sys.path)
    sys.argv = [str(run.path), *run.args]
    sys.path.insert(0, str(run.path.resolve().parent))
    try:
        yield
    finally:
        sys.argv = argv
        sys.path[:] = path


def _where(run: ScriptRun, error: Exception) -> str:
    """The script's own line that the error came through."""
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f"{error.filename}, line {error.lineno}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(run.path)]
    return f"{run.path.name}, line {lines[-1]}" if lines and lines[-1] else run.path.name
