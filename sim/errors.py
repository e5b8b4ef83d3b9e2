"""The error family: what a user can cause, told in one line with the place and the cure.

Every error that a user can cause derives from :class:`UserError`; the command line prints it as one line
on stderr and exits with code 2.  ``assert`` is kept for our own invariants.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Wrong input or command.  ``str(error)`` is one line: the value, the place, the cure."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class InputError(UserError):
    """A file that cannot be used; the message starts with the file."""

    def __init__(self, path: object, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = str(path)


class UnknownNameError(UserError):
    """A name that is not known; offers the nearest known ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str], cure: str = "") -> None:
        super().__init__(f"unknown {kind} {name!r}: {nearest(name, known)}{'; ' + cure if cure else ''}")


class DeadlockError(UserError):
    """The replay cannot go on: ranks wait for each other."""


MOST_NAMES = 40


def nearest(name: str, known: Iterable[str]) -> str:
    """``did you mean 'a5000x8'?`` or, where nothing is near, what is known: of many paths their beginnings."""
    names = sorted(known)
    by_lower = {each.lower(): each for each in names}
    near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(repr(by_lower[n]) for n in near) + "?"
    paths = [each for each in names if "." in each]
    beginnings = sorted({each.partition(".")[0] for each in names})
    # A version number has a point too, as llama-3.1-8b.
    if len(names) > MOST_NAMES and paths and all(each.isidentifier() for each in beginnings):
        return "known paths begin with " + ", ".join(beginnings)
    return "known are " + ", ".join(names)
