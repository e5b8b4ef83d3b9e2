"""Covered time: the union of intervals, and how much of it lies in a window."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable


class Cover:
    """The union of half-open intervals ``[begin, end)`` in integer nanoseconds.

    ``within(a, b)`` is the part of ``[a, b)`` that is covered; it costs two binary searches.
    """

    __slots__ = ("_begins", "_ends", "_sums")

    def __init__(self, intervals: Iterable[tuple[int, int]]) -> None:
        begins: list[int] = []
        ends: list[int] = []
        for begin, end in sorted(interval for interval in intervals if interval[0] < interval[1]):
            if ends and begin <= ends[-1]:
                ends[-1] = max(ends[-1], end)
            else:
                begins.append(begin)
                ends.append(end)
        sums = [0]
        for begin, end in zip(begins, ends, strict=True):
            sums.append(sums[-1] + end - begin)
        self._begins, self._ends, self._sums = begins, ends, sums

    def intervals(self) -> Iterable[tuple[int, int]]:
        """The disjoint intervals of the union, in order."""
        return zip(self._begins, self._ends, strict=True)

    def within(self, begin: int, end: int) -> int:
        """Nanoseconds of ``[begin, end)`` that are covered; 0 for an empty window."""
        return self._before(end) - self._before(begin) if begin < end else 0

    def _before(self, time: int) -> int:
        """Covered nanoseconds before ``time``."""
        i = bisect_right(self._begins, time)
        if i == 0:
            return 0
        return self._sums[i] - max(0, self._ends[i - 1] - time)
