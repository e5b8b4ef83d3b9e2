"""Why a change changed nothing: what of the workload its value touches, and what decides the step instead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from sim.ops import Collective, DeviceOp, HostCall, Op
from sim.place.placement import Costs, Flow
from sim.replay.critical import Part
from sim.report.variants import Bound
from sim.units import format_ns
from sim.whatif.outcome import Outcome, bounding_classes, collective_label, link_class

# A change of the step that no table shows.
NOTHING = 0.0005


def why_unchanged(base: Outcome, row: Outcome, bound: Bound, paths: Sequence[str]) -> str | None:
    """One sentence, or None where the step did change by more than ``NOTHING``."""
    before, after = base.summary.step_ms, row.summary.step_ms
    if abs(after - before) > NOTHING * before:
        return None
    touched = _touched(base, row)
    if touched:
        return _not_felt(touched, base, row, bound)
    return "; ".join(_untouched(path, base, row) for path in paths)


# Durations changed, the step did not --------------------------------------------------------------------------------


class _Change(NamedTuple):
    """By how many nanoseconds an operation itself, the stream's turn before it and its launch latency differ."""

    itself: int
    gap: int
    launch: int


def _not_felt(touched: dict[tuple[int, int], _Change], base: Outcome, row: Outcome, bound: Bound) -> str:
    """What changed, where it is, and what decides the step all the same."""
    rank = min(rank for rank, _ in touched)
    own = {op: change for (r, op), change in touched.items() if r == rank}
    total = sum(sum(change) for change in own.values())
    on_path = {(s.rank, s.op, s.part) for told in (base, row) for path in told.paths for s in path}
    parts = {key: touched[key[:2]] for key in on_path if key[:2] in touched}
    felt = sum(_of_part(change, part) for (_, _, part), change in parts.items()) / len(row.paths)
    where = f"only {format_ns(abs(felt))} a step of it is" if felt else "none of it is"
    what = f"{_named(row, rank, list(own))} take {format_ns(abs(total))} {'more' if total > 0 else 'less'} a rank"
    return f"{what}, but {where} on the critical path: {decides(bound)}"


def _of_part(change: _Change, part: Part) -> int:
    """What of a change a segment of the path can feel."""
    if part == "contention":  # what it takes beyond its time alone
        return 0
    return change.gap if part == "gap" else change.launch if part == "launch" else change.itself


def decides(bound: Bound) -> str:
    """``compute decides the step (92 % of its critical path)``."""
    who = {"host": "the host", "gap": "the device's turn-around between kernels", "launch": "launch latency"}
    return f"{who.get(bound.part, bound.part)} decides the step ({100 * bound.share:.0f} % of its critical path)"


def _named(row: Outcome, rank: int, ops: Sequence[int]) -> str:
    program = next(r.program for r in row.placement.ranks if r.rank == rank)
    counts: dict[str, int] = {}
    for i in ops:
        op = row.graph.programs[program].ops[i]
        name = collective_label(op.kind, op.bytes) if isinstance(op, Collective) else getattr(op, "name", "")
        counts[name or type(op).__name__] = counts.get(name or type(op).__name__, 0) + 1
    shown = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    told = " and ".join(f"{count} {name}" for name, count in shown[:2])
    rest = sum(count for _, count in shown[2:])
    return f"{told} and {rest} more operations" if rest else told


def _touched(base: Outcome, row: Outcome) -> dict[tuple[int, int], _Change]:
    """(rank, op) of each operation whose time alone differs, and by how much."""
    if base.graph is not row.graph:
        return {}
    found: dict[tuple[int, int], _Change] = {}
    known: dict[tuple[int, int], dict[int, _Change]] = {}
    for was, now in zip(base.placement.ranks, row.placement.ranks, strict=True):
        key = (id(was.costs), id(now.costs))
        if key not in known:
            ops = base.graph.programs[was.program].ops
            known[key] = {i: change for i, change in _changes(was.costs, now.costs, ops) if any(change)}
        found.update({(now.rank, i): change for i, change in known[key].items()})
    return found


def _changes(was: Costs, now: Costs, ops: Sequence[Op]) -> Iterator[tuple[int, _Change]]:
    for i, op in enumerate(ops):
        if isinstance(op, DeviceOp | HostCall):
            launch = _latency(now, i, op) - _latency(was, i, op)
            yield i, _Change(now.duration_ns[i] - was.duration_ns[i], now.gap_ns[i] - was.gap_ns[i], launch)


def _latency(costs: Costs, i: int, op: DeviceOp | HostCall) -> int:
    """From the end of the launching call: a longer call delays what it launches, but is itself what takes longer."""
    launch = getattr(op, "launch", None)
    return costs.lag_ns[i] - (0 if launch is None else min(costs.lag_ns[i], costs.duration_ns[launch]))


# No duration changed -------------------------------------------------------------------------------------------------


def _untouched(path: str, base: Outcome, row: Outcome) -> str:
    parts = path.split(".")
    if parts[0] == "links" and len(parts) > 1:
        return _link(parts[1], base, row)
    if parts[-1] in ("memory_gib",):
        return f"{path} decides only what fits: no operation takes its time from it"
    if parts[0] == "nccl":
        return f"with {path} changed NCCL chooses the same rings, algorithms and protocols"
    return f"no operation of this workload takes its time from {path}"


def _link(cls: str, base: Outcome, row: Outcome) -> str:
    """Which links are crossed, and which of them bound what crosses this one."""
    flows = list(chain(_flows(base), _flows(row)))
    if not flows:
        return "nothing of this workload crosses a link: it has no collective of several ranks and no host copy"
    crossing = [flow for flow in flows if any(link_class(lane) == cls for lane, _ in flow.shares)]
    if not crossing:
        others = sorted({link_class(lane) for flow in flows for lane, _ in flow.shares})
        return f"no ring of the collectives and no copy crosses a {cls} link; they cross {_list(others)} links"
    bounding = sorted(set().union(*(bounding_classes(flow) for flow in crossing)) - {cls})
    if bounding:
        return f"{cls} links are crossed, but {_list(bounding)} links bound every transfer that crosses them"
    return f"{cls} links are crossed, but the time of what crosses them does not depend on this value"


def _flows(told: Outcome) -> Iterator[Flow]:
    seen: set[int] = set()
    for placed in told.placement.ranks:
        if id(placed.costs) not in seen:
            seen.add(id(placed.costs))
            yield from (flow for flow in placed.costs.flows.values() if flow.shares)


def _list(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
