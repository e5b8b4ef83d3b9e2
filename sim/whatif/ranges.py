"""Ranges: how sure a prediction is, from the errors of its parts, carried through the replay by resampling.

Each source of error gets a factor from its 80 % interval, each piece of work one of its own beside it, and the replay
is repeated with the durations so scaled.  Draws are stratified (a Latin hypercube: every source takes each of the
quantiles (k + 1/2) / n once) and shuffled by a hash of the source's name: the same input gives the same draws, and what
two machines share is drawn alike on both, so a comparison is of pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256
from itertools import chain
from math import exp, log, sqrt
from statistics import NormalDist

import msgspec
import numpy as np
from numpy.typing import NDArray

from sim.ops import Mark
from sim.place.placement import Interval, Kind, Part, Source
from sim.replay.draws import PPM, Drawn, Times, Wanted, repeat
from sim.replay.engine import RankReplay, Replayed
from sim.report.steps import UNMARKED, RankView, job_steps, rank_views
from sim.report.summary import DoubtRow, Summary
from sim.timeline import Timeline
from sim.units import ms_from_ns

SAMPLES = 64
ALONE = 8  # draws with one source alone varied, for the ledger
LOW, HIGH = 0.1, 0.9
_TENTH = NormalDist().inv_cdf(HIGH)
_LEAST_SHARE = 0.005

Factors = NDArray[np.int64]


class Ranges(msgspec.Struct, frozen=True):
    """Milliseconds a step, one a joint draw, and which source carries how much of the doubt, largest first."""

    step_ms: tuple[float, ...]
    kernel_ms: tuple[float, ...]
    doubt: tuple[DoubtRow, ...]

    def on(self, summary: Summary) -> Summary:
        """The summary with its ranges; where nothing was drawn, nothing is in doubt, and they are points."""
        if not self.step_ms:
            step, kernel = summary.step_ms, summary.kernel_ms
            return msgspec.structs.replace(
                summary, step_ms_p10=step, step_ms_p90=step, kernel_ms_p10=kernel, kernel_ms_p90=kernel
            )
        return msgspec.structs.replace(
            summary,
            step_ms_p10=quantile(self.step_ms, LOW),
            step_ms_p90=quantile(self.step_ms, HIGH),
            kernel_ms_p10=quantile(self.kernel_ms, LOW),
            kernel_ms_p90=quantile(self.kernel_ms, HIGH),
            doubt=self.doubt,
        )

    def speedup(self, other: Ranges) -> tuple[float, float]:
        """This step over the other's, draw by draw: what both machines share is wrong on both alike, and cancels."""
        pairs = [mine / theirs for mine, theirs in zip(self.step_ms, other.step_ms, strict=True) if theirs]
        return (quantile(pairs, LOW), quantile(pairs, HIGH)) if pairs else (1.0, 1.0)


