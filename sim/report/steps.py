"""Steps: which steps a job has, and which step a piece of device work belongs to.

A GPU runs behind its host, so a kernel that was launched in one step may run in the next or after the last one.
Device work therefore belongs to the step that *launched* it: the step of its rank in whose window its launching
call starts.  Only where the launch is not known (it happened before a trace began) the work belongs to the step in
whose window it starts itself.  Windows are half open, ``[start, end)``; work that neither rule places belongs to
no step.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import msgspec

from sim.report.cover import Cover
from sim.timeline import OwnSpans, Span, Step, Timeline

UNMARKED = "trace"  # the name of the one step that stands for a trace without step marks


class RankView(msgspec.Struct, frozen=True):
    """One rank of a timeline: its steps in order of time, its device spans in order of the timeline, the step that
    each of these belongs to (an index into ``steps``, or -1), and its host spans by track.  ``same_as`` is the first
    rank that does the same, whose spans these are."""

    rank: int
    same_as: int
    steps: tuple[Step, ...]
    device: tuple[Span, ...]
    step_of: tuple[int, ...]
    host: dict[int, tuple[Span, ...]]

    def in_steps(self) -> list[Span]:
        """The device spans that belong to a step."""
        return [span for span, step in zip(self.device, self.step_of, strict=True) if step >= 0]


def rank_views(timeline: Timeline) -> tuple[RankView, ...]:
    """Every rank of the timeline, in the timeline's order; ranks that do the same share what is found of one."""
    own = timeline.own_spans()
    known: dict[int, RankView] = {}
    views: list[RankView] = []
    for info in timeline.ranks:
        spans = own[info.rank]
        same = known.get(id(spans.spans))
        if same is None or not spans.spans:
            known[id(spans.spans)] = view = _view(timeline, info.rank, spans)
        else:
            steps = tuple(msgspec.structs.replace(step, rank=info.rank) for step in same.steps)
            view = msgspec.structs.replace(same, rank=info.rank, steps=steps)
        views.append(view)
    return tuple(views)


def _view(timeline: Timeline, rank: int, own: OwnSpans) -> RankView:
    device: list[Span] = []
    host: dict[int, list[Span]] = {}
    for span in own.spans:
        if span.kind == "host":
            host.setdefault(span.track, []).append(span)
        else:
            device.append(span)
    steps = tuple(sorted((s for s in timeline.steps if s.rank == rank), key=lambda s: (s.start_ns, s.end_ns)))
    if not timeline.steps:
        end = max((span.end_ns for span in own.spans), default=0)
        steps = (Step(rank=rank, index=0, name=UNMARKED, start_ns=0, end_ns=end),)
    starts = [step.start_ns for step in steps]
    step_of = tuple(
        _step_at(steps, starts, own.among[span.launch].start_ns if span.launch >= 0 else span.start_ns)
        for span in device
    )
    return RankView(rank, rank, steps, tuple(device), step_of, {track: tuple(spans) for track, spans in host.items()})


def _step_at(steps: Sequence[Step], starts: Sequence[int], time: int) -> int:
    """The index of the last step begun at ``time``, if it has not ended; else -1."""
    i = bisect_right(starts, time) - 1
    return i if i >= 0 and time < steps[i].end_ns else -1


def job_steps(views: Sequence[RankView]) -> list[list[Step]]:
    """Per step of the job, the steps of the ranks that took part, in order of rank as in ``views``.

    Steps of several ranks are one step of the job where their ``index`` is the same (and, should a rank have an
    index twice, where it is the same occurrence).  Steps of the job are in the order in which they begin.
    """
    together: dict[tuple[int, int], list[Step]] = {}
    for view in views:
        seen: dict[int, int] = {}
        for step in view.steps:
            occurrence = seen.get(step.index, 0)
            seen[step.index] = occurrence + 1
            together.setdefault((step.index, occurrence), []).append(step)
    return sorted(together.values(), key=lambda steps: min(s.start_ns for s in steps))


def slowest(steps: Sequence[Step]) -> Step:
    """The longest of a job's step over the ranks: what the job waits for.  The first of equals."""
    return max(steps, key=lambda step: step.duration_ns)


class Split(msgspec.Struct, frozen=True):
    """A window in nanoseconds, divided: the four parts add up to the window exactly.

    ``compute``: at least one compute kernel runs; ``exposed_communication``: communication runs and no compute;
    ``exposed_memcpy``: a memcpy or memset runs and neither of these; ``idle``: nothing runs on the device.
    ``waiting`` is the part of exposed communication in which sends and receives only wait for their peer: with
    ``idle`` a pipeline's bubble.
    """

    compute: int
    exposed_communication: int
    exposed_memcpy: int
    idle: int
    waiting: int

    @property
    def busy(self) -> int:
        return self.compute + self.exposed_communication + self.exposed_memcpy


class Splitter:
    """Divides windows of one rank.  Time alone decides here: what runs in the window counts, whoever launched it."""

    def __init__(self, view: RankView) -> None:
        compute = Cover((s.start_ns, s.end_ns) for s in view.device if s.kind == "compute")
        communication = [(s.start_ns, s.end_ns) for s in view.device if s.kind == "communication"]
        moving = [(_moves_from(s), s.end_ns) for s in view.device if s.kind == "communication"]
        copies = [(s.start_ns, s.end_ns) for s in view.device if s.kind in ("memcpy", "memset")]
        # Nested unions: each takes in one kind more, so a kind's exposed part is a difference of two.
        self._compute = compute
        self._with_communication = Cover([*compute.intervals(), *communication])
        self._with_moving = Cover([*compute.intervals(), *moving])
        self._with_copies = Cover([*self._with_communication.intervals(), *copies])
        self._threads = [Cover((s.start_ns, s.end_ns) for s in spans) for spans in view.host.values()]

    def split(self, begin: int, end: int) -> Split:
        """Divide ``[begin, end)``."""
        compute = self._compute.within(begin, end)
        with_communication = self._with_communication.within(begin, end)
        busy = self._with_copies.within(begin, end)
        return Split(
            compute=compute,
            exposed_communication=with_communication - compute,
            exposed_memcpy=busy - with_communication,
            idle=end - begin - busy,
            waiting=with_communication - self._with_moving.within(begin, end),
        )

    def host(self, begin: int, end: int) -> int:
        """Nanoseconds of ``[begin, end)`` that the busiest host thread spends in recorded calls, waiting included."""
        return max((thread.within(begin, end) for thread in self._threads), default=0)


def _moves_from(span: Span) -> int:
    """When a send or receive stops waiting for its peer; other collectives' waiting counts as communication.  Of a
    measured one the waiting is not known."""
    point_to_point = span.collective is not None and span.collective.kind in ("send", "recv")
    unknown = span.source == "measured" and not span.transfer_ns
    return span.end_ns - span.transfer_ns if point_to_point and not unknown else span.start_ns
