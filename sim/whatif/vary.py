"""What to vary: paths of a topology with their values, or whole topologies, and the machines these make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

from sim.errors import UserError
from sim.report.variants import Value
from sim.topology.load import load_topology
from sim.topology.machine import Machine

TOPOLOGY = "topology"
MOST_ROWS = 1000  # a slip of the keyboard must not run for days


class Varied(NamedTuple):
    """A path (or ``topology``) and the texts of its values, each once."""

    path: str
    values: tuple[str, ...]


class Made(NamedTuple):
    """A machine, and the values of the varied paths on it."""

    machine: Machine
    values: dict[str, Value]


def parse(given: Sequence[str]) -> tuple[Varied, ...]:
    """Read ``PATH=V1,V2,...``; UserError with the form that is right."""
    found: dict[str, Varied] = {}
    for text in given:
        path, equals, listed = text.partition("=")
        values = tuple(dict.fromkeys(value.strip() for value in _listed(listed)))
        if not (path and equals) or values == ("",):
            raise UserError(
                f"--vary {text!r}: no values; write PATH=V1,V2,..., as in links.pcie.bandwidth_gb_s=8,16,32"
            )
        if "" in values:
            raise UserError(f"--vary {text!r}: a value is empty; write PATH=V1,V2,... without a comma at the end")
        if path in found:
            raise UserError(f"--vary {path}: is there twice; give all its values at once, with commas")
        found[path] = Varied(path, values)
    count = 1
    for varied in found.values():
        count *= len(varied.values)
    if count > MOST_ROWS:
        raise UserError(f"--vary asks for {count} combinations; at most {MOST_ROWS}: give fewer values")
    return tuple(found.values())


def _listed(text: str) -> list[str]:
    """The values between the commas; those inside brackets and braces belong to a value: ``[[gpu, cpu0]]``."""
    values, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth <= 0:
            values.append("")
        else:
            values[-1] += letter
    return values


def base_machine(topology: str, settings: Mapping[str, str], varied: Sequence[Varied]) -> Made:
    """The machine as it is, after the settings; its values of the varied paths (None where it has no such path)."""
    machine = load_topology(topology, settings)
    values: dict[str, Value] = {}
    for path, texts in varied:
        values[path] = machine.name if path == TOPOLOGY else _value_at(machine, topology, settings, path, texts[0])
    return Made(machine, values)


def _value_at(machine: Machine, topology: str, settings: Mapping[str, str], path: str, stand_in: str) -> Value:
    for change in machine.changes:
        if change.path == path:
            return _plain(change.after)
    try:
        changed = load_topology(topology, {**settings, path: stand_in})
    except UserError:
        return None  # the path is another topology's, or the value is wrong, which its own row says
    return _plain(changed.changes[-1].before)


def machines(topology: str, settings: Mapping[str, str], varied: Sequence[Varied]) -> list[Made]:
    """Every combination, the first path varying slowest; UserError for a path or value that is wrong."""
    made = []
    for texts in product(*(each.values for each in varied)):
        chosen = dict(zip((each.path for each in varied), texts, strict=True))
        name = chosen.pop(TOPOLOGY, topology)
        machine = load_topology(name, {**settings, **chosen})
        values: dict[str, Value] = {change.path: _plain(change.after) for change in machine.changes}
        values[TOPOLOGY] = machine.name
        made.append(Made(machine, {each.path: values[each.path] for each in varied}))
    return made


def _plain(value: object) -> Value:
    """A value as it is; a list or mapping as a user would type it: ``[[gpu, cpu]]``."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return _typed(value)


def _typed(value: object) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_typed(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_typed, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
