"""The ledger: where the milliseconds of a critical path go, and where they went against a base."""

from __future__ import annotations

from collections.abc import Mapping

from sim.report.variants import Bound, LedgerLine, PathItem
from sim.whatif.outcome import Outcome, Spent, bounding_links, collectives_a_step, spent

# A collective is told by kind and size; of everything else the part alone says where the time went.
_BY_NAME = ("communication", "contention")
PARTS = ("compute", "communication", "contention", "copy", "host", "launch", "gap")


def items(told: Outcome) -> tuple[PathItem, ...]:
    """The critical path by part and name, dearest first."""
    of = collectives_a_step(told)
    found = [
        PathItem(part, name, each.ms, each.count, of.get(name) if part == "communication" else None)
        for (part, name), each in spent(told).items()
    ]
    return tuple(sorted(found, key=lambda item: (-item.ms, item.part, item.name)))


def bound(told: Outcome, path: tuple[PathItem, ...]) -> Bound:
    """The part with most of the path, the dearest operation in it, and the links that bound its transfers."""
    parts: dict[str, float] = {}
    for item in path:
        parts[item.part] = parts.get(item.part, 0.0) + item.ms
    whole = sum(parts.values())
    if not whole:
        return Bound("nothing", 0.0, 0.0, "", 0.0)
    part = max(sorted(parts), key=lambda name: parts[name])
    dearest = next(item for item in path if item.part == part)
    links = bounding_links(told, part) if part in ("communication", "copy", "contention") else ()
    return Bound(part, parts[part], parts[part] / whole, dearest.name, dearest.ms, links)


def ledger(base: tuple[PathItem, ...], row: tuple[PathItem, ...]) -> tuple[LedgerLine, ...]:
    """Per part (communication: per kind and size) what the path spends there, before and after; largest change first.

    The changes add up to the change of the step, because both paths tile their steps.
    """
    before, after = _grouped(base), _grouped(row)
    of = {item.name: item.of for item in (*base, *row) if item.part == "communication"}
    lines = []
    for key in {**before, **after}:
        was, now = before.get(key, Spent(0.0, 0)), after.get(key, Spent(0.0, 0))
        part, name = key
        lines.append(
            LedgerLine(
                part, name, was.ms, now.ms, now.ms - was.ms, was.count, now.count,
                of.get(name) if part == "communication" else None,
            )
        )  # fmt: skip
    return tuple(sorted(lines, key=lambda line: (-abs(line.change_ms), PARTS.index(line.part), line.name)))


def _grouped(path: tuple[PathItem, ...]) -> Mapping[tuple[str, str], Spent]:
    found: dict[tuple[str, str], Spent] = {}
    for item in path:
        key = (item.part, item.name if item.part in _BY_NAME else "")
        so_far = found.get(key, Spent(0.0, 0))
        found[key] = Spent(so_far.ms + item.ms, so_far.count + item.count)
    return found
