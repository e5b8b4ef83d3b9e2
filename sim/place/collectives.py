"""What one collective costs: the machine's measured curve where it has one, else a ring over its slowest link."""

from __future__ import annotations

import numpy as np
from msgspec import Struct

from sim.timeline import DurationSource
from sim.topology.machine import Machine


class CollectivePlan(Struct, frozen=True):
    """Nanoseconds of one collective alone, and how it runs."""

    ns: int
    algorithm: str
    protocol: str
    source: DurationSource
    note: str = ""


def plan(machine: Machine, kind: str, nbytes: int, gpus: tuple[int, ...]) -> CollectivePlan:
    """Plan a collective of ``nbytes`` (the whole tensor) over these GPUs."""
    for curve in machine.collectives.measured:
        if curve.kind == kind and curve.ranks == len(gpus):
            us = float(np.exp(np.interp(np.log(nbytes), np.log(curve.bytes), np.log(curve.us))))
            return CollectivePlan(round(us * 1e3), "ring", "simple", "profile")
    names = [machine.gpus[i].name for i in gpus]
    slowest = min(
        machine.transfer_route(a, b).bandwidth_gb_s for a, b in zip(names, names[1:] + names[:1], strict=True)
    )
    steps = (len(gpus) - 1) * (2 if kind == "all_reduce" else 1)
    return CollectivePlan(round(steps * nbytes / len(gpus) / slowest), "ring", "simple", "roofline")
