"""What-if: a base and a list of machines become rows that say what changed, and why where nothing did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from sim.graph import OpGraph
from sim.place.place import place
from sim.report.variants import Variant, WhatIf
from sim.timeline import Timeline
from sim.whatif.free import NextBottlenecks
from sim.whatif.ledger import bound, items, ledger
from sim.whatif.outcome import DEFAULT_RULES, Outcome, Rules, outcome, replayed
from sim.whatif.reasons import why_unchanged
from sim.whatif.vary import TOPOLOGY, Made

Tell = Callable[[str], None]


class Answer(NamedTuple):
    """The rows, and the timelines of base and rows by name where these were asked for."""

    told: WhatIf
    timelines: tuple[tuple[str, Timeline], ...]


def what_if(
    graph: OpGraph,
    base: Made,
    variants: Sequence[Made],
    gpus: Sequence[int] = (),
    rules: Rules = DEFAULT_RULES,
    *,
    keep_timelines: bool = False,
    tell: Tell = lambda _: None,
) -> Answer:
    """Replay the graph on the base and on every variant, and compare.

    The graph is shared; only placing and replaying are repeated.  UserError as ``place`` and ``replay`` raise it.
    """
    nexts = NextBottlenecks()
    tell("replaying the base")
    told_base = outcome(graph, base.machine, gpus, rules)
    first = _variant(base, told_base, nexts, rules)
    timelines = [("base", told_base.timeline)] if keep_timelines else []
    rows: list[Variant] = []
    for i, made in enumerate(variants):
        tell(f"replaying {i + 1} of {len(variants)}: {name_of(made)}")
        told = _again(told_base, graph, made, gpus, rules)
        row = _variant(made, told, nexts, rules)
        rows.append(_against(first, row, told_base, told, made, base))
        if keep_timelines:
            timelines.append((name_of(made), told.timeline))
    answer = WhatIf(graph.name, first, tuple(rows), tuple(dict.fromkeys(told_base.summary.warnings)))
    answer.check()
    return Answer(answer, tuple(timelines))


def name_of(made: Made) -> str:
    """``links.pcie.bandwidth_gb_s=8, topology=a5000x8``."""
    return ", ".join(f"{path}={_short(value)}" for path, value in made.values.items())


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _again(base: Outcome, graph: OpGraph, made: Made, gpus: Sequence[int], rules: Rules) -> Outcome:
    """The variant's outcome; what is placed as the base is need not be replayed again."""
    placement = place(graph, made.machine, gpus)
    if placement.ranks == base.placement.ranks:
        return Outcome(placement, base.timeline, base.summary, base.paths, base.drawn)
    return replayed(placement, rules)


def _variant(made: Made, told: Outcome, nexts: NextBottlenecks, rules: Rules) -> Variant:
    summary, path = told.summary, items(told)
    bounded = bound(told, path)
    return Variant(
        topology=made.machine.name,
        values=dict(made.values),
        step_ms=summary.step_ms,
        step_ms_p10=summary.step_ms_p10,
        step_ms_p90=summary.step_ms_p90,
        speedup=1.0,
        speedup_p10=None,
        speedup_p90=None,
        exposed_communication_ms=summary.breakdown_ms.exposed_communication,
        breakdown_ms=summary.breakdown_ms,
        host_ms=summary.host_ms,
        energy_j=summary.energy_j,
        energy_from=summary.energy_from,
        peak_allocated_bytes=summary.peak_allocated_bytes,
        peak_reserved_bytes=summary.peak_reserved_bytes,
        memory_bytes=min((r.memory_bytes for r in summary.ranks if r.memory_bytes), default=None),
        out_of_memory=summary.out_of_memory,
        bound_by=bounded,
        next_bottleneck=nexts.after(told.placement, bounded.part, rules),
        critical_path=path,
    )


def _against(first: Variant, row: Variant, base: Outcome, told: Outcome, made: Made, base_made: Made) -> Variant:
    same = made.values == base_made.values and made.machine.name == base_made.machine.name
    paths = [path for path, value in made.values.items() if value != base_made.values.get(path) and path != TOPOLOGY]
    why = "this is the base" if same else why_unchanged(base, told, row.bound_by, paths or [TOPOLOGY])
    low, high = (None, None) if base.drawn is None or told.drawn is None else base.drawn.speedup(told.drawn)
    return msgspec.structs.replace(
        row,
        speedup_p10=low,
        speedup_p90=high,
        speedup=first.step_ms / row.step_ms if row.step_ms else 1.0,
        ledger=ledger(first.critical_path, row.critical_path),
        unchanged_because=why,
        warnings=() if same else tuple(w for w in told.placement.warnings if w not in base.placement.warnings),
    )
