"""A graph with other speeds: kernels and host calls that take a multiple of what was measured."""

from __future__ import annotations

from msgspec.structs import replace

from sim.graph import OpGraph
from sim.ops import Collective, Copy, HostCall, Kernel, Op


def scaled(graph: OpGraph, kernels: float = 1.0, host: float = 1.0) -> OpGraph:
    """``kernels`` times the duration of all device operations, ``host`` times everything of the host and its lag."""

    def one(op: Op) -> Op:
        if isinstance(op, Kernel | Copy | Collective):
            lag = None if op.lag_ns is None else round(op.lag_ns * host)
            return replace(op, measured_ns=round((op.measured_ns or 0) * kernels), lag_ns=lag)
        changed = replace(op, before_ns=round(op.before_ns * host))
        if isinstance(changed, HostCall):
            changed = replace(changed, measured_ns=round((changed.measured_ns or 0) * host))
        return changed

    programs = tuple(replace(p, ops=tuple(one(op) for op in p.ops)) for p in graph.programs)
    return replace(graph, programs=programs)
