"""Files appear whole or not at all."""

from __future__ import annotations

import contextlib
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


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all.  InputError where it cannot be."""
    with appearing(path) as temporary:
        temporary.write_bytes(content)
