"""Energy of a step: each device's idle power for as long as the step takes, and what its work draws beyond that.

An estimate (docs/ranges.md, "Energy"): GPUs alone, no host.
"""

from __future__ import annotations

import msgspec

from sim.place.placement import Placement
from sim.report.steps import RankView, rank_views
from sim.report.summary import Summary
from sim.timeline import Timeline
from sim.units import NS_PER_S
from sim.workload.tokens import tokens_of


def with_energy(summary: Summary, placement: Placement, timeline: Timeline) -> Summary:
    """The summary with joules a step over all GPUs, and a token where the workload says how many a step has."""
    if not placement.power or len(placement.power) < len(placement.ranks):
        return summary
    known: dict[tuple[int, int], float] = {}  # ranks that do the same on like devices use the same
    joules = 0.0
    for view in rank_views(timeline):
        key = (view.same_as, id(placement.power[view.rank]))
        if key not in known:
            known[key] = _joules(view, placement)
        joules += known[key]
    tokens = tokens_of(placement.graph)
    each = joules / tokens if tokens else None
    return msgspec.structs.replace(summary, energy_j=joules, energy_j_per_token=each, energy_from="estimate")


def _joules(view: RankView, placement: Placement) -> float:
    """The mean over the rank's steps; never more than the board's power all the time."""
    power = placement.power[view.rank]
    window = sum(step.duration_ns for step in view.steps)
    above = sum((power.watts[span.op] - power.idle_w) * span.duration_ns for span in view.in_steps())
    watt_ns = min(power.idle_w * window + above, power.limit_w * window)
    return watt_ns / NS_PER_S / max(len(view.steps), 1)
