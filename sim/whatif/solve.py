"""Inverse questions: which value of a path reaches a target, or that none does, and what stands in the way.

The search scans outward from the machine's own value in powers of four until the target lies between two values, then
halves that stretch (in logarithms) down to neighbours of three significant digits, or whole numbers.  What it returns
was replayed and does reach the target.  Under contention a better machine need not be faster (Graham's anomalies), so
the answer says whether all that was tried moved one way only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import floor, log10, sqrt

from sim.errors import InputError, UnknownNameError, UserError
from sim.graph import OpGraph
from sim.report.variants import Solution, Tried, Value
from sim.topology.load import load_topology
from sim.topology.machine import Machine
from sim.whatif.free import NextBottlenecks
from sim.whatif.ledger import bound, items
from sim.whatif.outcome import DEFAULT_RULES, Outcome, Rules, outcome

# More is better of a speed-up, less of a time.
MEASURES = {"speedup": True, "scaling": True, "step_ms": False, "exposed_communication_ms": False}
_SCAN = (4.0, 16.0, 64.0, 256.0, 1024.0)  # beyond a thousandfold change nothing that can be built is left
_DIGITS = 3

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """A measure and the value it shall reach: ``speedup`` is against the base, ``scaling`` against one GPU of the same
    machine (batches a second of the job over those of the GPU)."""

    measure: str
    value: float

    def is_met(self, measured: float) -> bool:
        return measured >= self.value if MEASURES[self.measure] else measured <= self.value


def parse_target(text: str) -> Target:
    """Read ``speedup=7`` or ``step_ms=500``; UserError with the form that is right."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--target {text!r}: write MEASURE=VALUE, as in speedup=2 or step_ms=500")
    if name not in MEASURES:
        raise UnknownNameError("measure", name, MEASURES, "as in --target step_ms=500")
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not 0 <= number < float("inf"):
        raise UserError(f"--target {text!r}: {value!r} is no number of 0 or more, as in speedup=2 or step_ms=500")
    return Target(name, number)


@dataclass(frozen=True)
class OneGpu:
    """The job as one GPU would do it alone, and how many such steps' batches a step of the job does."""

    graph: OpGraph
    batches: int


@dataclass
class _Search:
    """Replays of the graph at values of the path; each value once."""

    graph: OpGraph
    topology: str
    settings: Mapping[str, str]
    path: str
    target: Target
    gpus: Sequence[int]
    rules: Rules
    tell: Tell
    one_gpu: OneGpu | None
    base_ms: float = 0.0
    whole: bool = False
    tried: dict[float, tuple[Outcome, float]] = field(default_factory=dict)

    def measure(self, value: float) -> float:
        if value not in self.tried:
            self.tell(f"trying {self.path}={value:g}")
            machine = self.machine(value)
            told = outcome(self.graph, machine, self.gpus, self.rules)
            self.tried[value] = (told, self.of(told, machine))
        return self.tried[value][1]

    def machine(self, value: float) -> Machine:
        text = str(int(value)) if self.whole else repr(value)
        return load_topology(self.topology, {**self.settings, self.path: text})

    def can_be(self, value: float) -> bool:
        """Whether the topology may hold the value."""
        try:
            self.machine(value)
        except UserError:
            return False
        return True

    def of(self, told: Outcome, machine: Machine) -> float:
        step_ms = told.summary.step_ms
        if self.target.measure == "scaling":
            assert self.one_gpu is not None
            alone = outcome(self.one_gpu.graph, machine, self.gpus[:1], self.rules)
            return self.one_gpu.batches * alone.summary.step_ms / step_ms if step_ms else 1.0
        if self.target.measure == "speedup":
            return self.base_ms / step_ms if step_ms else 1.0
        return step_ms if self.target.measure == "step_ms" else told.summary.breakdown_ms.exposed_communication

    def meets(self, value: float) -> bool:
        return self.target.is_met(self.measure(value))

    def rounded(self, value: float) -> float:
        if self.whole:
            return float(max(round(value), 1))
        return round(value, _DIGITS - 1 - floor(log10(value)))


