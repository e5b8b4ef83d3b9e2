"""What to capture: which run, which of its steps, and where the files go; checked before torch is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from sim.errors import InputError, UserError

# How a script ended, where it was not stopped.
ENDED = "ended by itself"
EXITED = "ended by itself with exit code"


class ModelRun(msgspec.Struct, frozen=True):
    """A model by name, with random weights: ``batch`` sequences of ``seq`` tokens a step on each rank."""

    model: str
    batch: int
    seq: int
    mode: Literal["forward", "train"] = "forward"
    dtype: Literal["float16", "bfloat16", "float32"] = "float32"


class ScriptRun(msgspec.Struct, frozen=True):
    """A Python script with its arguments; ``to_the_end`` lets it run on after the last recorded step."""

    path: Path
    args: tuple[str, ...] = ()
    to_the_end: bool = False


class CaptureSpec(msgspec.Struct, frozen=True):
    """``steps`` are recorded after ``warmup`` steps; ``command`` is told in capture.json."""

    run: ModelRun | ScriptRun
    out: Path
    steps: int = 5
    warmup: int = 3
    command: tuple[str, ...] = ()


class Place(msgspec.Struct, frozen=True):
    """Which rank of how many this process is, and its place on its host, as torchrun says."""

    rank: int
    local_rank: int
    ranks: int


def place_of(environment: Mapping[str, str] = os.environ) -> Place:
    """From RANK, LOCAL_RANK and WORLD_SIZE; one rank alone where they are not set."""
    values = {name: environment.get(name, default) for name, default in _ALONE.items()}
    for name, value in values.items():
        if not value.isdigit():
            raise UserError(f"{name}={value!r} in the environment: a whole number is expected, as torchrun sets it")
    return Place(int(values["RANK"]), int(values["LOCAL_RANK"]), int(values["WORLD_SIZE"]))


_ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


def what_to_run(
    model: str | None,
    batch: int | None,
    seq: int | None,
    mode: str | None,
    dtype: str | None,
    script: Sequence[str],
    to_the_end: bool,
) -> ModelRun | ScriptRun:
    """The run that the command line names; UserError where it names none, or two."""
    if model is not None and script:
        raise UserError(f"--model {model} and the script {script[0]}: give one of them")
    if model is None and not script:
        raise UserError("nothing to run; give --model NAME --batch B --seq S, or -- SCRIPT.py ARGS...")
    if model is not None:
        return _model_run(model, batch, seq, mode or "forward", dtype or "float32", to_the_end)
    for option, value in (("--batch", batch), ("--seq", seq), ("--mode", mode), ("--dtype", dtype)):
        if value is not None:
            raise UserError(f"{option} {value}: belongs to --model; a script has its own arguments, after its name")
    return _script_run(script, to_the_end)


def _model_run(model: str, batch: int | None, seq: int | None, mode: str, dtype: str, to_the_end: bool) -> ModelRun:
    if to_the_end:
        raise UserError("--to-the-end: belongs to a script; a model runs the chosen steps only")
    if batch is None or seq is None:
        raise UserError(f"--model {model}: give --batch and --seq as well")
    for option, value in (("--batch", batch), ("--seq", seq)):
        if value < 1:
            raise UserError(f"{option} {value}: must be at least 1")
    return msgspec.convert({"model": model, "batch": batch, "seq": seq, "mode": mode, "dtype": dtype}, ModelRun)


def _script_run(script: Sequence[str], to_the_end: bool) -> ScriptRun:
    path = Path(script[0])
    if not path.is_file():
        raise InputError(path, "no such script; give a Python file, with its arguments after it")
    return ScriptRun(path, tuple(script[1:]), to_the_end)


def check_steps(steps: int, warmup: int) -> None:
    """UserError where the counts cannot be."""
    if steps < 1:
        raise UserError(f"--steps {steps}: must be at least 1")
    if warmup < 0:
        raise UserError(f"--warmup {warmup}: must not be negative")
