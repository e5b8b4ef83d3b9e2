"""The event loop: one SimPy process per host thread and per stream, on integer nanoseconds.

The rules are those of :mod:`sim.ops`.  A process tells the time at which an operation begins or ends as soon as it
knows it, which is never after that time; those who wait compute with it.  So a process runs ahead of the clock until
it needs a moment that nobody has told yet: the end of a transfer on shared links, or of a kernel on a shared device,
which only the clock can tell.  An operation costs an event where somebody waits for it, and one timeout where it
shares something.  The loop computes no cost: every duration comes from the placement.  Memory decides no moment, so it
is stepped afterwards (:mod:`sim.replay.memory`).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import simpy

from sim.errors import DeadlockError, UserError
from sim.ops import Collective, HostCall, Kernel, Lane, Op
from sim.place.placement import Flow, PlacedRank, Placement
from sim.replay.folding import Folded, fold, unfolded
from sim.replay.links import Links
from sim.replay.sharing import Sharing

UNKNOWN = -1
Process = Generator[simpy.Event, Any, None]


class Moments:
    """When each operation of a rank begins and ends, and who waits to learn it."""

    def __init__(self, env: simpy.Environment, ops: int) -> None:
        self._env = env
        self.start = [UNKNOWN] * ops
        self.end = [UNKNOWN] * ops
        self._start_known: dict[int, simpy.Event] = {}
        self._end_known: dict[int, simpy.Event] = {}

    def start_known(self, op: int) -> simpy.Event:
        return _event(self._env, self._start_known, op)

    def end_known(self, op: int) -> simpy.Event:
        return _event(self._env, self._end_known, op)

    def set_start(self, op: int, time: int) -> None:
        self.start[op] = time
        if op in self._start_known:
            self._start_known.pop(op).succeed()

    def set_end(self, op: int, time: int) -> None:
        self.end[op] = time
        if op in self._end_known:
            self._end_known.pop(op).succeed()


def _event(env: simpy.Environment, events: dict[int, simpy.Event], op: int) -> simpy.Event:
    if op not in events:
        events[op] = env.event()
    return events[op]


class Meeting:
    """One collective: where the ranks of a group instance wait for the last one, and for the transfer."""

    def __init__(self, env: simpy.Environment, collective: Collective, expected: int) -> None:
        self.collective = collective
        self.expected = expected
        self.arrivals: dict[int, int] = {}
        self.alone_ns = 0
        self.end = UNKNOWN
        self.over = env.event()

    @property
    def complete(self) -> bool:
        """All ranks have said when they arrive."""
        return len(self.arrivals) == self.expected

    @property
    def last_arrival(self) -> int:
        return max(self.arrivals.values())

    @property
    def transfer_ns(self) -> int:
        """From the last arrival to the end."""
        return self.end - self.last_arrival

    def arrive(self, rank: int, time: int, alone_ns: int) -> None:
        self.arrivals[rank] = time
        self.alone_ns = max(self.alone_ns, alone_ns)

    def finish(self, time: int) -> None:
        self.end = time
        self.over.succeed()


class Meetings:
    """All collectives under way, by group instance and sequence number."""

    def __init__(self, env: simpy.Environment, placement: Placement, links: Links | None) -> None:
        self._env = env
        self._links = links
        self._graph = placement.graph
        self._present = {placed.rank for placed in placement.ranks}
        self._members: dict[tuple[str, int], tuple[int, ...]] = {}
        self._under_way: dict[tuple[str, tuple[int, ...], int], Meeting] = {}

    def join(self, rank: int, op: Collective, time: int, alone_ns: int, flow: Flow | None) -> Meeting:
        """``rank`` arrives at ``time``; the last arrival begins the transfer."""
        members = self._members.get((op.group, rank)) or self._look_up(op.group, rank)
        key = (op.group, members, op.seq)
        meeting = self._under_way.get(key)
        if meeting is None:
            expected = sum(member in self._present for member in members)
            meeting = self._under_way[key] = Meeting(self._env, op, expected)
        first = meeting.collective
        if not _alike(first, op):
            other = min(meeting.arrivals)
            raise UserError(
                f"{self._graph.name}: collective {op.seq} of group {op.group!r} is {op.kind} of {op.bytes} bytes on "
                f"rank {rank} but {first.kind} of {first.bytes} bytes on rank {other}: the ranks' programs disagree"
            )
        meeting.arrive(rank, time, alone_ns)
        if meeting.complete:
            del self._under_way[key]
            if flow is None or self._links is None:
                meeting.finish(meeting.last_arrival + meeting.alone_ns)
            else:
                self._env.process(self._move(meeting, flow, self._links))
        return meeting

    def _look_up(self, group: str, rank: int) -> tuple[int, ...]:
        self._members[group, rank] = self._graph.group_of(group, rank)
        return self._members[group, rank]

    def _move(self, meeting: Meeting, flow: Flow, links: Links) -> Process:
        yield self._env.timeout(meeting.last_arrival + flow.latency_ns - self._env.now)
        yield links.transfer(flow)
        meeting.finish(int(self._env.now))

    def waiting(self) -> list[str]:
        """Who waits where, for the message of a deadlock."""
        lines = []
        for (group, members, seq), meeting in sorted(self._under_way.items()):
            absent = [m for m in members if m in self._present and m not in meeting.arrivals]
            lines.append(
                f"ranks {_ranks(sorted(meeting.arrivals))} wait in {meeting.collective.kind} {seq} of group {group!r} "
                f"({meeting.collective.name}) for ranks {_ranks(absent)}"
            )
        return lines


def _alike(a: Collective, b: Collective) -> bool:
    pair = {a.kind, b.kind}
    return (a.kind == b.kind or pair == {"send", "recv"}) and a.bytes == b.bytes


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"{shown} and {len(ranks) - 8} more" if len(ranks) > 8 else shown


class RankReplay:
    """One rank: its lanes as processes, and its moments."""

    def __init__(
        self,
        env: simpy.Environment,
        placed: PlacedRank,
        ops: Sequence[Op],
        meetings: Meetings,
        links: Links | None,
    ) -> None:
        self.placed = placed
        self.ops = ops
        self.moments = Moments(env, len(ops))
        self.transfer_ns: dict[int, int] = {}
        self._env = env
        self._meetings = meetings
        self._links = links
        # Where nothing is shared, and on a device without NCCL's kernels, a kernel's end is known when it starts.
        self._sharing = Sharing(placed.costs) if links is not None and placed.costs.held else None

    def run(self, lanes: Sequence[Lane]) -> None:
        """Start one process per lane that has operations."""
        by_lane: list[list[int]] = [[] for _ in lanes]
        for i, op in enumerate(self.ops):
            by_lane[op.lane].append(i)
        for lane, indices in zip(lanes, by_lane, strict=True):
            if indices:
                self._env.process(self._thread(indices) if lane.kind == "thread" else self._stream(indices))

    def _thread(self, indices: Sequence[int]) -> Process:
        ops, moments, duration = self.ops, self.moments, self.placed.costs.duration_ns
        end = moments.end
        now = 0  # the lane's own clock: where its last operation ended
        for i in indices:
            op = ops[i]
            for awaited in op.after:
                if end[awaited] == UNKNOWN:
                    yield moments.end_known(awaited)
                now = max(now, end[awaited])
            if isinstance(op, Collective):
                yield from self._communicate(i, op, now)
                now = end[i]
                continue
            now += op.before_ns  # type: ignore[union-attr]
            moments.set_start(i, now)
            if isinstance(op, HostCall):
                for awaited in op.waits:
                    if end[awaited] == UNKNOWN:
                        yield moments.end_known(awaited)
                    now = max(now, end[awaited])
                now += duration[i]
            moments.set_end(i, now)

    def _stream(self, indices: Sequence[int]) -> Process:
        ops, moments, costs = self.ops, self.moments, self.placed.costs
        start, end = moments.start, moments.end
        now = 0
        for i in indices:
            op = ops[i]
            for awaited in op.after:
                if end[awaited] == UNKNOWN:
                    yield moments.end_known(awaited)
                now = max(now, end[awaited])
            now += costs.gap_ns[i]
            launch: int | None = op.launch  # type: ignore[union-attr]
            if launch is not None:
                if start[launch] == UNKNOWN:
                    yield moments.start_known(launch)
                now = max(now, start[launch] + costs.lag_ns[i])
            if isinstance(op, Collective):
                yield from self._communicate(i, op, now)
                now = end[i]
                continue
            moments.set_start(i, now)
            if i in costs.flows and self._links is not None:
                now = yield from self._move(costs.flows[i], now, self._links)
                moments.set_end(i, now)
                continue
            if self._sharing is not None and costs.duration_ns[i] and isinstance(op, Kernel):
                now = yield from self._compute(i, op.lane, now, self._sharing)
                moments.set_end(i, now)
                continue
            now += costs.duration_ns[i]
            moments.set_end(i, now)

    def _compute(self, i: int, lane: int, start: int, sharing: Sharing) -> Generator[simpy.Event, Any, int]:
        """A kernel on a device that collectives may come to share: the moment it is over."""
        env, duration = self._env, self.placed.costs.duration_ns[i]
        sharing.begin(lane, start, int(env.now))
        left = start + duration - env.now
        while left:
            yield env.timeout(left)
            left = sharing.left_ns(i, start, duration, int(env.now))
        sharing.finish(lane)
        return int(env.now)

    def _move(self, flow: Flow, start: int, links: Links) -> Generator[simpy.Event, Any, int]:
        """A copy over links that others may use: the moment it is over."""
        yield self._env.timeout(start + flow.latency_ns - self._env.now)
        yield links.transfer(flow)
        return int(self._env.now)

    def _communicate(self, i: int, op: Collective, time: int) -> Process:
        """Arrive at ``time``, leave when all ranks of the group have arrived and the data is there."""
        self.moments.set_start(i, time)
        costs = self.placed.costs
        meeting = self._meetings.join(self.placed.rank, op, time, costs.duration_ns[i], costs.flows.get(i))
        if self._sharing is not None:
            self._sharing.hold(i, time, meeting)
        if meeting.end == UNKNOWN:
            yield meeting.over
        self.transfer_ns[i] = meeting.transfer_ns
        self.moments.set_end(i, meeting.end)


@dataclass(frozen=True)
class Replayed:
    """A placement that was replayed: the moments of the ranks that stand for all (``folded`` says for which)."""

    placement: Placement
    folded: Folded
    ranks: tuple[RankReplay, ...]


def run(placement: Placement, *, contention: bool = True, folding: bool = True) -> Replayed:
    """Let time pass until every operation has ended; without ``contention`` transfers do not share
    links, nor kernels their device with NCCL's; without ``folding`` ranks that are alike are replayed one by one.

    Raises DeadlockError where ranks wait for each other, naming ranks, collectives and operations, and UserError
    where ranks disagree about a collective.
    """
    folded = fold(placement, contention=contention) if folding else unfolded(placement)
    try:
        return Replayed(placement, folded, _run(folded.placement, contention=contention))
    except UserError:
        if folded.placement is placement:
            raise
    # What went wrong is told of all ranks, not of those that stand for them.
    return run(placement, contention=contention, folding=False)


def _run(placement: Placement, *, contention: bool) -> tuple[RankReplay, ...]:
    env = simpy.Environment(initial_time=0)
    links = Links(env) if contention else None
    meetings = Meetings(env, placement, links)
    replays = []
    for placed in placement.ranks:
        program = placement.graph.programs[placed.program]
        replay = RankReplay(env, placed, program.ops, meetings, links)
        replay.run(program.lanes)
        replays.append(replay)
    env.run()
    _all_ended(placement, replays, meetings)
    return tuple(replays)


def _all_ended(placement: Placement, replays: Sequence[RankReplay], meetings: Meetings) -> None:
    if all(UNKNOWN not in replay.moments.end for replay in replays):
        return
    waiting = meetings.waiting()
    shown = "; ".join(waiting[:4]) + (f"; and {len(waiting) - 4} more" if len(waiting) > 4 else "")
    raise DeadlockError(f"{placement.graph.name}: deadlock: {shown}")
