"""How many tokens a step of a workload has, as its provenance tells."""

from __future__ import annotations

from sim.errors import UserError
from sim.graph import OpGraph
from sim.workload.parallel import parse_plan
from sim.workload.spec import spec_of


def tokens_of(graph: OpGraph) -> int | None:
    """Tokens of all ranks together; None for images and for traces, which do not say."""
    spec = spec_of(graph)
    if spec is None or spec.seq is None:
        return None
    try:
        plan = parse_plan(spec.parallel)
    except UserError:  # a plan in words, as the published rows have
        return None if len(graph.ranks) > 1 else spec.batch * spec.seq * spec.micro_batches
    return spec.batch * spec.seq * spec.micro_batches * plan.size("dp") * plan.size("fsdp")
