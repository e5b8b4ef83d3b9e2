"""Units at the door: inside are integer nanoseconds and integer bytes; GB is 10^9 and GiB is 2^30."""

from __future__ import annotations

NS_PER_US = 1_000
NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


def ns_from_us(us: float) -> int:
    """Microseconds to the nearest nanosecond."""
    return round(us * NS_PER_US)


def ms_from_ns(ns: float) -> float:
    """Nanoseconds to milliseconds, unrounded."""
    return ns / NS_PER_MS


def transfer_ns(nbytes: float, gb_s: float) -> int:
    """Time to move ``nbytes`` at ``gb_s`` (10^9 bytes a second, which is bytes a nanosecond), rounded up."""
    return -int(-nbytes // gb_s)


def format_bytes(nbytes: int) -> str:
    """For people: ``8.59 GiB``, ``64.00 MiB``, ``512 B``."""
    for size, unit in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(nbytes) >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} B"


def format_ns(ns: float) -> str:
    """For people: ``741.2 ms``, ``72.5 us``, ``12 ns``."""
    for size, unit in ((NS_PER_S, "s"), (NS_PER_MS, "ms"), (NS_PER_US, "us")):
        if abs(ns) >= size:
            return f"{ns / size:.2f} {unit}"
    return f"{round(ns)} ns"
