"""A replay repeated with other durations, all repetitions in one pass.

The rules of the event loop without its clock: every moment is the latest of what it waits for plus a duration, so a
vector of durations, one a repetition, gives a vector of moments.  What sharing links and SMs cost an operation in the
replay itself is part of its duration here and scales with it; so with all factors at one the moments are the replay's,
to the nanosecond.  Ranks that the replay folded are computed once here too (alike, they are in doubt alike).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.graph import OpGraph
from sim.ops import Alloc, Collective, Free, HostCall, Mark, Op
from sim.place.placement import NONE, RankDoubt
from sim.replay.engine import RankReplay, Replayed

Times = NDArray[np.int64]
PPM = 1_000_000
_Key = tuple[int, str, int]  # a rank; "start" or "end" of an operation, or a group and the collective's number
_UNTOLD = (Alloc, Free, Mark)  # no spans of a timeline
_MOST_KEPT = 4096  # scaled durations; those of a trace differ from op to op
_LARGE_NS = 1 << 39  # nine minutes: beyond, nanoseconds times parts per million leave 64 bits
_Lane = Generator[_Key, None, None]


class Wanted(NamedTuple):
    """Which moments of a rank are asked for: those of marks, and the sum of the durations of ``device``."""

    marks: frozenset[int]
    device: frozenset[int]


class Drawn(NamedTuple):
    """A rank's moments, one value a repetition: ends by operation, the whole run's end, and its device time."""

    ends: dict[int, Times]
    over: Times
    device: Times


def repeat(
    replayed: Replayed,
    doubts: dict[int, RankDoubt],
    factors: NDArray[np.int64],
    wanted: dict[int, Wanted],
) -> dict[int, Drawn]:
    """The moments of every replayed rank for every column of ``factors``: per kind of doubt, parts per million of
    durations."""
    graph = replayed.folded.placement.graph
    board = _Board(frozenset(rank.placed.rank for rank in replayed.ranks))
    passes: dict[int, _Pass] = {}
    for each in replayed.ranks:
        rank = each.placed.rank
        passes[rank] = _Pass(graph, each, doubts[rank], factors, wanted[rank], board)
        board.ready += passes[rank].lanes
    board.run()
    return {rank: each.drawn() for rank, each in passes.items()}


class _Board:
    """What is known of several ranks together: arrivals at collectives, and who waits for what."""

    def __init__(self, ranks: frozenset[int]) -> None:
        self.ranks = ranks
        self.arrivals: dict[_Key, Times] = {}
        self.waiting: dict[_Key, list[_Lane]] = {}
        self.ready: list[_Lane] = []

    def wake(self, key: _Key) -> None:
        """Those that waited for this go on."""
        self.ready += self.waiting.pop(key, ())

    def run(self) -> None:
        """Let every lane go on as far as it can until all have ended."""
        while self.ready:
            lane = self.ready.pop()
            key = next(lane, None)
            if key is not None:
                self.waiting.setdefault(key, []).append(lane)
        assert not self.waiting, "the replay ended, so every lane does"


class _Pass:
    """One rank: its lanes, each a generator that stops where it waits for what is not known yet."""

    def __init__(
        self,
        graph: OpGraph,
        replayed: RankReplay,
        doubt: RankDoubt,
        factors: NDArray[np.int64],
        wanted: Wanted,
        board: _Board,
    ) -> None:
        program = graph.programs[replayed.placed.program]
        self.rank = replayed.placed.rank
        self._graph = graph
        self._replayed = replayed
        self._ops: Sequence[Op] = program.ops
        self._doubt = doubt
        self._factors = factors
        self._wanted = wanted
        self._board = board
        self._start: dict[int, Times] = {}
        self._end: dict[int, Times] = {}
        self._scaled: dict[tuple[int, int], Times] = {}
        self._zero: Times = np.zeros(factors.shape[1], dtype=np.int64)
        self._over, self._device = self._zero, self._zero
        self._starts_needed, self._ends_needed = _needed(program.ops)
        by_lane: list[list[int]] = [[] for _ in program.lanes]
        for i, op in enumerate(program.ops):
            by_lane[op.lane].append(i)
        self.lanes = [
            self._thread(indices) if lane.kind == "thread" else self._stream(indices)
            for lane, indices in zip(program.lanes, by_lane, strict=True)
        ]

    def drawn(self) -> Drawn:
        return Drawn({i: self._end[i] for i in self._wanted.marks}, self._over, self._device)

    def _thread(self, indices: Sequence[int]) -> _Lane:
        now: Times = self._zero
        host = self._doubt.host
        durations = self._replayed.placed.costs.duration_ns
        for i in indices:
            op = self._ops[i]
            if op.after:
                now = yield from self._after(op.after, now)
            if isinstance(op, Collective):
                now = yield from self._communicate(i, op, now)
                continue
            before: int = op.before_ns  # type: ignore[union-attr]
            if before:
                now = now + self._scale(before, host)
            self._begin(i, now)
            begun = now
            if isinstance(op, HostCall):
                if op.waits:
                    now = yield from self._after(op.waits, now)
                if durations[i]:
                    now = now + self._scale(durations[i], host)
            self._finish(i, begun, now)

    def _stream(self, indices: Sequence[int]) -> _Lane:
        now: Times = self._zero
        costs = self._replayed.placed.costs
        moments, kinds = self._replayed.moments, self._doubt.kind
        for i in indices:
            op = self._ops[i]
            if op.after:
                now = yield from self._after(op.after, now)
            if costs.gap_ns[i]:
                now = now + self._scale(costs.gap_ns[i], self._doubt.launch)
            launch: int | None = op.launch  # type: ignore[union-attr]
            if launch is not None:
                if launch not in self._start:
                    yield (self.rank, "start", launch)
                now = np.maximum(now, self._start[launch] + self._lag(i, launch))
            if isinstance(op, Collective):
                now = yield from self._communicate(i, op, now)
                continue
            self._begin(i, now)
            begun = now
            now = now + self._scale(moments.end[i] - moments.start[i], kinds[i] if kinds else NONE)
            self._finish(i, begun, now)

    def _after(self, awaited: Sequence[int], now: Times) -> Generator[_Key, None, Times]:
        """Until the ends of others are known: the latest of them and now."""
        for op in awaited:
            if op not in self._end:
                yield (self.rank, "end", op)
            now = np.maximum(now, self._end[op])
        return now

    def _lag(self, i: int, launch: int) -> Times:
        """The call as far as the device waits for it is the host's; the latency behind it is the launch's."""
        costs = self._replayed.placed.costs
        called = min(costs.lag_ns[i], costs.duration_ns[launch])
        return self._scale(called, self._doubt.host) + self._scale(costs.lag_ns[i] - called, self._doubt.launch)

    def _communicate(self, i: int, op: Collective, begun: Times) -> Generator[_Key, None, Times]:
        self._begin(i, begun)
        self._board.arrivals[self.rank, op.group, op.seq] = begun
        self._board.wake((self.rank, op.group, op.seq))
        members = self._graph.group_of(op.group, self._replayed.placed.rank)
        last = begun
        for member in members:
            if member not in self._board.ranks:
                continue
            key = (member, op.group, op.seq)
            if key not in self._board.arrivals:
                yield key
            last = np.maximum(last, self._board.arrivals[key])
        kinds = self._doubt.kind
        end: Times = last + self._scale(self._replayed.transfer_ns[i], kinds[i] if kinds else NONE)
        self._finish(i, begun, end)
        return end

    def _begin(self, i: int, time: Times) -> None:
        if i in self._starts_needed:
            self._start[i] = time
            self._board.wake((self.rank, "start", i))

    def _finish(self, i: int, begun: Times, time: Times) -> None:
        if not isinstance(self._ops[i], _UNTOLD):
            self._over = np.maximum(self._over, time)
        if i in self._wanted.device:
            self._device = self._device + (time - begun)
        if i in self._ends_needed:
            self._end[i] = time
            self._board.wake((self.rank, "end", i))

    def _scale(self, ns: int, kind: int) -> Times:
        found = self._scaled.get((ns, kind))
        if found is None:
            if len(self._scaled) >= _MOST_KEPT:
                self._scaled.clear()
            found = self._scaled[ns, kind] = self._scaled_anew(ns, kind)
        return found

    def _scaled_anew(self, ns: int, kind: int) -> Times:
        if kind == NONE:
            return self._zero + ns
        factors = self._factors[kind]
        if ns < _LARGE_NS:
            return np.asarray((factors * ns + PPM // 2) // PPM)
        return np.asarray(np.rint(factors * (ns / PPM)), dtype=np.int64)


def _needed(ops: Sequence[Op]) -> tuple[set[int], set[int]]:
    """The operations whose start and whose end somebody asks for."""
    starts: set[int] = set()
    ends: set[int] = set()
    for i, op in enumerate(ops):
        ends.update(op.after)
        if isinstance(op, HostCall):
            ends.update(op.waits)
        elif isinstance(op, Mark):
            ends.add(i)
        launch = getattr(op, "launch", None)
        if launch is not None:
            starts.add(launch)
    return starts, ends