def solve(
    graph: OpGraph,
    topology: str,
    settings: Mapping[str, str],
    path: str,
    target: Target,
    gpus: Sequence[int] = (),
    rules: Rules = DEFAULT_RULES,
    tell: Tell = lambda _: None,
    one_gpu: OneGpu | None = None,
) -> Solution:
    """The value of ``path`` nearest to the machine's own at which the target is reached; a target of ``scaling`` needs
    ``one_gpu``.

    UserError for a path that is not there or is no number above 0, for a job of one rank that shall scale, and as
    ``place`` and ``replay`` raise it.
    """
    if target.measure == "scaling" and len(graph.ranks) == 1:
        raise UserError(
            f"--target scaling={target.value:g}: {graph.name} has one rank: one GPU's pace, whatever the links; "
            "give a job of several ranks, or --parallel dp=N"
        )
    base_value, whole = _base_value(topology, settings, path)
    tell("replaying the base")
    machine = load_topology(topology, settings)
    base = outcome(graph, machine, gpus, rules)
    search = _Search(graph, topology, settings, path, target, gpus, rules, tell, one_gpu, base.summary.step_ms, whole)
    search.tried[base_value] = (base, search.of(base, machine))
    stretch = _stretch(search, base_value)
    value = _narrowed(search, *stretch) if stretch is not None else base_value if search.meets(base_value) else None
    best = value if value is not None else _best(search, base_value)
    return _solution(search, base_value, value, best)


def _base_value(topology: str, settings: Mapping[str, str], path: str) -> tuple[float, bool]:
    """The machine's own value, and whether it is a whole number."""
    value: Value | object
    try:
        value = next(c.after for c in load_topology(topology, settings).changes if c.path == path)
    except StopIteration:
        try:
            value = load_topology(topology, {**settings, path: "1"}).changes[-1].before
        except InputError:
            raise UserError(f"--solve {path}: holds no number to search from; give a path that does") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise UserError(f"--solve {path}: {value!r} is no number above 0 to search from; --set one first")
    return float(value), isinstance(value, int) and path not in settings


def _stretch(search: _Search, base_value: float) -> tuple[float, float] | None:
    """Two neighbours of the scan, outward from the base, of which one meets the target and the other does not."""
    met = search.meets(base_value)
    ends = {1: base_value, -1: base_value}
    for factor in _SCAN:
        for direction in sorted(ends, reverse=True):
            value, before = search.rounded(base_value * factor**direction), ends[direction]
            if search.can_be(value):
                ends[direction] = value
            else:
                value = _last_that_can_be(search, before, value)
                del ends[direction]  # values end here
            try:
                crossed = search.meets(value) != met
            except UserError:
                ends.pop(direction, None)  # or here: the job cannot run there
                continue
            if crossed:
                return (before, value)
    return None


def _last_that_can_be(search: _Search, known: float, refused: float) -> float:
    """The value next to where values end: a share ends at 1."""
    while (middle := search.rounded(sqrt(known * refused))) not in (known, refused):
        known, refused = (middle, refused) if search.can_be(middle) else (known, middle)
    return known


def _narrowed(search: _Search, a: float, b: float) -> float:
    """The end of the shrinking stretch that meets the target."""
    while True:
        middle = search.rounded(sqrt(a * b))
        if middle in (a, b):
            return a if search.meets(a) else b
        if search.meets(middle) == search.meets(a):
            a = middle
        else:
            b = middle


def _best(search: _Search, base_value: float) -> float:
    """The value with the best measure; of equals the nearest to the base."""
    sign = -1 if MEASURES[search.target.measure] else 1
    return min(search.tried, key=lambda value: (sign * search.measure(value), abs(value - base_value)))


def _solution(search: _Search, base_value: float, value: float | None, best: float) -> Solution:
    told, reached = search.tried[best]
    path = items(told)
    bounded = bound(told, path)
    tried = tuple(Tried(each, search.measure(each)) for each in sorted(search.tried))
    return Solution(
        name=search.graph.name,
        topology=told.placement.machine,
        path=search.path,
        measure=search.target.measure,
        target=search.target.value,
        base_value=base_value,
        base_measure=search.measure(base_value),
        value=value,
        reached=reached,
        limit_value=best,
        step_ms=told.summary.step_ms,
        bound_by=bounded,
        next_bottleneck=NextBottlenecks().after(told.placement, bounded.part, search.rules),
        monotone=is_monotone([each.measure for each in tried]),
        tried=tried,
        warnings=tuple(dict.fromkeys(told.summary.warnings)),
    )


def is_monotone(measures: Sequence[float]) -> bool:
    """Whether the measures, in order of their values, move one way only."""
    return any(all(_no_less(sign * a, sign * b) for a, b in pairwise(measures)) for sign in (1, -1))


def _no_less(a: float, b: float) -> bool:
    return b >= a - 1e-9 * max(abs(a), abs(b))
