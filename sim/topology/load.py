"""Loading a topology by name or file, with overrides by dotted path."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import yaml
from pydantic import ValidationError

from sim.errors import InputError, UserError, nearest
from sim.topology.build import build_machine, merged, naming_problems
from sim.topology.device import DeviceProfile, read_device
from sim.topology.machine import Change, Machine
from sim.topology.problems import problems_of
from sim.topology.schema import Devices, TopologyFile
from sim.topology.yaml_file import SUFFIXES, read_named, shipped_names
from sim.yaml_text import parse_yaml


def shipped_topologies() -> tuple[str, ...]:
    """Names of the topologies that ship with the project."""
    return shipped_names("")


def load_topology(name: str, overrides: Mapping[str, object] | None = None) -> Machine:
    """The machine of a shipped topology (with or without ``.yaml``) or of a file.

    ``overrides`` replaces values by dotted path before anything is checked: ``links.pcie.bandwidth_gb_s``,
    ``host.op_us``, ``devices.profile``, ``devices.memory_gib``; text values are read as YAML ("8", "true").
    UnknownNameError for an unknown name, InputError with every problem of a file, UserError for an unknown path.
    """
    text, where = read_named("topology", str(name), "")
    raw = _with_profiles_beside(parse_yaml(text, where), where)
    file = _checked(raw, where)
    machine = build_machine(file, where)
    if not overrides:
        return machine
    paths = known_paths(file)
    changed = deepcopy(raw)
    changes = tuple(_override(changed, path, value, paths) for path, value in overrides.items())
    place = f"{where} with {', '.join(f'{c.path}={c.after}' for c in changes)}"
    return replace(build_machine(_checked(changed, place), place), changes=changes, baseline=machine, _routes={})


def _with_profiles_beside(raw: dict[str, object], where: str) -> dict[str, object]:
    """Device files are looked up beside the topology file first, so that both can be moved together."""
    devices = raw.get("devices")
    if not isinstance(devices, dict):
        return raw
    others = devices.get("other_profiles")
    beside: dict[str, object] = {"profile": _beside(devices.get("profile"), where)}
    if isinstance(others, dict):
        beside["other_profiles"] = {name: _beside(profile, where) for name, profile in others.items()}
    return {**raw, "devices": {**devices, **beside} if "profile" in devices else devices}


def _beside(profile: object, where: str) -> object:
    if isinstance(profile, str) and profile.endswith(SUFFIXES):
        there = Path(where).parent / profile
        return str(there) if there.is_file() else profile
    return profile


def _checked(raw: Mapping[str, object], where: str) -> TopologyFile:
    try:
        return TopologyFile.model_validate(raw)
    except ValidationError as error:
        problems = problems_of(error, TopologyFile)
        usable = _mended(raw, error)
        if usable is not None:  # so that one run lists the wrong names beside the wrong values
            wrong = {key for each in error.errors(include_url=False) for key in each["loc"][-1:]}
            named = wrong.isdisjoint(_NAMING)
            problems += [each for each in naming_problems(usable) if named or not each.startswith("links.")]
        raise InputError(where, "; ".join(problems)) from None


# Stand-ins for values that are wrong or missing, used only to go on and find what else is wrong.
_STAND_INS: dict[str, object] = {
    "name": "x", "description": "x", "source": "x", "kind": "pcie", "bandwidth_gb_s": 1.0, "latency_us": 0.0,
    "count": 1, "hosts": 1, "id": "x",
}  # fmt: skip

_NAMING = ("id", "count", "hosts")  # with a stand-in for one of these, ends of links are missing that the user has


def _mended(raw: Mapping[str, object], error: ValidationError) -> TopologyFile | None:
    """The file with its wrong values replaced or left out; None where too little is left to look at."""
    data = deepcopy(dict(raw))
    for _ in range(3):
        for problem in error.errors(include_url=False):
            _mend(data, problem["loc"], missing=problem["type"] == "missing")
        try:
            return TopologyFile.model_validate(data)
        except ValidationError as again:
            error = again
    return None


def _mend(data: dict[str, object], loc: tuple[int | str, ...], *, missing: bool) -> None:
    place: object = data
    for part in loc[:-1]:
        place = _inside(place, part)
    key = loc[-1] if loc else None
    if isinstance(place, dict) and key in _STAND_INS:
        place[key] = "cpu" if key == "kind" and loc[0] == "nodes" else _STAND_INS[str(key)]
    elif isinstance(place, dict):
        place.pop(key, None)
        if missing and len(loc) > 1:  # nothing stands in for it: go on without what needs it
            _mend(data, loc[:-1], missing=False)
    elif len(loc) > 1:
        _mend(data, loc[:-1], missing=False)


def _inside(place: object, part: int | str) -> object:
    if isinstance(place, dict):
        return place.get(part)
    if isinstance(place, list) and isinstance(part, int) and part < len(place):
        return place[part]
    return None


def known_paths(file: TopologyFile) -> dict[str, object]:
    """Every path that an override may replace, with the value it has now."""
    paths = dict(_flat(file.model_dump(mode="python"), ""))
    data, _ = read_device(file.devices.profile)
    profile = DeviceProfile.model_validate(merged(data, file.devices.set)).model_dump(mode="python", by_alias=True)
    for key, value in _flat(profile, ""):
        paths.setdefault(f"devices.{key}", value)
    return paths


def _flat(value: object, path: str) -> list[tuple[str, object]]:
    """Leaves and mappings below ``path``; places in a list are not offered one by one."""
    if not isinstance(value, Mapping):
        return [(path, value)]
    found: list[tuple[str, object]] = [(path, value)] if path else []
    for key, inner in value.items():
        found += _flat(inner, f"{path}.{key}" if path else str(key))
    return found


def _override(raw: dict[str, object], path: str, value: object, known: Mapping[str, object]) -> Change:
    if path not in known:
        leaves = [p for p, v in known.items() if not isinstance(v, Mapping)]
        raise UserError(f"unknown path {path!r} in this topology: {nearest(path, leaves)}")
    new = value if isinstance(known[path], str) else _as_value(value)
    parts = path.split(".")
    if parts[0] == "devices" and len(parts) > 1 and parts[1] not in Devices.model_fields:
        parts = ["devices", "set", *parts[1:]]
    place = raw
    for part in parts[:-1]:
        inner = place.get(part)
        if not isinstance(inner, dict):
            inner = place[part] = {}
        place = inner
    place[parts[-1]] = new
    return Change(path, known[path], new)


def _as_value(value: object) -> object:
    """Text from a command line as YAML reads it; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value
