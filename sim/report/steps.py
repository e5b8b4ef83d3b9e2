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
from sim.timeline import Span, Step, Timeline

UNMARKED = "trace"  # the name of the one step that stands for a trace without step marks


class RankView(msgspec.Struct, frozen=True):
    """One rank of a timeline: its steps in order of time, its device spans in order of the timeline, the step that
    each of these belongs to (an index into ``steps``, or -1), and its host spans by track."""

    rank: int
    steps: tuple[Step, ...]
    device: tuple[Span, ...]
    step_of: tuple[int, ...]
    host: dict[int, tuple[Span, ...]]

    def in_steps(self) -> list[Span]:
        """The device spans that belong to a step."""
        return [span for span, step in zip(self.device, self.step_of, strict=True) if step >= 0]


def rank_views(timeline: Timeline) -> tuple[RankView, ...]:
    """Every rank of the timeline, in the timeline's order, in one pass over the spans."""
    device: dict[int, list[Span]] = {info.rank: [] for info in timeline.ranks}
    host: dict[int, dict[int, list[Span]]] = {info.rank: {} for info in timeline.ranks}
    rank_of = [track.rank for track in timeline.tracks]
    for span in timeline.spans:
        rank = rank_of[span.track]
        if span.kind == "host":
            host[rank].setdefault(span.track, []).append(span)
        else:
            device[rank].append(span)
    return tuple(
        _view(timeline, info.rank, tuple(device[info.rank]), {t: tuple(s) for t, s in host[info.rank].items()})
        for info in timeline.ranks
    )


def _view(timeline: Timeline, rank: int, device: tuple[Span, ...], host: dict[int, tuple[Span, ...]]) -> RankView:
    steps = tuple(sorted((s for s in timeline.steps if s.rank == rank), key=lambda s: (s.start_ns, s.end_ns)))
    if not timeline.steps:
        ends = [span.end_ns for span in device] + [span.end_ns for spans in host.values() for span in spans]
        steps = (Step(rank=rank, index=0, name=UNMARKED, start_ns=0, end_ns=max(ends, default=0)),)
    starts = [step.start_ns for step in steps]
    step_of = tuple(
        _step_at(steps, starts, timeline.spans[span.launch].start_ns if span.launch >= 0 else span.start_ns)
        for span in device
    )
    return RankView(rank=rank, steps=steps, device=device, step_of=step_of, host=host)


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
    """

    compute: int
    exposed_communication: int
    exposed_memcpy: int
    idle: int

    @property
    def busy(self) -> int:
        return self.compute + self.exposed_communication + self.exposed_memcpy


class Splitter:
    """Divides windows of one rank.  Time alone decides here: what runs in the window counts, whoever launched it."""

    def __init__(self, view: RankView) -> None:
        compute = Cover((s.start_ns, s.end_ns) for s in view.device if s.kind == "compute")
        communication = [(s.start_ns, s.end_ns) for s in view.device if s.kind == "communication"]
        copies = [(s.start_ns, s.end_ns) for s in view.device if s.kind in ("memcpy", "memset")]
        # Nested unions: each takes in one kind more, so a kind's exposed part is a difference of two.
        self._compute = compute
        self._with_communication = Cover([*compute.intervals(), *communication])
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
        )

    def host(self, begin: int, end: int) -> int:
        """Nanoseconds of ``[begin, end)`` that the busiest host thread spends in recorded calls, waiting included."""
        return max((thread.within(begin, end) for thread in self._threads), default=0)
