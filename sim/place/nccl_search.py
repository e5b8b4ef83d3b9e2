"""The rings that NCCL would find inside one host.

After the search in NVIDIA/nccl src/graph/search.cc: speeds a channel are tried from fast to slow, path kinds from
near to far; at each, rings are laid over the links' remaining bandwidth, the nearest neighbour first, a found ring
again as long as it fits.  The combination with most channels x speed wins.  Left out: the search's time limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from sim.place import nccl_tables as tables
from sim.topology.machine import Gpu, Machine, PathClass, Route

Ring = tuple[str, ...]
Channel = TypeVar("Channel")
Kinds = TypeVar("Kinds")

NEAR_TO_FAR: tuple[PathClass, ...] = ("NVL", "NVS", "PIX", "PXB", "PHB", "SYS")
_MOST_TRIES = 20_000
MOST_FOUND = tables.MOST_CHANNELS // 2
_PLAIN_ORDER_SPEED = 0.1  # where nothing is found NCCL falls back to the plain order, believed to be so slow


@dataclass
class Attempt:
    """One pass of a search: the speed a channel, the kinds of path allowed, what the lanes have left.

    In a host of several, the chain being laid goes back to ``nic``, from one of the GPUs ``ends``.
    """

    speed: float
    paths: tuple[str, ...]
    left: dict[str, float]
    tries: int = _MOST_TRIES
    nic: str = ""
    ends: frozenset[str] = frozenset()


def rings_of_host(machine: Machine, gpus: tuple[Gpu, ...]) -> tuple[tuple[Ring, ...], float]:
    """Channels over these GPUs of one host and their speed."""
    names = tuple(gpu.name for gpu in gpus)
    if len(names) == 1:
        return (names,), tables.SPEEDS[0]
    search = Search(machine, names)
    speeds = speeds_to_try(gpus, search.fastest, tables.SPEEDS, tables.SPEEDS_HOPPER)
    passes = [NEAR_TO_FAR[: far + 1] for far in range(len(NEAR_TO_FAR))]
    return most_bandwidth(gpus, (names,), speeds, passes, search.rings)


def speeds_to_try(
    gpus: tuple[Gpu, ...], fastest: float, plain: tuple[float, ...], hopper: tuple[float, ...]
) -> list[float]:
    """Those of NCCL's list for these GPUs that a path can have."""
    new = all(gpu.profile.capability >= (9, 0) for gpu in gpus)
    return [speed for speed in (hopper if new else plain) if speed <= fastest]


def most_bandwidth(
    gpus: tuple[Gpu, ...],
    plain: tuple[Channel, ...],
    speeds: list[float],
    passes: Sequence[Kinds],
    lay: Callable[[float, Kinds], tuple[Channel, ...]],
) -> tuple[tuple[Channel, ...], float]:
    """The channels with most bandwidth together that ``lay`` finds, and their speed; ``plain`` where it finds none.

    ``passes`` are the kinds of path allowed, from near to far.
    """
    best, best_speed = plain, _PLAIN_ORDER_SPEED
    reach = len(passes)
    for speed in speeds:
        if best is not plain and speed < 0.49 * best_speed:
            break
        for place, kinds in enumerate(passes[:reach]):
            found = lay(speed, kinds)
            if found:
                reach = place + 1  # with a solution found, NCCL never looks at farther paths again
                if len(found) * speed > len(best) * best_speed:
                    best, best_speed = found, speed
                break
    return _split(gpus, best, best_speed)


def _split(gpus: tuple[Gpu, ...], found: tuple[Channel, ...], speed: float) -> tuple[tuple[Channel, ...], float]:
    """Fast channels cut into two, as many as NCCL has, and the speed they then have (ncclTopoDupChannels)."""
    enough = all(gpu.profile.capability > (8, 0) for gpu in gpus) and len(found) > tables.ENOUGH_CHANNELS
    if speed < (tables.SPLIT_ENOUGH_FROM if enough else tables.SPLIT_FROM):
        return found[:MOST_FOUND], speed
    doubled = tuple(channel for channel in found for _ in range(2))[:MOST_FOUND]
    return doubled, speed * len(found) / len(doubled)


