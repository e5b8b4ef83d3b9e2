"""``capture``: run, record, write: one trace a rank, a memory snapshot where there is a GPU, and capture.json."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from msgspec import structs

from sim.errors import InputError
from sim.files import appearing
from sim.workload.capture.spec import ENDED, EXITED, CaptureSpec, ModelRun, Place, check_steps, place_of

if TYPE_CHECKING:
    from sim.workload.capture.session import Session

# Kineto's progress lines; a run without GPU events is noticed and told by this project itself.
_QUIET = {"KINETO_LOG_LEVEL": "6"}


class Captured(NamedTuple):
    """What was written, by which rank; ``note`` says in one line what is less than was asked for."""

    trace: Path
    rank: int
    ranks: int
    steps: int
    note: str


def capture(spec: CaptureSpec, tell: Callable[[str], None] = lambda doing: None) -> Captured:
    """Run what ``spec`` names and write what was recorded into ``spec.out``.

    Raises UserError where there was nothing to record, with how the run ended, and InputError where the files
    cannot be written; nothing is written then.
    """
    check_steps(spec.steps, spec.warmup)
    spec = structs.replace(spec, out=spec.out.absolute())  # a script may go to another folder
    place = place_of()
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    with _folder(spec.out, place.ranks):
        return _capture(spec, place, tell)


def _capture(spec: CaptureSpec, place: Place, tell: Callable[[str], None]) -> Captured:
    from sim.workload.capture.session import Session

    session = Session(spec.steps, spec.warmup, tell)
    if isinstance(spec.run, ModelRun):
        from sim.workload.capture.model import run_model

        run_model(spec.run, place, session)
        ending = ""
    else:
        from sim.workload.capture.script import run_script

        ending = run_script(spec.run, session)
    note = _note(spec, session, ending)
    if session.rank_of_ranks is not None:
        place = Place(session.rank_of_ranks[0], place.local_rank, session.rank_of_ranks[1])
    trace = _write(spec, place, session, tell)
    return Captured(trace, place.rank, place.ranks, session.recorded, note)


def _note(spec: CaptureSpec, session: Session, ending: str) -> str:
    """What is to be said of a run that ended before all was recorded, or ill; UserError where nothing is recorded."""
    if isinstance(spec.run, ModelRun):
        return ""
    script, ending = spec.run.path, " ".join(ending.split())
    if session.recorded == spec.steps:
        well = ending in ("", ENDED, f"{EXITED} 0")
        return "" if well else f"{script}: {ending}, after all {spec.steps} steps were recorded"
    if session.recorded:
        return f"{script}: {ending}; captured {session.recorded} of {spec.steps} steps"
    if session.ended:
        raise InputError(
            script,
            f"{ending} after {session.ended} optimizer steps, of which {spec.warmup} are left out: nothing was"
            " captured; choose a smaller --warmup, or let the script make more steps",
        )
    raise InputError(
        script,
        f"{ending} before its first step: nothing was captured; steps are cut where an optimizer of torch.optim steps"
        " in this process (start the ranks of a job with torchrun)",
    )


def _write(spec: CaptureSpec, place: Place, session: Session, tell: Callable[[str], None]) -> Path:
    """All files of this rank appear when all are written."""
    from sim.workload.capture.about import about

    trace = spec.out / f"rank{place.rank}.pt.trace.json.gz"
    tell(f"writing {trace}")
    with contextlib.ExitStack() as files:
        session.write(files.enter_context(appearing(trace)), trace.name)
        if session.snapshot is not None:
            snapshot = files.enter_context(appearing(spec.out / f"rank{place.rank}.memory.pickle"))
            with snapshot.open("wb") as file:
                pickle.dump(session.snapshot, file)
        if place.rank == 0:
            told = about(spec.command, place, session.recorded, spec.warmup, "cpu" if session.on_cpu else "cuda")
            files.enter_context(appearing(spec.out / "capture.json")).write_text(json.dumps(told, indent=2) + "\n")
    return trace


@contextlib.contextmanager
def _folder(out: Path, ranks: int) -> Iterator[None]:
    """The folder to write into, made where it is missing and taken away again where nothing came of it."""
    existed = out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InputError(out, f"cannot be written ({error.strerror}); choose another --out") from None
    _refuse_others(out, ranks)
    try:
        yield
    except BaseException:
        if not existed:
            with contextlib.suppress(OSError):  # another rank may have written
                out.rmdir()
        raise


def _refuse_others(out: Path, ranks: int) -> None:
    """Traces of another run beside these would be taken for ranks of this one."""
    ours = {f"rank{rank}.pt.trace.json.gz" for rank in range(ranks)}
    others = sorted(p.name for p in out.iterdir() if ".trace.json" in p.name[1:] and p.name not in ours)
    others = [name for name in others if not name.startswith(".")]
    if others:
        raise InputError(out, f"holds {others[0]} of another run; choose another --out, or remove it")
