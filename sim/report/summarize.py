"""Summarize: from one timeline, or a predicted and a measured one, to the numbers that are told.

A pure function of timelines.  Inside, all times are integer nanoseconds; a decimal number of milliseconds is made once,
at the end.

How the numbers are defined:

* A step of the job lasts as long as the slowest rank's; ``step_ms`` is the mean of ``steps_ms``.
* Device work is everything that runs on a stream (kernels, copies, memsets, collectives with their waiting for
  peers) and, in a run without a GPU, the compute and communication of host threads.  It belongs to the step that
  launched it (see ``sim.report.steps``).  The *busiest rank* has the largest sum of its durations over all steps;
  of equals, the first.
* ``kernel_ms`` is that sum on the busiest rank, per step.
* ``breakdown_ms`` divides, in every step, the window of the rank that is slowest in it, by what runs at each
  instant (see ``Split``), and takes the mean: it adds up to ``step_ms``.
* A rank's ``busy_ms`` is the time in its windows in which at least one piece of device work runs; ``waiting_ms`` is the
  part of it in which that is nothing but sends and receives that wait for their peer, as in a pipeline's bubble.
* ``collectives`` count the whole run, steps or not, on one rank: the busiest if it takes part, else the first that
  does.  ``total_ms`` includes waiting for peers, ``transfer_ms`` does not.
* ``durations_from`` counts the device work of all ranks, in the whole run, by where its duration came from.
* ``top_ops`` are the ten names that cost the busiest rank most in its steps.
* ``host_ms`` is what the busiest host thread of a step's slowest rank spends in recorded calls, waiting in
  synchronising calls included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

from sim.errors import UserError
from sim.ops import CollectiveKind
from sim.report.cover import Cover
from sim.report.steps import UNMARKED, RankView, Split, Splitter, job_steps, rank_views, slowest
from sim.report.summary import (
    Breakdown,
    CollectiveRow,
    DurationsFrom,
    OpRow,
    OutOfMemoryRow,
    PeakRow,
    RankSummary,
    StepRow,
    Summary,
)
from sim.timeline import CollectiveInfo, DurationSource, RankInfo, Span, Step, Timeline
from sim.units import ms_from_ns

TOP_OPS = 10
LEFT_BEHIND = 1.05  # a step's own device work by its length, from which on the host is said to run away from it


def summarize(
    timeline: Timeline,
    measured: Timeline | None = None,
    *,
    ops: int | None = None,
    replay_seconds: float | None = None,
) -> Summary:
    """Tell ``timeline``, and how it compares with ``measured`` where that is given.

    ``ops`` is how many operations were simulated (by default the spans and the memory samples), ``replay_seconds``
    how long the event loop took: the timeline has no clock and cannot know it.  UserError where the timeline has
    no rank.
    """
    if not timeline.ranks:
        raise UserError(f"{timeline.name}: a timeline without ranks has nothing to tell")
    views = rank_views(timeline)
    distinct = [view for view in views if view.rank == view.same_as]
    once = {view.rank: Splitter(view) for view in distinct}
    splitters = {view.rank: once[view.same_as] for view in views}
    job = _job(timeline.name, views, splitters)
    busiest = max(distinct, key=_device_ns)
    measurement = _measure(measured, timeline)
    ranks = _ranks(timeline.ranks, views, splitters, measurement, _peak_bytes(timeline))
    return Summary(
        name=timeline.name,
        step_ms=job.step_ms,
        steps_ms=tuple(ms_from_ns(step.duration_ns) for step in job.steps),
        kernel_ms=_kernel_ms(busiest),
        peak_allocated_bytes=_largest(rank.peak_allocated_bytes for rank in ranks),
        peak_reserved_bytes=_largest(rank.peak_reserved_bytes for rank in ranks),
        out_of_memory=bool(timeline.out_of_memory),
        measured_step_ms=measurement.step_ms,
        measured_steps_ms=measurement.steps_ms,
        measured_trace_ms=measurement.trace_ms,
        measured_on=measurement.device,
        measured_peak_allocated_bytes=_largest(m.allocated_bytes for m in measured.memory) if measured else None,
        measured_peak_reserved_bytes=_largest(m.reserved_bytes for m in measured.memory) if measured else None,
        step_error=measurement.error(job.step_ms, measurement.step_ms),
        breakdown_ms=_breakdown(job.splits),
        host_ms=ms_from_ns(_mean(job.host_ns)),
        ranks=ranks,
        collectives=_collectives(distinct, busiest),
        durations_from=_durations_from(views),
        top_ops=_top_ops(busiest),
        per_step=_per_step(job, measurement),
        memory_peaks=_peaks(timeline),
        out_of_memory_at=_out_of_memory(timeline),
        ranks_replayed=len(distinct),
        ops=len(timeline.spans) + len(timeline.memory) if ops is None else ops,
        replay_seconds=replay_seconds,
        warnings=_warnings(timeline, measured, busiest),
    )


class _Job(NamedTuple):
    """The job's steps, each as its slowest rank had it: what ran in its window, and what the host spent there."""

    steps: Sequence[Step]
    splits: Sequence[Split]
    host_ns: Sequence[int]

    @property
    def step_ms(self) -> float:
        return ms_from_ns(_mean([step.duration_ns for step in self.steps]))


