"""``place``: a graph gets its place on a machine, or on the one it was captured on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from sim.place.captured import place_as_captured

if TYPE_CHECKING:
    from sim.graph import OpGraph
    from sim.place.placement import Placement
    from sim.topology.machine import Machine


def place(graph: OpGraph, machine: Machine | None, gpus: Sequence[int] = (), *, strict: bool = False) -> Placement:
    """Put the ranks onto the machine's GPUs, in order or onto ``gpus`` (or those that the workload names): in order of
    their numbers, wherever the workload's file has them.

    ``machine`` None means as captured.  Raises UserError where there are more ranks than GPUs, or GPUs that the
    machine does not have; and, where ``strict``, for kernels that no formula explains.
    """
    in_order = tuple(sorted(graph.ranks, key=lambda each: each.rank))
    if in_order != graph.ranks:
        graph = msgspec.structs.replace(graph, ranks=in_order)
    if machine is None:
        return place_as_captured(graph)
    # Cost models, curves and the machine's graph take half a second to import, which a replay as captured needs not.
    from sim.place.on_machine import place_on_machine

    return place_on_machine(graph, machine, gpus, strict)
