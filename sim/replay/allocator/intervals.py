"""Which ranges of addresses are memory: a set of ranges that do not overlap."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator


class Intervals:
    """Ranges ``[start, end)``; neighbours stay apart as they were added."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: dict[int, int] = {}

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter([(start, self._ends[start]) for start in self._starts])

    def __bool__(self) -> bool:
        return bool(self._starts)

    def add(self, start: int, end: int) -> bool:
        """Add a range; false, and nothing is added, where it overlaps another."""
        place = bisect_left(self._starts, end)
        if place and self._ends[self._starts[place - 1]] > start:
            return False
        insort(self._starts, start)
        self._ends[start] = end
        return True

    def holding(self, address: int) -> tuple[int, int] | None:
        """The range an address lies in."""
        place = bisect_right(self._starts, address)
        if not place:
            return None
        start = self._starts[place - 1]
        return (start, self._ends[start]) if address < self._ends[start] else None

    def __contains__(self, address: int) -> bool:
        return self.holding(address) is not None

    def covers(self, start: int, end: int) -> bool:
        """Whether ``[start, end)`` lies wholly in ranges, several adjoining ones included."""
        while start < end:
            found = self.holding(start)
            if found is None:
                return False
            start = found[1]
        return True

    def remove(self, start: int, end: int) -> bool:
        """Take a range away; false, and nothing is taken, where it is not covered."""
        if not self.covers(start, end):
            return False
        while start < end:
            found = self.holding(start)
            assert found is not None
            low, high = found
            self._starts.remove(low)
            del self._ends[low]
            if low < start:
                insort(self._starts, low)
                self._ends[low] = start
            if end < high:
                insort(self._starts, end)
                self._ends[end] = high
            start = high
        return True
