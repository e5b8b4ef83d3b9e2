"""The page docs/accuracy.md as it grows: its lines, and how many references of each family lie in their intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple


class Covered(NamedTuple):
    """How many values of a family of references lie inside their 80 % intervals."""

    family: str
    inside: int
    total: int
    unseen: str
    whole_run: bool = False


class Report:
    """Lines of the file, and the coverage of the families so far."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.lines: list[str] = []
        self.covered: list[Covered] = []
        self.tell = tell

    def section(self, title: str, text: str) -> None:
        self.tell(title)
        self.lines += ["", f"## {title}", "", *([text, ""] if text else [])]

    def table(self, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        self.lines += [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
        self.lines += [f"| {' | '.join(row)} |" for row in rows]

    def say(self, text: str) -> None:
        self.lines += ["", text]


def percent(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{100 * value:+.{digits}f} %"


def holds(inside: bool) -> str:
    return "yes" if inside else "no"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def share(held: int | None, total: int) -> str:
    return "not judged" if held is None else f"{100 * held / total:.0f} %"
