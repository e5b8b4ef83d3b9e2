"""How far measured collectives lie from the predicted ones: the tenth and the ninetieth percentile of their ratio.

From the comparisons of tools/validate_collectives.py with hosts whose curves the model does not see (microsoft/vidur:
all-reduces of 2, 4 and 8 A100s behind NVSwitches, of 2 and 4 in bridged pairs).  Bound by bytes: medians of the
kernel's duration.  Bound by latency: the shortest durations, where they are below the pace at which a host issues
calls; they still wait for ranks that come late, so the spread is wide upwards.  No network and no CPU backend is among
those hosts; for them the same spreads are a guess.
"""

from __future__ import annotations

from sim.place.collectives import CollectivePlan

Spread = tuple[float, float]

# measured / predicted, p10 and p90
BOUND_BY_BYTES: Spread = (0.97, 1.05)
BOUND_BY_LATENCY: Spread = (0.87, 1.89)
# The same on a host, or with a number of ranks, that is not among these five: what sets them apart from each other
# counts for one more (tools/predictive.py).
BYTES_ELSEWHERE: Spread = (0.96, 1.07)
# A host's own curve read for another number of ranks or over changed links: the model's ratio of the two is taken, so
# its errors on both count.  From the same hosts: the measured over the modelled ratio of 8 to 4, 8 to 2 and 4 to 2
# ranks behind NVSwitches and of 4 to 2 in pairs, either way round, for one case more.
CARRIED_OVER: Spread = (0.92, 1.09)
# As many ranks as the host's own curve has: so far lie neighbouring points of the a5000x8 sweep from a smooth line.
ON_ITS_OWN_CURVE: Spread = (0.97, 1.03)


def spread_of(plan: CollectivePlan) -> Spread:
    """(p10, p90) of measured / predicted time for a plan like this one; (1, 1) for one rank, which takes none."""
    if plan.ns == 0:
        return 1.0, 1.0
    if plan.as_measured:
        return ON_ITS_OWN_CURVE
    if plan.transfer_ns < plan.latency_ns:
        return BOUND_BY_LATENCY
    return CARRIED_OVER if plan.source == "profile" else BYTES_ELSEWHERE