def _job(name: str, views: Sequence[RankView], splitters: Mapping[int, Splitter]) -> _Job:
    steps = [slowest(steps) for steps in job_steps(views)]
    if not steps:
        raise UserError(f"{name}: none of its steps is on one of its ranks")
    splits = [splitters[step.rank].split(step.start_ns, step.end_ns) for step in steps]
    host_ns = [splitters[step.rank].host(step.start_ns, step.end_ns) for step in steps]
    return _Job(steps, splits, host_ns)


class _Measurement(msgspec.Struct, frozen=True):
    """What a measured timeline says of its steps; all None or empty where there is none, or it has no marks."""

    step_ms: float | None = None
    steps_ms: tuple[float, ...] | None = None
    trace_ms: float | None = None
    by_rank: dict[int, float] = {}
    device: str | None = None
    same_device: bool = True

    def error(self, predicted: float, measured: float | None) -> float | None:
        """predicted / measured - 1; None where they are about different devices, which is a comparison, no error."""
        return predicted / measured - 1 if measured and self.same_device else None


def _measure(measured: Timeline | None, timeline: Timeline) -> _Measurement:
    if measured is None:
        return _Measurement()
    here, there = (sorted({info.device_name for info in t.ranks if info.device_name}) for t in (timeline, measured))
    device, same = ", ".join(there) or None, not here or not there or here == there
    views = rank_views(measured)
    job = [slowest(steps) for steps in job_steps(views)]
    if not job:
        return _Measurement()
    mean = ms_from_ns(_mean([step.duration_ns for step in job]))
    if all(step.name == UNMARKED for step in job):
        return _Measurement(trace_ms=mean, device=device, same_device=same)
    by_rank = {view.rank: ms_from_ns(_mean([s.duration_ns for s in view.steps])) for view in views if view.steps}
    steps_ms = tuple(ms_from_ns(step.duration_ns) for step in job)
    return _Measurement(mean, steps_ms, None, by_rank, device, same)


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else 0.0


def _device_ns(view: RankView) -> int:
    return sum(span.duration_ns for span in view.in_steps())


def _kernel_ms(view: RankView) -> float:
    return ms_from_ns(_device_ns(view) / len(view.steps)) if view.steps else 0.0


def _breakdown(splits: Sequence[Split]) -> Breakdown:
    def mean(part: Callable[[Split], int]) -> float:
        return ms_from_ns(_mean([part(split) for split in splits]))

    return Breakdown(
        compute=mean(lambda s: s.compute),
        exposed_communication=mean(lambda s: s.exposed_communication),
        exposed_memcpy=mean(lambda s: s.exposed_memcpy),
        idle=mean(lambda s: s.idle),
    )