class Search:
    """Lays rings over the bandwidth that NCCL believes the lanes have.

    ``nearness`` sorts near before far: more bandwidth, then fewer links.
    """

    def __init__(self, machine: Machine, names: Ring) -> None:
        self.names = names
        pairs = ((a, b) for a in names for b in names if a != b)
        self.routes = {(a, b): machine.transfer_route(a, b, len(names)) for a, b in pairs}
        self.vendor = machine.host.cpu_vendor
        self.capacity: dict[str, float] = {}
        for route in self.routes.values():
            self.know(route)
        self.nearness = {pair: (-believed_gb_s(route), len(route.hops)) for pair, route in self.routes.items()}

    def know(self, route: Route) -> None:
        """Take a route's lanes among those that rings share."""
        for hop in route.hops:
            self.capacity[hop.lane] = hop.link.nccl_gb_s

    @property
    def fastest(self) -> float:
        """What the best path believes to have."""
        return max(map(believed_gb_s, self.routes.values()))

    def rings(self, speed: float, paths: tuple[PathClass, ...]) -> tuple[Ring, ...]:
        """As many rings as fit at this speed over these kinds of path."""
        attempt = Attempt(speed, paths, dict(self.capacity))
        found: list[Ring] = []
        # "Try having different channels (except when going through AMD CPUs)" (search.cc)
        one_order = self.vendor == "amd" and paths[-1] == "SYS"
        while len(found) < MOST_FOUND:
            ring = found[-1] if found and self._fits(found[-1], attempt) else None
            if ring is None and not (found and one_order):
                ring = self.extend((self.names[0],), attempt)
            if ring is None:
                break
            for a, b in zip(ring, (*ring[1:], ring[0]), strict=True):
                self.take(self.routes[a, b], attempt)
            found.append(ring)
        return tuple(found)

    def extend(self, path: Ring, attempt: Attempt) -> Ring | None:
        """The first ring that continues ``path``: nearest neighbours first, stepping back where none fits."""
        attempt.tries -= 1
        if attempt.tries < 0:
            return None
        if len(path) == len(self.names):
            return path if self.closes(path, attempt) else None
        for name in self.next(path, attempt):
            route = self.routes[path[-1], name]
            if route.path in attempt.paths and self.room(route, attempt):
                self.take(route, attempt)
                ring = self.extend((*path, name), attempt)
                self.take(route, attempt, -1)
                if ring:
                    return ring
        return None

    def closes(self, path: Ring, attempt: Attempt) -> bool:
        """Whether the last GPU can go back to the first."""
        route = self.routes[path[-1], path[0]]
        return route.path in attempt.paths and self.room(route, attempt)

    def next(self, path: Ring, attempt: Attempt) -> list[str]:
        """The GPUs not yet in the path, the nearest first."""
        return sorted(self.around(path), key=lambda name: self.nearness[path[-1], name])

    def around(self, path: Ring) -> list[str]:
        """The GPUs not yet in the path, from the last one's place on."""
        start = self.names.index(path[-1])
        return [name for name in (*self.names[start + 1 :], *self.names[:start]) if name not in path]

    def _fits(self, ring: Ring, attempt: Attempt) -> bool:
        trial = Attempt(attempt.speed, attempt.paths, dict(attempt.left))
        for a, b in zip(ring, (*ring[1:], ring[0]), strict=True):
            if not self.room(self.routes[a, b], trial):
                return False
            self.take(self.routes[a, b], trial)
        return True

    def _demand(self, route: Route, speed: float) -> Iterator[tuple[str, float]]:
        overhead = tables.INTEL_P2P_OVERHEAD if self.vendor == "intel" and route.path == "PHB" else 1.0
        for hop in route.hops:
            yield hop.lane, speed * (overhead if hop.link.kind == "pcie" else 1.0)

    def room(self, route: Route, attempt: Attempt) -> bool:
        """Whether each lane of the route has the speed left."""
        return all(attempt.left[lane] >= need - 1e-9 for lane, need in self._demand(route, attempt.speed))

    def take(self, route: Route, attempt: Attempt, times: int = 1) -> None:
        """Take the speed off the route's lanes; -1 gives it back."""
        for lane, need in self._demand(route, attempt.speed):
            attempt.left[lane] = round(attempt.left[lane] - times * need, 6)


def believed_gb_s(route: Route) -> float:
    """The bandwidth of a route as NCCL believes it."""
    return min(hop.link.nccl_gb_s for hop in route.hops)
