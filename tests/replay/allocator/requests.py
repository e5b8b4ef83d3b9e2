"""Random requests for an allocator, as lines both the simulated and the real one are driven with.

a ID BYTES STREAM   allocate          r ID STREAM   record_stream      c STREAM   the stream has done its work
f ID                free              e             empty the cache    m FRACTION limit the memory
pb ID STREAM        serve this stream from a private pool      pm, pM   a capture begins, ends
pe ID               end that                                   pr ID    a user of the pool is gone
"""

from __future__ import annotations

import dataclasses
import random

from sim.errors import UserError
from sim.replay.allocator.caching import CachingAllocator
from sim.replay.allocator.device import SYNTHETIC_BASE, DeviceMemory
from sim.replay.allocator.oom import OutOfMemoryError
from sim.units import GIB, MIB

EDGES = (1, 511, 512, 513, MIB - 512, MIB, MIB + 1, 2 * MIB, 10 * MIB - 512, 10 * MIB - 1, 10 * MIB, 20 * MIB)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What kind of requests: streams used, the share of large ones, pools, and a limit of memory."""

    streams: tuple[int, ...] = (0, 16, 32)
    largest: int = 60 * MIB
    empty: float = 0.002
    pools: bool = False
    capture: bool = True
    release: bool = True
    fraction: float | None = None


def requests(seed: int, count: int, plan: Plan) -> list[str]:
    chosen = _Chosen(random.Random(seed), plan)
    if plan.fraction is not None:
        chosen.lines.append(f"m {plan.fraction}")
    for step in range(count):
        if step % 300 == 0:
            chosen.target = chosen.random.randrange(5, 250)
        chosen.step()
    return chosen.lines


class _Chosen:
    def __init__(self, source: random.Random, plan: Plan) -> None:
        self.random = source
        self.plan = plan
        self.lines: list[str] = []
        self.target = 0
        self._live: list[int] = []
        self._made = 0
        self._pool: int | None = None
        self._pools: list[int] = []

    def step(self) -> None:
        choice = self.random.random()
        several = len(self.plan.streams) > 1
        if choice < self.plan.empty:
            self.lines.append("e")
        elif several and choice < self.plan.empty + 0.02:
            self.lines.append(f"c {self.random.choice(self.plan.streams)}")
        elif self.plan.pools and choice < self.plan.empty + 0.03:
            self._begin_or_end()
        elif self._live and (len(self._live) > self.target or self.random.random() < 0.45):
            self.lines.append(f"f {self._live.pop(self.random.randrange(len(self._live)))}")
        elif self._live and several and self.random.random() < 0.05:
            self.lines.append(f"r {self.random.choice(self._live)} {self.random.choice(self.plan.streams)}")
        else:
            self.lines.append(f"a {self._made} {self._size()} {self.random.choice(self.plan.streams)}")
            self._live.append(self._made)
            self._made += 1

    def _size(self) -> int:
        kind = self.random.randrange(14)
        if kind < 4:
            return self.random.randrange(1, 5000)
        if kind < 6:
            return self.random.choice(EDGES)
        if kind < 10:
            return self.random.randrange(1, MIB)
        if kind < 13:
            return self.random.randrange(MIB, 12 * MIB)
        return self.random.randrange(10 * MIB, self.plan.largest)

    def _begin_or_end(self) -> None:
        if self._pool is not None:
            self.lines += ["pM"] * self.plan.capture + [f"pe {self._pool}"]
            self._pool = None
            return
        if self.plan.release and self._pools and self.random.random() < 0.2:
            gone = self._pools.pop(self.random.randrange(len(self._pools)))
            self.lines += [f"pr {gone}"] * sum(line.startswith(f"pb {gone} ") for line in self.lines)
            return
        again = self._pools and self.random.random() < 0.4
        self._pool = self.random.choice(self._pools) if again else len(self.lines) + 1
        if not again:
            self._pools.append(self._pool)
        self.lines += [f"pb {self._pool} {self.plan.streams[-1]}"] + ["pm"] * self.plan.capture


class StubMemory(DeviceMemory):
    """A device that gives the addresses the stub of the CUDA runtime gives (stub/cuda_stub.cpp)."""

    def __init__(self, total_bytes: int, reserved_by_others: int) -> None:
        super().__init__(total_bytes, reserved_by_others)
        self._upward = self._downward = SYNTHETIC_BASE
        self._noise = 88172645463325252

    def allocate(self, nbytes: int, stream: int) -> int | None:
        if super().allocate(nbytes, stream) is None:
            return None
        span = -(-nbytes // (2 * MIB)) * 2 * MIB
        self._noise ^= self._noise << 13 & (1 << 64) - 1
        self._noise ^= self._noise >> 7
        self._noise ^= self._noise << 17 & (1 << 64) - 1
        if self._noise & 1:
            self._downward -= span
            return self._downward
        self._upward += span
        return self._upward - span

    def reserve(self, nbytes: int, stream: int) -> int:
        address = self._next_virtual
        self._next_virtual += (nbytes + GIB) & -(2 * MIB)
        return address


def served(allocator: CachingAllocator, lines: list[str], *, capturing: bool = True) -> list[int | str]:
    """The address each allocation got, or the message it failed with."""
    answers: list[int | str] = []
    live: dict[str, int] = {}
    for line in lines:
        verb, *rest = line.split()
        if verb == "a":
            live.pop(rest[0], None)
            try:
                live[rest[0]] = allocator.malloc(int(rest[1]), int(rest[2])).address
                answers.append(live[rest[0]])
            except OutOfMemoryError as failure:
                answers.append(str(failure))
        else:
            _step(allocator, live, verb, rest, capturing)
    return answers


def _step(allocator: CachingAllocator, live: dict[str, int], verb: str, rest: list[str], capturing: bool) -> None:
    if verb == "f" and rest[0] in live:
        allocator.free(live.pop(rest[0]))
    elif verb == "r" and rest[0] in live:
        allocator.record_stream(live[rest[0]], int(rest[1]))
    elif verb == "c":
        allocator.complete_stream(int(rest[0]))
    elif verb == "e":
        allocator.empty_cache()
    elif verb == "m":
        allocator.set_memory_fraction(float(rest[0]))
    elif verb == "pb":
        stream = int(rest[1])
        allocator.begin_pool((int(rest[0]), 0), lambda other: other == stream, capturing=capturing)
    elif verb == "pe":
        allocator.end_pool((int(rest[0]), 0))
    elif verb == "pr":
        allocator.release_pool((int(rest[0]), 0))
    elif verb not in ("f", "r", "pm", "pM"):
        raise UserError(f"unknown request {verb!r}")
