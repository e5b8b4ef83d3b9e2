"""The machine a trace was taken on: every duration as measured, only the order and the waiting computed anew."""

from __future__ import annotations

from sim.errors import UserError
from sim.graph import OpGraph, Program, RankProgram
from sim.ops import Collective, Copy, HostCall, Kernel
from sim.place.placement import Costs, PlacedRank, Placement
from sim.timeline import CollectiveInfo

AS_CAPTURED = "as-captured"


def place_as_captured(graph: OpGraph) -> Placement:
    """Place every rank on the device it was measured on.  UserError where the graph was not measured."""
    placed = []
    for index, r in enumerate(graph.ranks):
        costs = _measured_costs(graph, graph.programs[r.program], r)
        placed.append(PlacedRank(r.rank, f"gpu{index}", r.device, r.program, costs))
    return Placement(graph, AS_CAPTURED, tuple(placed))


def _measured_costs(graph: OpGraph, program: Program, rank: RankProgram) -> Costs:
    duration, lag, gap = [], [], []
    collectives: dict[int, CollectiveInfo] = {}
    for i, op in enumerate(program.ops):
        timed = isinstance(op, HostCall | Kernel | Copy | Collective)
        if timed and op.measured_ns is None:
            raise UserError(
                f"{graph.name}: {op.name or 'an operation'} has no measured duration; 'as-captured' replays traces, "
                f"a synthesized workload needs a machine: `--topology a5000x1`"
            )
        duration.append(op.measured_ns or 0 if timed else 0)
        on_device = isinstance(op, Kernel | Copy | Collective)
        lag.append(op.lag_ns or 0 if on_device else 0)
        gap.append(op.gap_ns or 0 if on_device else 0)
        if isinstance(op, Collective):
            members = len(graph.group_of(op.group, rank.rank))
            collectives[i] = CollectiveInfo(op.kind, op.bytes, members, "as captured", "as captured", op.group, op.seq)
    return Costs(tuple(duration), tuple(lag), tuple(gap), ("measured",) * len(program.ops), collectives)
