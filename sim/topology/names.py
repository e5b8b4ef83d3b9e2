"""Names in a topology file: groups, ranges, and which pairs of nodes a pair of ends stands for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from sim.topology.problems import nearest_key

_RANGE = re.compile(r"^(?P<group>.*?)(?P<first>\d+)-(?P<last>\d+)$")
_LONGEST_RANGE = 4096  # a mistyped range must not fill the memory


@cache
def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts gpu2 before gpu10."""
    return tuple((1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", name) if part)


def member_names(group: str, count: int | None, hosts: int) -> tuple[str, ...]:
    """Names of a group's members over all hosts: numbered on from host to host."""
    if count is None and hosts == 1:
        return (group,)
    return tuple(f"{group}{i}" for i in range((count or 1) * hosts))


@dataclass(frozen=True)
class Group:
    """Members of a group in one host (None: a single node without a number), and whether all hosts share them."""

    count: int | None
    shared: bool = False

    def member(self, name: str, number: int, host: int, hosts: int) -> str:
        """Name of the member that a host calls ``number``."""
        if self.count is None and (self.shared or hosts == 1):
            return name
        beyond = number >= (self.count or 1)  # no such member: left as written, to be reported
        return f"{name}{number}" if self.shared or beyond else f"{name}{number + host * (self.count or 1)}"


@dataclass(frozen=True)
class Names:
    """What a file's ends can mean."""

    groups: Mapping[str, Group]
    known: frozenset[str]
    hosts: int

    def expand(self, pair: tuple[str, str]) -> tuple[list[tuple[str, str]], str | None]:
        """The pairs of nodes, over all hosts, that a pair of ends stands for; and what is wrong with it."""
        pairs: list[tuple[str, str]] = []
        for host in range(self.hosts):
            left, right = (self._members(end, host) for end in pair)
            missing = sorted({n for n in (*left, *right) if n not in self.known}, key=natural)
            if missing:
                names = ", ".join(map(repr, missing))
                return [], f"no node is named {names}{nearest_key(missing[0], self.known)}"
            dealt = _deal(left, right)
            if dealt is None:
                return [], f"{len(left)} ends cannot be dealt evenly to {len(right)}"
            if any(a == b for a, b in dealt):
                return [], f"a link must join two different nodes, found {list(pair)}"
            pairs += [pair for pair in dealt if pair not in pairs]
        return pairs, None

    def _members(self, end: str, host: int) -> tuple[str, ...]:
        """The nodes of one host that an end names: a group, a range of its members, or one node."""
        if end in self.groups:
            count = self.groups[end].count or 1
            return tuple(self.groups[end].member(end, n, host, self.hosts) for n in range(count))
        span = _RANGE.match(end)
        if span:
            first, last = int(span["first"]), int(span["last"])
            return tuple(self._one(span["group"], n, host) for n in range(first, min(last, first + _LONGEST_RANGE) + 1))
        group = end.rstrip("0123456789")
        number = end.removeprefix(group)
        return (self._one(group, int(number), host),) if number else (end,)

    def _one(self, group: str, number: int, host: int) -> str:
        if group not in self.groups:
            return f"{group}{number}"
        return self.groups[group].member(group, number, host, self.hosts)


def _deal(left: tuple[str, ...], right: tuple[str, ...]) -> list[tuple[str, str]] | None:
    """Pairs of the longer side's consecutive blocks with the shorter side's members; None where it does not divide."""
    long, short = (left, right) if len(left) >= len(right) else (right, left)
    if not short or len(long) % len(short):
        return None
    block = len(long) // len(short)
    return [(node, short[i // block]) for i, node in enumerate(long)]
