"""Links shared in time: transfers that cross a lane at the same moment share it, max-min fairly.

A transfer is one flow with a load on every lane of its way (a collective: on each lane of its rings), moving at one
rate between 0 and 1, where 1 is what it reaches alone.  Rates grow together until a lane is full; the flows of that
lane stay there, the others go on growing (progressive filling: Bertsekas and Gallager, Data Networks, section
6.5.2).  Whenever a flow comes or goes all rates are computed anew, so a transfer's end moves with its neighbours.

Ignored: the loss that competing flows cause each other beyond sharing (arbitration, congestion control).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from math import ceil

import simpy

from sim.place.placement import Flow

_TINY = 1e-9  # parts of a lane, or of a nanosecond, that are rounding and not load


class _Moving:
    """A flow under way: nanoseconds of work left at rate 1, and its rate now."""

    __slots__ = ("done", "flow", "left_ns", "rate")

    def __init__(self, flow: Flow, done: simpy.Event) -> None:
        self.flow = flow
        self.done = done
        self.left_ns = float(flow.transfer_ns)
        self.rate = 1.0


class Links:
    """All transfers of a replay that are on their way."""

    def __init__(self, env: simpy.Environment) -> None:
        self._env = env
        self._moving: list[_Moving] = []
        self._since = 0
        self._plan = 0  # a wake-up of an older plan finds a newer number and does nothing

    def transfer(self, flow: Flow) -> simpy.Event:
        """Start moving now; the event fires when the last byte is there."""
        done = self._env.event()
        self._advance()
        self._moving.append(_Moving(flow, done))
        self._settle()
        return done

    def _advance(self) -> None:
        elapsed = int(self._env.now) - self._since
        for moving in self._moving:
            moving.left_ns -= moving.rate * elapsed
        self._since = int(self._env.now)

    def _settle(self) -> None:
        """Let go those that are done, give the others their rates, and wake up when the next is done."""
        arrived = [m for m in self._moving if m.left_ns <= _TINY * max(1, m.flow.transfer_ns)]
        self._moving = [m for m in self._moving if m not in arrived]
        for moving in arrived:
            moving.done.succeed()
        self._plan += 1
        if not self._moving:
            return
        for moving, rate in zip(self._moving, fair_rates([m.flow for m in self._moving]), strict=True):
            moving.rate = rate
        soonest = min(ceil(m.left_ns / m.rate - _TINY * m.flow.transfer_ns) for m in self._moving)
        self._env.process(self._wake(self._plan, max(soonest, 1)))

    def _wake(self, plan: int, after: int) -> Generator[simpy.Event, None, None]:
        yield self._env.timeout(after)
        if plan == self._plan:
            self._advance()
            self._settle()


def fair_rates(flows: Sequence[Flow]) -> list[float]:
    """Max-min fair rates, each at most 1, so that no lane is more than full."""
    rates = [0.0] * len(flows)
    growing = set(range(len(flows)))
    room: dict[str, float] = {lane: 1.0 for flow in flows for lane, _ in flow.shares}
    while growing:
        demand: dict[str, float] = {}
        for i in sorted(growing):
            for lane, share in flows[i].shares:
                demand[lane] = demand.get(lane, 0.0) + share
        step = min(1.0 - rates[i] for i in growing)
        step = min([step, *(room[lane] / wanted for lane, wanted in demand.items())])
        for i in growing:
            rates[i] += step
        for lane, wanted in demand.items():
            room[lane] -= step * wanted
        full = {lane for lane in demand if room[lane] <= _TINY}
        growing = {
            i for i in growing
            if rates[i] < 1.0 - _TINY and not any(lane in full for lane, _ in flows[i].shares)
        }  # fmt: skip
    return rates
