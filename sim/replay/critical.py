"""The critical path: which chain of operations, launches and transfers decided how long a stretch of time took.

Computed after a replay, from its moments alone.  Every operation began when the last thing it waited for was there
(its lane, its launch, an event, the last rank of a collective), so a walk back from the end finds an unbroken chain:
the segments tile the stretch exactly, across ranks.  Where causes tie the first of lane, events, launch is taken,
and a collective stays on its rank where that rank was among the last: so the same replay has one path.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

from sim.graph import Program
from sim.ops import Collective, Copy, HostCall, Kernel, Mark, Op
from sim.replay.engine import Replayed

Part = Literal["compute", "communication", "copy", "host", "launch", "gap", "contention"]


class Segment(msgspec.Struct, frozen=True, gc=False):
    """A stretch of the path, and the operation of a rank that it is spent on.

    ``part``: what the time went into.  ``host``: a thread's calls and its own work between them; ``launch``: from the
    end of the launching call to the device's start; ``gap``: the stream's turn-around; ``contention``: what a transfer
    or a kernel took beyond its time alone, because others used the same links or SMs.
    """

    rank: int
    op: int
    part: Part
    start_ns: int
    end_ns: int

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns


class _Point(NamedTuple):
    """The beginning or the end of an operation."""

    rank: int
    op: int
    is_end: bool


class _Cause(NamedTuple):
    """What a point waited for: since when nothing but ``spent`` (latest first) was between, and where to go on."""

    time: int
    spent: tuple[Segment, ...]
    before: _Point | None


class CriticalPaths:
    """The paths of one replay; indexes of programs are made once and serve every path."""

    def __init__(self, replayed: Replayed) -> None:
        self._graph = replayed.folded.placement.graph
        self._leader_of = replayed.folded.leader_of
        self._replays = {each.placed.rank: each for each in replayed.ranks}
        self._previous: dict[int, tuple[int, ...]] = {}
        self._meetings: dict[int, dict[tuple[str, int], int]] = {}

    def path(self, rank: int, begin_ns: int, end_ns: int) -> tuple[Segment, ...]:
        """What decided that ``rank`` was at ``end_ns`` no sooner, back to ``begin_ns``, in order of time.

        ``end_ns`` is a moment at which an operation of the rank ended.  The path is told of the ranks that were
        replayed: of ranks that are alike, the one that stands for them.
        """
        rank = self._leader_of[rank]
        found: list[Segment] = []
        point: _Point | None = _Point(rank, self._ending(rank, end_ns), True)
        while point is not None:
            cause = self._end_cause(point) if point.is_end else self._start_cause(point)
            for segment in cause.spent:
                if segment.duration_ns and segment.end_ns > begin_ns:
                    found.append(_from(segment, begin_ns))
            point = cause.before if cause.time > begin_ns else None
        return tuple(reversed(found))

    def _ending(self, rank: int, time: int) -> int:
        """The operation that ended at ``time``: a mark where there is one (a step ends with it), else the last."""
        replayed = self._replays[rank]
        ended = [i for i, end in enumerate(replayed.moments.end) if end == time]
        assert ended, f"nothing of rank {rank} ended at {time} ns"
        return max(ended, key=lambda i: (isinstance(replayed.ops[i], Mark), i))

    # Ends -------------------------------------------------------------------------------------------------------

    def _end_cause(self, point: _Point) -> _Cause:
        replayed = self._replays[point.rank]
        op = replayed.ops[point.op]
        if isinstance(op, Collective):
            return self._transfer(point, op)
        start, end = replayed.moments.start[point.op], replayed.moments.end[point.op]
        own, begun = _Point(point.rank, point.op, False), start
        if isinstance(op, HostCall):
            for awaited in op.waits:
                if replayed.moments.end[awaited] > begun:
                    own, begun = _Point(point.rank, awaited, True), replayed.moments.end[awaited]
        return _Cause(begun, self._work(point, op, begun, end), own)

    def _work(self, point: _Point, op: Op, start: int, end: int) -> tuple[Segment, ...]:
        """The operation itself; what it took beyond its time alone is told apart."""
        part: Part = "compute" if isinstance(op, Kernel) else "copy" if isinstance(op, Copy) else "host"
        if isinstance(op, Collective):
            part = "communication"
        alone = start + self._replays[point.rank].placed.costs.duration_ns[point.op]
        if part == "host" or alone >= end:
            return (Segment(point.rank, point.op, part, start, end),)
        shared = Segment(point.rank, point.op, "contention", alone, end)
        return (shared, Segment(point.rank, point.op, part, start, alone))

    def _transfer(self, point: _Point, op: Collective) -> _Cause:
        """A collective ends a transfer after its last rank has arrived; that rank's own past decides."""
        end = self._replays[point.rank].moments.end[point.op]
        arrivals = [self._arrival(member, op) for member in self._members(point.rank, op)]
        last = max(time for time, _ in arrivals)
        late = [arrived for time, arrived in arrivals if time == last]
        own = _Point(point.rank, point.op, False)
        return _Cause(last, self._work(point, op, last, end), own if own in late else late[0])

    def _members(self, rank: int, op: Collective) -> list[int]:
        return [member for member in self._graph.group_of(op.group, rank) if member in self._replays]

    def _arrival(self, rank: int, op: Collective) -> tuple[int, _Point]:
        replayed = self._replays[rank]
        program = replayed.placed.program
        if program not in self._meetings:
            self._meetings[program] = _collectives(self._graph.programs[program])
        i = self._meetings[program][op.group, op.seq]
        return replayed.moments.start[i], _Point(rank, i, False)

    # Beginnings -------------------------------------------------------------------------------------------------

    def _start_cause(self, point: _Point) -> _Cause:
        """The first of lane, events and launch that was there no sooner than the operation began."""
        rank, i, _ = point
        replayed = self._replays[rank]
        op, end, costs = replayed.ops[i], replayed.moments.end, replayed.placed.costs
        program = self._graph.programs[replayed.placed.program]
        on_thread = program.lanes[op.lane].kind == "thread"
        # Behind what it waited for a thread works for itself, and a stream turns around.
        delay = getattr(op, "before_ns", 0) if on_thread else costs.gap_ns[i]
        part: Part = "host" if on_thread else "gap"
        previous = self._previous_on_lane(replayed.placed.program)[i]
        before = [_Point(rank, j, True) for j in (previous, *op.after) if j >= 0]
        awaited = [*((end[each.op], each) for each in before), *([] if previous >= 0 else [(0, None)])]
        start = replayed.moments.start[i]
        for time, each in awaited:
            if time + delay == start:
                return _Cause(time, (Segment(rank, i, part, time, start),), each)
        launch = getattr(op, "launch", None)
        assert launch is not None and not on_thread, f"operation {i} of rank {rank} began at {start} ns for no reason"
        return self._launched(rank, i, launch)

    def _launched(self, rank: int, i: int, launch: int) -> _Cause:
        """From the beginning of the launching call: the call, as far as the device waits for it, and the latency."""
        replayed = self._replays[rank]
        begun = replayed.moments.start[launch]
        lag = replayed.placed.costs.lag_ns[i]
        called = begun + min(lag, replayed.placed.costs.duration_ns[launch])
        latency = Segment(rank, i, "launch", called, begun + lag)
        return _Cause(begun + lag, (latency, Segment(rank, launch, "host", begun, called)), _Point(rank, launch, False))

    def _previous_on_lane(self, program: int) -> tuple[int, ...]:
        if program not in self._previous:
            self._previous[program] = _lane_predecessors(self._graph.programs[program])
        return self._previous[program]


def _from(segment: Segment, begin_ns: int) -> Segment:
    """The segment without what lies before ``begin_ns``."""
    if segment.start_ns >= begin_ns:
        return segment
    return msgspec.structs.replace(segment, start_ns=begin_ns)


def _lane_predecessors(program: Program) -> tuple[int, ...]:
    """Per operation the one before it on its lane, or -1."""
    last = [-1] * len(program.lanes)
    previous: list[int] = []
    for i, op in enumerate(program.ops):
        previous.append(last[op.lane])
        last[op.lane] = i
    return tuple(previous)


def _collectives(program: Program) -> dict[tuple[str, int], int]:
    return {(op.group, op.seq): i for i, op in enumerate(program.ops) if isinstance(op, Collective)}
