"""A host's measured collectives: the time at a size between the measured ones, and for fewer ranks than measured."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from math import exp, log

from sim.topology.machine import Machine
from sim.topology.schema import MeasuredCurve


@dataclass(frozen=True)
class Reading:
    """A time read off a curve of so many ranks: what even the smallest size takes, the rest, and how it was read.

    ``own``: just as measured, of as many ranks over the links as they are, with nothing carried over by a model.
    """

    latency_us: float
    transfer_us: float
    note: str
    ranks: int
    own: bool


def read_curve(machine: Machine, kind: str, nbytes: int, ranks: int) -> Reading | None:
    """The measured time for as many ranks or, by steps, for fewer; None where no curve tells, as where another library
    than the measured one is asked for.

    Ring collectives of r ranks take a number of equal steps, each moving 1/r of the tensor one hop on.  So a step of
    a given piece costs the same with 2 ranks as with 8: T_2(n) = steps_2 / steps_8 x T_8(n x 8 / 2).  The smallest
    time of the curve is the host's and the launch's, which fewer ranks do not shorten.
    """
    if machine.baseline is not None and machine.baseline.collectives.library != machine.collectives.library:
        return None
    curves = [c for c in machine.collectives.measured if c.kind == kind and c.ranks >= ranks]
    if not curves:
        return None
    curve = min(curves, key=lambda c: c.ranks)
    floor = min(curve.us)
    if curve.ranks == ranks:
        us = time_at(curve, nbytes)
        return Reading(min(floor, us), us - min(floor, us), f"measured on this host with {ranks} ranks", ranks, True)
    if steps(kind, ranks) is None:
        return None
    share = (steps(kind, ranks) or 0) / (steps(kind, curve.ranks) or 1)
    us = max(time_at(curve, nbytes * curve.ranks / ranks) * share, floor)
    note = f"from this host's curve of {curve.ranks} ranks: {ranks} ranks take {share:.3g} of its steps"
    return Reading(floor, us - floor, note, curve.ranks, False)


def steps(kind: str, ranks: int) -> int | None:
    """Steps of a ring; None for kinds whose time is no multiple of a step."""
    return {"all_reduce": 2 * (ranks - 1), "all_gather": ranks - 1, "reduce_scatter": ranks - 1}.get(kind)


def time_at(curve: MeasuredCurve, nbytes: float) -> float:
    """Microseconds at a size: straight lines between the points in log-log; the last bandwidth beyond the last."""
    sizes, times = curve.bytes, curve.us
    if nbytes <= sizes[0]:
        return times[0]
    if nbytes >= sizes[-1]:
        return times[-1] * nbytes / sizes[-1]
    i = bisect_right(sizes, nbytes)
    share = log(nbytes / sizes[i - 1]) / log(sizes[i] / sizes[i - 1])
    return exp(log(times[i - 1]) + share * log(times[i] / times[i - 1]))
