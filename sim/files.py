"""Files appear whole or not at all."""

from __future__ import annotations

import contextlib
import gzip
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sim.errors import InputError


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to, renamed to it at the end: a reader never sees half a file.

    InputError where it cannot be written; nothing remains after an error.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise InputError(path, f"cannot be written ({error.strerror}); choose another place") from None
    os.close(handle)
    try:
        yield Path(temporary)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise InputError(path, f"cannot be written ({error.strerror}); choose another place") from None
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_can_appear(path: Path) -> None:
    """Before long work: InputError where :func:`appearing` could not write there."""
    problem = "is a folder" if path.is_dir() else _folder_problem(path.parent)
    if problem:
        raise InputError(path, f"cannot be written ({problem}); choose another place")


def check_folder_can_appear(path: Path) -> None:
    """Before long work: InputError where the folder is not there and cannot be made, or takes no files."""
    there = next(each for each in (path, *path.parents) if each.exists())
    problem = _folder_problem(there)
    if problem:
        raise InputError(path, f"cannot be made a folder ({problem}); choose another place")


def _folder_problem(folder: Path) -> str:
    if not folder.exists():
        return f"there is no folder {folder}"
    if not folder.is_dir():
        return f"{folder} is no folder"
    return "" if os.access(folder, os.W_OK | os.X_OK) else f"no permission to write in {folder}"


def compressed(content: bytes) -> bytes:
    """Gzipped, with no file name and no time in the header: the same content gives the same bytes."""
    return gzip.compress(content, compresslevel=6, mtime=0)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all.  InputError where it cannot be."""
    with appearing(path) as temporary:
        temporary.write_bytes(content)