def _ranks(
    infos: Sequence[RankInfo],
    views: Sequence[RankView],
    splitters: Mapping[int, Splitter],
    measurement: _Measurement,
    peaks: Mapping[int, tuple[int, int]],
) -> tuple[RankSummary, ...]:
    """Every rank; what ranks have in common is worked out once."""
    known: dict[int, RankSummary] = {}
    for info, view in zip(infos, views, strict=True):
        own = known.get(view.same_as) or _rank(info, view, splitters[view.rank], peaks.get(info.rank))
        known[info.rank] = msgspec.structs.replace(
            own,
            rank=info.rank,
            device=info.device,
            device_name=info.device_name,
            measured_step_ms=measurement.by_rank.get(info.rank),
            memory_bytes=info.memory_bytes,
            outside_bytes=info.outside,
        )
    return tuple(known.values())


def _rank(info: RankInfo, view: RankView, splitter: Splitter, peak: tuple[int, int] | None) -> RankSummary:
    splits = [splitter.split(step.start_ns, step.end_ns) for step in view.steps]
    return RankSummary(
        rank=info.rank,
        device=info.device,
        device_name=info.device_name,
        step_ms=ms_from_ns(_mean([step.duration_ns for step in view.steps])),
        measured_step_ms=None,
        busy_ms=ms_from_ns(_mean([split.busy for split in splits])),
        waiting_ms=ms_from_ns(_mean([split.waiting for split in splits])),
        kernel_ms=_kernel_ms(view),
        breakdown_ms=_breakdown(splits),
        peak_allocated_bytes=peak[0] if peak else None,
        peak_reserved_bytes=peak[1] if peak else None,
        memory_bytes=info.memory_bytes,
        outside_bytes=info.outside,
    )


def _peak_bytes(timeline: Timeline) -> dict[int, tuple[int, int]]:
    """Per rank with memory events, the most that was allocated and the most that was reserved."""
    of: dict[int, tuple[int, int]] = {}  # by list of samples, which ranks that do the same share
    peaks: dict[int, tuple[int, int]] = {}
    for rank, samples in timeline.own_memory().items():
        if id(samples) not in of:
            of[id(samples)] = (max(s.allocated_bytes for s in samples), max(s.reserved_bytes for s in samples))
        peaks[rank] = of[id(samples)]
    for peak in timeline.peaks:
        allocated, reserved = peaks.get(peak.rank, (0, 0))
        peaks[peak.rank] = max(allocated, peak.allocated_bytes), max(reserved, peak.reserved_bytes)
    return peaks


