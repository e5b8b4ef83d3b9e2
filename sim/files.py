"""Files appear whole or not at all."""

from __future__ import annotations

import contextlib
import gzip
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sim.errors import InputError


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to, renamed to it at the end: a reader never sees half a file.

    A link stays a link, and what is no file (/dev/null, a pipe) is written to: nothing is put in its place.
    InputError where it cannot be written; nothing remains after an error.
    """
    special = _is_special(path)
    place = path if special else path.resolve()
    try:
        folder = Path(tempfile.gettempdir()) if special else place.parent
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{path.name}.")
    except OSError as error:
        raise InputError(path, f"cannot be written ({error.strerror}); choose another place") from None
    os.close(handle)
    try:
        yield Path(temporary)
        if special:
            with Path(temporary).open("rb") as whole, place.open("wb") as file:
                shutil.copyfileobj(whole, file)
            Path(temporary).unlink()
        else:
            Path(temporary).chmod(0o644)
            Path(temporary).replace(place)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise InputError(path, f"cannot be written ({error.strerror}); choose another place") from None
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _is_special(path: Path) -> bool:
    """A device, a pipe, a socket: something is there, and it is neither a file nor a folder."""
    return path.exists() and not path.is_file() and not path.is_dir()


def check_can_appear(path: Path) -> None:
    """Before long work: InputError where :func:`appearing` could not write there."""
    if _is_special(path):
        problem = "" if os.access(path, os.W_OK) else "no permission"
    else:
        place = path.resolve() if path.is_symlink() else path
        problem = "is a folder" if path.is_dir() else _folder_problem(place.parent)
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
