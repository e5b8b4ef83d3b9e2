"""The text of YAML files: shipped ones and a user's own."""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from sim.errors import InputError, UnknownNameError

SUFFIXES = (".yaml", ".yml")


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
