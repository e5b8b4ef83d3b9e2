"""An independent replay: one pass over the operations, since references point backwards.  The oracle of the engine.

It knows nothing of clocks, allocators or networks; collectives of several ranks meet by iterating to a fixed point.
"""

from __future__ import annotations

from collections import defaultdict

from sim.graph import OpGraph, Program
from sim.ops import Alloc, Collective, Copy, Free, HostCall, Kernel, Mark

Times = list[tuple[int, int]]


def replay(graph: OpGraph) -> dict[int, Times]:
    """Start and end of every operation of every rank."""
    arrivals: dict[tuple[str, int], int] = {}
    while True:
        reached: dict[tuple[str, int], int] = defaultdict(int)
        times = {r.rank: _one_rank(graph.program_of(r), arrivals, reached) for r in graph.ranks}
        if reached == arrivals:
            return times
        arrivals = dict(reached)


def _one_rank(program: Program, arrivals: dict[tuple[str, int], int], reached: dict[tuple[str, int], int]) -> Times:
    free = [0] * len(program.lanes)
    used = [False] * len(program.lanes)
    times: Times = []
    for op in program.ops:
        after = max((times[i][1] for i in op.after), default=0)
        if isinstance(op, Kernel | Copy | Collective):
            start = max(free[op.lane], after) + (op.gap_ns or 0)
            if op.launch is not None:
                start = max(start, times[op.launch][0] + (op.lag_ns or 0))
            end = start + (op.measured_ns or 0)
            if isinstance(op, Collective):
                key = (op.group, op.seq)
                reached[key] = max(reached[key], start)
                end = max(start, arrivals.get(key, 0)) + (op.measured_ns or 0)
        else:
            assert isinstance(op, HostCall | Mark | Alloc | Free)
            start = max(free[op.lane], after) + op.before_ns
            end = start
            if isinstance(op, HostCall):
                end = max([start, *(times[i][1] for i in op.waits)]) + (op.measured_ns or 0)
        times.append((start, end))
        free[op.lane] = end
        used[op.lane] = True
    return times


def steps(graph: OpGraph, times: dict[int, Times]) -> dict[int, list[tuple[str, int]]]:
    """Name and duration of every step of every rank."""
    found: dict[int, list[tuple[str, int]]] = {}
    for r in graph.ranks:
        begun: dict[int, int] = {}
        found[r.rank] = []
        for op, (start, _) in zip(graph.program_of(r).ops, times[r.rank], strict=True):
            if isinstance(op, Mark):
                if op.edge == "begin":
                    begun[op.step] = start
                else:
                    found[r.rank].append((op.name, start - begun[op.step]))
    return found
