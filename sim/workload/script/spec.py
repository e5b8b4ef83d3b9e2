"""ScriptSpec: which script, and how; checked before torch is loaded."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from sim.errors import InputError, UserError
from sim.graph import OpGraph
from sim.workload.parallel import MOST_RANKS

DEFAULT_WARMUP = 1


class ScriptSpec(msgspec.Struct, frozen=True):
    """What to run.

    The step after the first ``warmup`` optimizer steps is recorded.  ``ranks`` is the number of processes that
    torchrun would start, on ``hosts`` machines, of a script that makes its process group itself; ``parallel``
    (``dp=8``) says on how many GPUs the model of a script that makes none would run under DistributedDataParallel.
    ``assume_value`` is what the script is answered where it reads a tensor's value; without one such a read ends the
    run.
    """

    path: Path
    args: tuple[str, ...] = ()
    parallel: str = ""
    warmup: int = DEFAULT_WARMUP
    assume_value: float | None = None
    ranks: int | None = None
    hosts: int = 1

    @property
    def job(self) -> int | None:
        """How many ranks the job has that the script finds; None where it finds one GPU and no job."""
        replicas = int(self.parallel.partition("=")[2]) if self.parallel else 1
        return replicas if replicas > 1 else self.ranks

    def check(self) -> None:
        """Raise UserError with everything that cannot be, in one line."""
        problems = list(self._problems())
        if problems:
            raise UserError("; ".join(problems))

    def _problems(self) -> Iterator[str]:
        if not self.path.is_file():
            yield f"{self.path}: no such script; give a Python file, with its arguments after it"
        if self.warmup < 1:
            yield f"--warmup {self.warmup}: must be at least 1: in a script's first step the optimizer makes its state"
        if self.parallel and not re.fullmatch(r"dp=[1-9][0-9]{0,5}", self.parallel):
            yield (
                f"--parallel {self.parallel}: only dp=N is put around a script's model; for a script that calls"
                " fully_shard or parallelize_module itself give the number of its ranks, as in --ranks 8"
            )
        if self.ranks is not None and not 1 <= self.ranks <= MOST_RANKS:
            yield f"--ranks {self.ranks}: must be from 1 to {MOST_RANKS}"
        if self.hosts < 1 or (self.job or 1) % self.hosts:
            yield f"--hosts {self.hosts}: does not divide the script's {self.job or 1} ranks; give --ranks and --hosts"
        if self.ranks is not None and self.parallel:
            yield f"--ranks {self.ranks}: leave it out with --parallel {self.parallel}, which says how many there are"


def is_script(word: str | None) -> bool:
    """Whether what was given in the place of a model's name is a script."""
    if word is None:
        return False
    path = Path(word)
    return path.suffix == ".py" or (path.is_file() and path.suffix not in (".json", ".yaml", ".yml"))


def script_spec(word: str, args: Sequence[str], own: dict[str, Any], others: dict[str, Any]) -> ScriptSpec:
    """The spec that the command line names: ``own`` are options of a script, None where not given, and ``others``
    those of a model, which a script does not have."""
    given = [f"--{name.replace('_', '-')}" for name, value in others.items() if value is not None]
    if given:
        raise UserError(f"{', '.join(given)}: for a model by name; {word} takes its own arguments, after its name")
    return ScriptSpec(Path(word), tuple(args), **{name: value for name, value in own.items() if value is not None})


def digest(path: Path) -> str:
    """By what it is noticed that a script has changed."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})") from None


def provenance(spec: ScriptSpec) -> dict[str, str]:
    """What a workload says it was made from; :func:`spec_of_script` reads it."""
    said = {"script": str(spec.path.resolve()), "script_sha256": digest(spec.path), "mode": "train"}
    said |= {"args": msgspec.json.encode(spec.args).decode(), "warmup": str(spec.warmup)}
    if spec.parallel:
        said["parallel"] = spec.parallel
    if spec.ranks is not None:
        said["ranks"] = str(spec.ranks)
    if spec.hosts > 1:
        said["hosts"] = str(spec.hosts)
    if spec.assume_value is not None:
        said["assume_value"] = repr(spec.assume_value)
    return said


def spec_of_script(graph: OpGraph) -> ScriptSpec | None:
    """The script that a workload was made from, where it is still as it was; None for other workloads."""
    said = graph.provenance
    if "script" not in said:
        return None
    path = Path(said["script"])
    if not path.is_file():
        raise InputError(path, f"is gone; {graph.name} was made from it, and would be made anew")
    if digest(path) != said.get("script_sha256"):
        raise InputError(path, f"has changed since {graph.name} was made from it; synthesize it again")
    value, ranks = said.get("assume_value"), said.get("ranks")
    return ScriptSpec(
        path,
        msgspec.json.decode(said.get("args", "[]"), type=tuple[str, ...]),
        said.get("parallel", ""),
        int(said.get("warmup", DEFAULT_WARMUP)),
        None if value is None else float(value),
        None if ranks is None else int(ranks),
        int(said.get("hosts", 1)),
    )