def quantile(values: Sequence[float], share: float) -> float:
    """Between the two values next to it, as numpy has it."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    i = min(int(place), len(ordered) - 2) if len(ordered) > 1 else 0
    above = ordered[min(i + 1, len(ordered) - 1)]
    return ordered[i] + (above - ordered[i]) * (place - i)


def ranges(
    replayed: Replayed,
    timeline: Timeline,
    samples: int = SAMPLES,
) -> Ranges:
    """Repeat a replay that was run with durations as they may be; ``timeline`` is what the replay told.

    Nothing varies where nothing is in doubt: as captured all durations are measured.
    """
    found = replayed.placement.doubts
    if not found.kinds:
        return Ranges((), (), ())
    sources = found.sources
    factors = _all_factors(found.kinds, sources, samples)
    views = rank_views(timeline)
    busiest = max(views, key=lambda view: sum(span.duration_ns for span in view.in_steps()))
    marks = {each.placed.rank: _marks(each) for each in replayed.ranks}
    device = frozenset(span.op for span in busiest.in_steps())
    wanted = {
        rank: Wanted(frozenset(chain(*pairs)), device if rank == busiest.rank else frozenset())
        for rank, pairs in marks.items()
    }
    drawn = repeat(replayed, found.ranks, factors, wanted)
    # Ranks that stand for others are the first of their kind: what is slowest and busiest is among them.
    views = tuple(view for view in views if view.rank in drawn)
    step_ms = [ms_from_ns(float(ns)) for ns in _mean_step_ns(views, marks, drawn)]
    kernel_ms = [ms_from_ns(float(ns) / max(len(busiest.steps), 1)) for ns in drawn[busiest.rank].device]
    return Ranges(tuple(step_ms[:samples]), tuple(kernel_ms[:samples]), _ledger(sources, step_ms[samples:]))


# Draws --------------------------------------------------------------------------------------------------------------


def _all_factors(kinds: Sequence[Kind], sources: Sequence[Source], samples: int) -> Factors:
    """Per kind parts per million: ``samples`` columns with everything varied, then ``ALONE`` for each source."""
    rows = []
    for kind in kinds:
        together = [1.0] * samples
        for part in kind:
            together = [a * b for a, b in zip(together, factors_of(part, samples), strict=True)]
        row = list(together)
        for source in sources:
            alone = [1.0] * ALONE
            for part in kind:
                if part.source.name == source.name:
                    alone = [a * b for a, b in zip(alone, factors_of(part, ALONE), strict=True)]
            row += alone
        rows.append([round(factor * PPM) for factor in row])
    return np.array(rows, dtype=np.int64)


@lru_cache(maxsize=4096)
def factors_of(part: Part, count: int) -> tuple[float, ...]:
    """What an operation's duration is multiplied by, one a draw: the source's error and the piece's own, together
    normal, read off the interval."""
    shared, own = sqrt(part.interval.common), sqrt(1 - part.interval.common)
    common = normal_draws(part.source.name, count)
    alone = normal_draws(f"{part.source.name}: {part.piece}", count)
    return tuple(_factor(part.interval, shared * c + own * a) for c, a in zip(common, alone, strict=True))


def _factor(interval: Interval, z: float) -> float:
    """The factor at ``z`` standard deviations: 1 at none where the interval holds it, and the interval's ends at the
    10th and 90th percentile; straight lines in the logarithm between and beyond."""
    low, high = log(interval.p10), log(interval.p90)
    middle = 0.0 if low < 0.0 < high else (low + high) / 2
    reach = high - middle if z > 0 else middle - low
    return exp(middle + reach * z / _TENTH)


@lru_cache(maxsize=4096)
def normal_draws(name: str, count: int) -> tuple[float, ...]:
    """The normal quantiles of (k + 1/2) / count, each once, in an order that the name decides."""
    order = sorted(range(count), key=lambda i: sha256(f"{name}\0{i}\0{count}".encode()).digest())
    return tuple(NormalDist().inv_cdf((k + 0.5) / count) for k in order)


# Steps of the repetitions -------------------------------------------------------------------------------------------


def _marks(replayed: RankReplay) -> list[tuple[int, int]]:
    """The marks at the beginning and end of each step of a rank, in order of time as its view has them."""
    begun: dict[int, int] = {}
    pairs = []
    for i, op in enumerate(replayed.ops):
        if isinstance(op, Mark) and op.edge == "begin":
            begun[op.step] = i
        elif isinstance(op, Mark) and op.step in begun:
            pairs.append((begun[op.step], i))
    start, end = replayed.moments.start, replayed.moments.end
    return sorted(pairs, key=lambda pair: (start[pair[0]], end[pair[1]]))


def _mean_step_ns(
    views: Sequence[RankView], marks: dict[int, list[tuple[int, int]]], drawn: dict[int, Drawn]
) -> NDArray[np.float64]:
    """A step of the job lasts as long as the slowest rank's; the mean over the steps."""
    took: dict[int, Times] = {}
    for view in views:
        ends = drawn[view.rank].ends
        for k, step in enumerate(view.steps):
            if step.name == UNMARKED and not marks[view.rank]:
                took[id(step)] = drawn[view.rank].over
            else:
                first, last = marks[view.rank][k]
                took[id(step)] = ends[last] - ends[first]
    job = [np.maximum.reduce([took[id(step)] for step in steps]) for steps in job_steps(views)]
    return np.asarray(sum(job) / len(job), dtype=np.float64)


# The ledger ---------------------------------------------------------------------------------------------------------


def _ledger(sources: Sequence[Source], alone: Sequence[float]) -> tuple[DoubtRow, ...]:
    """Shares of the variance, each source varied alone; largest first, and none of those that hardly count."""
    variances = []
    for i in range(len(sources)):
        steps = alone[i * ALONE : (i + 1) * ALONE]
        mean = sum(steps) / ALONE
        variances.append(sum((step - mean) ** 2 for step in steps))
    whole = sum(variances)
    if not whole:
        return ()
    rows = [DoubtRow(s.name, v / whole, s.cure) for s, v in zip(sources, variances, strict=True)]
    return tuple(sorted((r for r in rows if r.share >= _LEAST_SHARE), key=lambda row: (-row.share, row.source)))
