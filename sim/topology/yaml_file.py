"""YAML text to plain data: shipped files and a user's own, with the line of every mistake YAML itself can see."""

from __future__ import annotations

from collections.abc import Hashable
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

import yaml

from sim.errors import InputError, UnknownNameError

SUFFIXES = (".yaml", ".yml")


class _OneKeyLoader(yaml.SafeLoader):
    """A key that stands twice in one mapping is a mistake, not a silent replacement."""


def _mapping_without_repeats(loader: _OneKeyLoader, node: yaml.MappingNode) -> dict[Hashable, object]:
    seen: set[object] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise yaml.MarkedYAMLError(problem="a key must be a plain word", problem_mark=key_node.start_mark)
        if key in seen:
            problem = f"the key {key!r} stands twice in this mapping"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)
    return dict(loader.construct_pairs(node, deep=True))


_OneKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_repeats)


def parse_yaml(text: str, where: str) -> dict[str, object]:
    """The mapping in ``text``; InputError with the line where it is no YAML mapping."""
    try:
        # A SafeLoader: it builds plain data only, whatever tags a stranger's file carries.
        data = yaml.load(text, Loader=_OneKeyLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise InputError(where, f"{line}not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(where, f"not valid YAML: {error or type(error).__name__}") from None
    if not isinstance(data, dict):
        raise InputError(where, f"must be a mapping of keys, found {_shape(data)}")
    return {str(key): value for key, value in data.items()}


def _shape(data: object) -> str:
    words = {"NoneType": "nothing", "str": "text", "int": "a number", "float": "a number", "bool": "true or false"}
    kind = type(data).__name__
    return words.get(kind, f"a {kind}")


def shipped_names(folder: str) -> tuple[str, ...]:
    """Names of the YAML files that the package ships in ``folder`` ("" or "devices"), sorted."""
    entries = _shipped_folder(folder).iterdir()
    return tuple(sorted(e.name.removesuffix(".yaml") for e in entries if e.name.endswith(".yaml")))


def _shipped_folder(folder: str) -> Traversable:
    shipped = resources.files("sim.topology") / "shipped"
    return shipped / folder if folder else shipped


def read_named(kind: str, name: str, folder: str) -> tuple[str, str]:
    """Text of the YAML that ``name`` stands for, and what to call it in messages.

    ``name`` is a file's path, or a shipped name with or without ``.yaml``.  A path that exists wins where it looks
    like one (it has a folder or a suffix); a bare name is looked up among the shipped files first.
    """
    bare = name.removesuffix(".yaml")
    known = shipped_names(folder)
    path = Path(name)
    is_path = path.name != name or name.endswith(SUFFIXES)
    there = bool(name) and path.exists() and not path.is_dir()  # also a pipe, as <(a command) is
    if is_path and there:
        return _read_text(path), name
    if bare in known:
        shipped = _shipped_folder(folder) / f"{bare}.yaml"
        return shipped.read_text(encoding="utf-8"), bare
    if there:
        return _read_text(path), name
    if name and (path.is_dir() or path.name != name):
        problem = "is a folder" if path.is_dir() else "no such file"
        raise InputError(name, f"{problem}; give a YAML file or a shipped {kind} ({', '.join(known)})")
    raise UnknownNameError(kind, name, known, "a file's path works too")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(path, "is not UTF-8 text; a topology is a YAML file") from None