def _largest(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _collectives(views: Sequence[RankView], busiest: RankView) -> tuple[CollectiveRow, ...]:
    """Rows in order of cost, dearest first; of equals, in order of kind and size."""
    told: dict[tuple[CollectiveKind, int, int, str, str], list[Span]] = {}
    for view in (busiest, *(view for view in views if view is not busiest)):
        own: dict[tuple[CollectiveKind, int, int, str, str], list[Span]] = {}
        for span in view.device:
            if span.collective is not None:
                own.setdefault(_alike(span.collective), []).append(span)
        told = {**own, **told}
    rows = [
        CollectiveRow(
            *key,
            count=len(spans),
            total_ms=ms_from_ns(sum(span.duration_ns for span in spans)),
            transfer_ms=ms_from_ns(sum(span.transfer_ns for span in spans)),
        )
        for key, spans in told.items()
    ]
    return tuple(sorted(rows, key=lambda r: (-r.total_ms, r.kind, r.bytes, r.ranks, r.algorithm, r.protocol)))


def _alike(collective: CollectiveInfo) -> tuple[CollectiveKind, int, int, str, str]:
    return collective.kind, collective.bytes, collective.ranks, collective.algorithm, collective.protocol


def _durations_from(views: Sequence[RankView]) -> DurationsFrom:
    counts: dict[DurationSource, int] = {"measured": 0, "profile": 0, "roofline": 0, "estimate": 0}
    ranks = Counter(view.same_as for view in views)
    for view in views:
        if view.rank == view.same_as:
            for span in view.device:
                counts[span.source] += ranks[view.rank]
    return DurationsFrom(**counts)


def _top_ops(view: RankView) -> tuple[OpRow, ...]:
    totals: dict[str, tuple[int, int]] = {}
    for span in view.in_steps():
        count, total = totals.get(span.name, (0, 0))
        totals[span.name] = count + 1, total + span.duration_ns
    whole = sum(total for _, total in totals.values())
    dearest = sorted(totals.items(), key=lambda item: (-item[1][1], item[0]))[:TOP_OPS]
    return tuple(
        OpRow(name=name, count=count, total_ms=ms_from_ns(total), share=total / whole if whole else 0.0)
        for name, (count, total) in dearest
    )


def _per_step(job: _Job, measurement: _Measurement) -> tuple[StepRow, ...]:
    measured = measurement.steps_ms or ()
    rows = []
    for i, (step, split, host_ns) in enumerate(zip(job.steps, job.splits, job.host_ns, strict=True)):
        step_ms = ms_from_ns(step.duration_ns)
        measured_ms = measured[i] if i < len(measured) else None
        error = measurement.error(step_ms, measured_ms)
        rows.append(
            StepRow(step.name, step.rank, step_ms, measured_ms, error, _breakdown([split]), ms_from_ns(host_ns))
        )
    return tuple(rows)


def _peaks(timeline: Timeline) -> tuple[PeakRow, ...]:
    return tuple(
        PeakRow(
            rank=peak.rank,
            time_ms=ms_from_ns(peak.time_ns),
            allocated_bytes=peak.allocated_bytes,
            reserved_bytes=peak.reserved_bytes,
            op=peak.op,
            by_category=dict(sorted(peak.by_category.items(), key=lambda item: (-item[1], item[0]))),
            by_module=dict(sorted(peak.by_module.items(), key=lambda item: (-item[1], item[0]))),
            fragmentation=1 - peak.allocated_bytes / peak.reserved_bytes if peak.reserved_bytes else 0.0,
        )
        for peak in timeline.peaks
    )


def _out_of_memory(timeline: Timeline) -> tuple[OutOfMemoryRow, ...]:
    info = {info.rank: info for info in timeline.ranks}
    return tuple(
        OutOfMemoryRow(
            rank=event.rank,
            device=info[event.rank].device,
            device_name=info[event.rank].device_name,
            time_ms=ms_from_ns(event.time_ns),
            op=event.op,
            requested_bytes=event.requested_bytes,
            allocated_bytes=event.allocated_bytes,
            reserved_bytes=event.reserved_bytes,
            capacity_bytes=event.capacity_bytes,
            short_bytes=max(0, event.reserved_bytes + event.requested_bytes - event.capacity_bytes),
        )
        for event in timeline.out_of_memory
    )


def _warnings(timeline: Timeline, measured: Timeline | None, busiest: RankView) -> tuple[str, ...]:
    """Those of both timelines, each once, in their order, and what this telling had to assume."""
    told = dict.fromkeys(timeline.warnings)
    told.update(dict.fromkeys(measured.warnings if measured is not None else ()))
    if not timeline.steps:
        told["no step is marked: the whole run is told as one step"] = None
    told.update(dict.fromkeys(_left_behind(busiest)))
    return tuple(told)


def _left_behind(view: RankView) -> Iterator[str]:
    """Steps that end on the host long before the device has done what they launched: no pace that lasts."""
    launched = Cover((span.start_ns, span.end_ns) for span in view.in_steps())
    busy = sum(end - begin for begin, end in launched.intervals())
    steps = sum(step.duration_ns for step in view.steps)
    if busy > LEFT_BEHIND * steps > 0:
        yield (
            f"the host does not wait for the device at a step's end: what a step launches keeps it busy for "
            f"{ms_from_ns(busy / len(view.steps)):.2f} ms, and steps in a row take no less"
        )
