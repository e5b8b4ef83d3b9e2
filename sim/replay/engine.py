"""The event loop: one SimPy process per host thread and per stream, on integer nanoseconds.

The rules are those of :mod:`sim.ops`.  A process tells the time at which an operation begins or ends as soon as it
knows it, which is never after that time; those who wait compute with it.  So an operation costs one timeout and,
where somebody waits for it, one event.  The loop computes no cost: every duration comes from the placement.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import simpy

from sim.errors import DeadlockError, UserError
from sim.ops import Alloc, Collective, Free, HostCall, Lane, Op
from sim.place.placement import PlacedRank, Placement
from sim.replay.memory import RankMemory

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
    """One collective: where the ranks of a group instance wait for the last one."""

    def __init__(self, env: simpy.Environment, collective: Collective, members: tuple[int, ...], expected: int) -> None:
        self.collective = collective
        self.members = members
        self.expected = expected
        self.arrivals: dict[int, int] = {}
        self.transfer_ns = 0
        self.end = UNKNOWN
        self.over = env.event()

    def arrive(self, rank: int, time: int, transfer_ns: int) -> None:
        """``rank`` is there at ``time``; with the last arrival the end is known."""
        self.arrivals[rank] = time
        self.transfer_ns = max(self.transfer_ns, transfer_ns)
        if len(self.arrivals) == self.expected:
            self.end = max(self.arrivals.values()) + self.transfer_ns
            self.over.succeed()


class Meetings:
    """All collectives under way, by group instance and sequence number."""

    def __init__(self, env: simpy.Environment, placement: Placement) -> None:
        self._env = env
        self._graph = placement.graph
        self._present = {placed.rank for placed in placement.ranks}
        self._under_way: dict[tuple[str, tuple[int, ...], int], Meeting] = {}

    def join(self, rank: int, op: Collective, time: int, transfer_ns: int) -> Meeting:
        members = self._graph.group_of(op.group, rank)
        key = (op.group, members, op.seq)
        meeting = self._under_way.get(key)
        if meeting is None:
            expected = sum(member in self._present for member in members)
            meeting = self._under_way[key] = Meeting(self._env, op, members, expected)
        first = meeting.collective
        if not _alike(first, op):
            other = min(meeting.arrivals)
            raise UserError(
                f"{self._graph.name}: collective {op.seq} of group {op.group!r} is {op.kind} of {op.bytes} bytes on "
                f"rank {rank} but {first.kind} of {first.bytes} bytes on rank {other}: the ranks' programs disagree"
            )
        meeting.arrive(rank, time, transfer_ns)
        if meeting.end != UNKNOWN:
            del self._under_way[key]
        return meeting

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
    """One rank: its lanes as processes, its moments, its memory."""

    def __init__(self, env: simpy.Environment, placed: PlacedRank, ops: Sequence[Op], meetings: Meetings) -> None:
        self.placed = placed
        self.ops = ops
        self.moments = Moments(env, len(ops))
        self.memory = RankMemory(placed.rank, placed.memory_bytes)
        self.transfer_ns: dict[int, int] = {}
        self._env = env
        self._meetings = meetings

    def run(self, lanes: Sequence[Lane]) -> None:
        """Start one process per lane that has operations."""
        by_lane: list[list[int]] = [[] for _ in lanes]
        for i, op in enumerate(self.ops):
            by_lane[op.lane].append(i)
        for lane, indices in zip(lanes, by_lane, strict=True):
            if indices:
                self._env.process(self._thread(indices) if lane.kind == "thread" else self._stream(indices))

    def _thread(self, indices: Sequence[int]) -> Process:
        env, ops, moments, duration = self._env, self.ops, self.moments, self.placed.costs.duration_ns
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
            if now > env.now:
                yield env.timeout(now - env.now)
            if isinstance(op, Alloc):
                self.memory.allocate(op, now)
            elif isinstance(op, Free):
                self.memory.free(op, now)

    def _stream(self, indices: Sequence[int]) -> Process:
        env, ops, moments, costs = self._env, self.ops, self.moments, self.placed.costs
        start, end = moments.start, moments.end
        now = 0
        for i in indices:
            op = ops[i]
            now += costs.gap_ns[i]
            launch: int | None = op.launch  # type: ignore[union-attr]
            if launch is not None:
                if start[launch] == UNKNOWN:
                    yield moments.start_known(launch)
                now = max(now, start[launch] + costs.lag_ns[i])
            for awaited in op.after:
                if end[awaited] == UNKNOWN:
                    yield moments.end_known(awaited)
                now = max(now, end[awaited])
            if isinstance(op, Collective):
                yield from self._communicate(i, op, now)
                now = end[i]
                continue
            moments.set_start(i, now)
            now += costs.duration_ns[i]
            moments.set_end(i, now)
            if now > env.now:
                yield env.timeout(now - env.now)

    def _communicate(self, i: int, op: Collective, time: int) -> Process:
        """Arrive at ``time``, leave when all ranks of the group have arrived and the data is there."""
        self.moments.set_start(i, time)
        meeting = self._meetings.join(self.placed.rank, op, time, self.placed.costs.duration_ns[i])
        if meeting.end == UNKNOWN:
            yield meeting.over
        self.transfer_ns[i] = meeting.transfer_ns
        self.moments.set_end(i, meeting.end)
        if meeting.end > self._env.now:
            yield self._env.timeout(meeting.end - self._env.now)


def run(placement: Placement) -> list[RankReplay]:
    """Let time pass until every operation has ended.

    Raises DeadlockError where ranks wait for each other, naming ranks, collectives and operations, and UserError
    where ranks disagree about a collective.
    """
    env = simpy.Environment(initial_time=0)
    meetings = Meetings(env, placement)
    replays = []
    for placed in placement.ranks:
        program = placement.graph.programs[placed.program]
        replay = RankReplay(env, placed, program.ops, meetings)
        replay.run(program.lanes)
        replays.append(replay)
    env.run()
    _all_ended(placement, replays, meetings)
    return replays


def _all_ended(placement: Placement, replays: Sequence[RankReplay], meetings: Meetings) -> None:
    if all(UNKNOWN not in replay.moments.end for replay in replays):
        return
    waiting = meetings.waiting()
    shown = "; ".join(waiting[:4]) + (f"; and {len(waiting) - 4} more" if len(waiting) > 4 else "")
    raise DeadlockError(f"{placement.graph.name}: deadlock: {shown}")
