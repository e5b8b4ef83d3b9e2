"""The machine a trace was taken on: every duration as measured, only the order and the waiting computed anew."""

from __future__ import annotations

from sim.errors import UserError
from sim.graph import OpGraph, Program, RankProgram
from sim.ops import Collective, DeviceOp, HostCall, Op
from sim.place.placement import Costs, PlacedRank, Placement
from sim.timeline import CollectiveInfo, DurationSource

AS_CAPTURED = "as-captured"
CPU = "cpu"  # the name of the device of a run without a GPU


def place_as_captured(graph: OpGraph) -> Placement:
    """Place every rank on the device it was measured on.  UserError where the graph was not measured."""
    placed = []
    for index, r in enumerate(graph.ranks):
        costs = _measured_costs(graph, graph.programs[r.program], r)
        kind = "cpu" if r.device == CPU else "gpu"
        placed.append(PlacedRank(r.rank, f"{kind}{index}", r.device, r.program, costs))
    return Placement(graph, AS_CAPTURED, tuple(placed))


def _measured_costs(graph: OpGraph, program: Program, rank: RankProgram) -> Costs:
    ops = program.ops
    measured: DurationSource = "measured"
    return Costs(
        duration_ns=tuple(_measured(graph, op) for op in ops),
        lag_ns=tuple(op.lag_ns or 0 if isinstance(op, DeviceOp) else 0 for op in ops),
        gap_ns=tuple(op.gap_ns or 0 if isinstance(op, DeviceOp) else 0 for op in ops),
        source=(measured,) * len(ops),
        collectives={i: _told(graph, op, rank.rank) for i, op in enumerate(ops) if isinstance(op, Collective)},
    )


def _measured(graph: OpGraph, op: Op) -> int:
    if not isinstance(op, HostCall | DeviceOp):
        return 0
    if op.measured_ns is None:
        raise UserError(
            f"{graph.name}: {op.name or 'an operation'} has no measured duration; {AS_CAPTURED!r} replays traces, "
            f"a synthesized workload needs a machine: `--topology a5000x1`"
        )
    return op.measured_ns


def _told(graph: OpGraph, op: Collective, rank: int) -> CollectiveInfo:
    members = len(graph.group_of(op.group, rank))
    return CollectiveInfo(op.kind, op.bytes, members, "as captured", "as captured", op.group, op.seq)
