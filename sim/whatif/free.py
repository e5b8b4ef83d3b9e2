"""If one part of the time were free: the step then, and what would decide it.  That is the next bottleneck.

Not read off the present path, which does not know what waits behind its first cause, but replayed.
"""

from __future__ import annotations

import msgspec

from sim.graph import Program
from sim.ops import Collective, Copy, HostCall, Kernel, Op
from sim.place.placement import Costs, Placement
from sim.report.variants import NextBound
from sim.whatif.ledger import bound, items
from sim.whatif.outcome import Rules, replayed

_FREED: dict[str, tuple[type, ...]] = {
    "compute": (Kernel,), "communication": (Collective,), "copy": (Copy,), "host": (HostCall,),
}  # fmt: skip


class NextBottlenecks:
    """Answers for the placements of one what-if; a placement that differs only in what is freed is replayed once."""

    def __init__(self) -> None:
        self._known: dict[str, list[tuple[Placement, bool, NextBound]]] = {}

    def after(self, placement: Placement, part: str, rules: Rules) -> NextBound | None:
        """What decides the step when ``part`` takes no time; None for a part that cannot be taken away."""
        if part not in (*_FREED, "contention", "launch", "gap"):
            return None
        contended = rules.contention and part != "contention"
        freed = without(placement, part)
        for known, with_contention, answer in self._known.setdefault(part, []):
            if with_contention == contended and known == freed:
                return answer
        told = replayed(freed, Rules(contended))
        answer = NextBound(part, told.summary.step_ms, bound(told, items(told)))
        self._known[part].append((freed, contended, answer))
        return answer


def without(placement: Placement, part: str) -> Placement:
    """The placement with one part's time taken out; for ``contention`` itself (that is no time of an operation)."""
    if part == "contention":
        return placement
    graph = placement.graph
    costs: dict[tuple[int, int], Costs] = {}
    ranks = []
    for placed in placement.ranks:
        key = (placed.program, id(placed.costs))
        if key not in costs:
            costs[key] = _without(placed.costs, graph.programs[placed.program], part)
        ranks.append(msgspec.structs.replace(placed, costs=costs[key]))
    if part == "host":
        programs = tuple(Program(p.lanes, tuple(_at_once(op) for op in p.ops)) for p in graph.programs)
        graph = msgspec.structs.replace(graph, programs=programs)
    return msgspec.structs.replace(placement, graph=graph, ranks=tuple(ranks))


def _without(costs: Costs, program: Program, part: str) -> Costs:
    ops = program.ops
    kinds = _FREED.get(part, ())
    freed = [isinstance(op, kinds) for op in ops]
    durations = tuple(0 if gone else ns for gone, ns in zip(freed, costs.duration_ns, strict=True))
    return msgspec.structs.replace(
        costs,
        duration_ns=durations,
        lag_ns=tuple(_lag(op, costs, i, part) for i, op in enumerate(ops)),
        gap_ns=(0,) * len(ops) if part == "gap" else costs.gap_ns,
        flows={i: flow for i, flow in costs.flows.items() if not freed[i]},
        held={i: held for i, held in costs.held.items() if not freed[i]},
    )


def _lag(op: Op, costs: Costs, i: int, part: str) -> int:
    """A launch's lag holds the call that launches and the latency behind it."""
    launch: int | None = getattr(op, "launch", None)
    if launch is None or part not in ("host", "launch"):
        return costs.lag_ns[i]
    called = min(costs.lag_ns[i], costs.duration_ns[launch])
    return costs.lag_ns[i] - called if part == "host" else called


def _at_once(op: Op) -> Op:
    """A host operation whose thread does nothing before it."""
    return msgspec.structs.replace(op, before_ns=0) if getattr(op, "before_ns", 0) else op
