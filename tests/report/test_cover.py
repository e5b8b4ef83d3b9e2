"""Covered time, checked against counting nanoseconds one by one."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sim.report.cover import Cover

INTERVALS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=8)


def test_by_hand() -> None:
    cover = Cover([(10, 20), (15, 25), (25, 30), (40, 50), (7, 7)])
    # The union is [10, 30) and [40, 50).
    assert list(cover.intervals()) == [(10, 30), (40, 50)]
    assert cover.within(0, 100) == 20 + 10
    assert cover.within(12, 45) == 18 + 5
    assert cover.within(30, 40) == 0
    assert cover.within(45, 12) == 0


@given(INTERVALS, st.integers(0, 60), st.integers(0, 60))
@settings(deadline=None)
def test_is_the_number_of_covered_nanoseconds(intervals: list[tuple[int, int]], begin: int, end: int) -> None:
    covered = {t for a, b in intervals for t in range(a, b)}
    assert Cover(intervals).within(begin, end) == len(covered & set(range(begin, end)))
