"""One device shared: how much longer compute kernels take while NCCL's kernels hold SMs and move bytes beside them.

A compute kernel does work at full speed less what it loses to the collectives beside it, of the resource that bounds
it: SMs from a collective's arrival on this rank (its blocks are resident and wait) to its end, memory bandwidth from
the last rank's arrival on.  Everything is counted in whole parts per million of a nanosecond, so alone nothing changes,
and a kernel that loses a share s of its speed all the time takes exactly 1 / (1 - s) times as long.

What compute takes from collectives is nothing: their blocks keep their SMs, on the links they meet no compute, and of
memory, shared max-min fairly, who asks for less than half gets it all (docs/whatif.md).  Ignored: that a collective's
blocks must wait for a free SM when they come.
"""

from __future__ import annotations

from typing import Protocol

from sim.place.placement import Costs, Held

PPM = 1_000_000
# However many collectives hold a device at once, a kernel keeps a tenth of its speed.
_LEAST = PPM // 10


class Transfer(Protocol):
    """What must be known of a collective: -1 where a moment is not known yet."""

    end: int

    @property
    def complete(self) -> bool: ...

    @property
    def last_arrival(self) -> int: ...


class _Hold:
    """A collective on this rank: since when its kernel is there, and what it takes."""

    __slots__ = ("begun", "losses", "memory_ppm", "sms_ppm", "transfer")

    def __init__(self, begun: int, transfer: Transfer, held: Held, losses: dict[int, int]) -> None:
        self.begun = begun
        self.transfer = transfer
        self.sms_ppm = held.sms_ppm
        self.memory_ppm = held.memory_ppm
        self.losses = losses

    def taken(self, op: int, bound: str, begin: int, until: int) -> int:
        """Parts per million x nanoseconds of ``[begin, until)`` that a kernel of that bound loses to it."""
        if bound == "memory":
            if not self.transfer.complete:
                return 0
            since, ppm = self.transfer.last_arrival, self.memory_ppm
        else:
            since, ppm = self.begun, self.losses.get(op, self.sms_ppm)
        end = until if self.transfer.end < 0 else min(until, self.transfer.end)
        return max(0, end - max(since, begin)) * ppm


class Sharing:
    """The compute kernels and collectives of one rank's device."""

    def __init__(self, costs: Costs) -> None:
        self._held = costs.held
        self._bounds = costs.bounds
        self._losses = costs.losses
        self._holds: list[_Hold] = []
        self._running: dict[int, int] = {}

    def hold(self, op: int, begun: int, transfer: Transfer) -> None:
        """A collective's kernel is on the device from ``begun`` until its transfer ends."""
        if op in self._held:
            held = self._held[op]
            self._holds.append(_Hold(begun, transfer, held, self._losses.get(held.sms_ppm, {})))

    def begin(self, lane: int, start: int, now: int) -> None:
        """A kernel begins on a lane at ``start``, now or later; what ended before all that run or come is forgotten."""
        self._running[lane] = start
        oldest = min(now, *self._running.values())
        if self._holds:
            self._holds = [h for h in self._holds if h.transfer.end < 0 or h.transfer.end > oldest]

    def left_ns(self, op: int, start: int, duration: int, now: int) -> int:
        """Nanoseconds that a kernel begun at ``start`` needs from ``now`` on, at full speed; 0 where it is done."""
        bound = self._bounds.get(op, "compute")
        elapsed = now - start
        lost = 0 if bound == "floor" else sum(hold.taken(op, bound, start, now) for hold in self._holds)
        done = max(elapsed * PPM - lost, elapsed * _LEAST)
        return max(0, -((done - duration * PPM) // PPM))

    def finish(self, lane: int) -> None:
        """The kernel on a lane has ended."""
        del self._running[lane]
