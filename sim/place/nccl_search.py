"""The rings that NCCL would find on a machine, and what they load each link with.

After the search in NVIDIA/nccl src/graph/search.cc: speeds a channel are tried from fast to slow, path kinds from
near to far; at each, rings are laid over the links' remaining bandwidth, the nearest neighbour first, a found ring
again as long as it fits.  The combination with most channels x speed wins.  Several hosts: each host's ring is cut
open and joined to the next over its NIC.  Left out: crossNic, PXN, the search's time limit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from sim.place import nccl_tables as tables
from sim.place.nccl_tables import Hardware
from sim.topology.machine import Gpu, Hop, Machine, PathClass, Route

Ring = tuple[str, ...]

_NEAR_TO_FAR: tuple[PathClass, ...] = ("NVL", "NVS", "PIX", "PXB", "PHB", "SYS")
_MOST_TRIES = 20_000

# What a PCIe link carries a direction when data are staged in host memory instead of going straight to the peer:
# p2pBandwidthLatencyTest with P2P disabled against enabled, four RTX 6000 Ada on two AMD EPYC 9374F (public log of a
# host named coyote2): 22.2 of 26.3 GB/s one way, 31.5 of 52.1 GB/s with both ways busy.
HOST_MEMORY_SHARE_ONE_WAY = 0.845
HOST_MEMORY_SHARE_BOTH_WAYS = 0.605


@dataclass(frozen=True)
class Rings:
    """Channels found: their rings in order (a ring may stand several times) and NCCL's speed for each.

    ``bound`` is the lane that bounds them, ``bus_gb_s`` the bus bandwidth that it allows; ``one_way_gb_s`` what it
    would be if at every moment data went over each link one way only.
    """

    orders: tuple[Ring, ...]
    speed: float
    hosts: int
    hops: tuple[Route, ...]
    bound: str
    bus_gb_s: float
    one_way_gb_s: float

    @property
    def channels(self) -> int:
        """Channels that run: NCCL doubles what its search found (src/graph/connect.cc)."""
        return min(2 * len(self.orders), tables.MOST_CHANNELS)

    @property
    def believed_gb_s(self) -> float:
        """Bus bandwidth that NCCL expects."""
        return len(self.orders) * self.speed

    @cached_property
    def hardware(self) -> Hardware:
        """NVLink only where every hop inside a host is NVLink; the row of NCCL's latency table."""
        return "nvlink" if all(hop.path in ("NVL", "NVS") for hop in self.hops if hop.path != "NET") else "pcie"

    @cached_property
    def crossings(self) -> dict[str, int]:
        """How often the rings cross each lane, in name order."""
        return dict(sorted(Counter(lane for hop in self.hops for lane in hop.lanes).items()))

    @cached_property
    def chain_crossings(self) -> dict[str, int]:
        """The same for the rings cut open before they close."""
        return dict(sorted(Counter(hop.lane for hop in self._chain()).items()))

    @cached_property
    def tree_crossings(self) -> dict[str, int]:
        """The same for the cut rings, there and back."""
        back = Counter(hop.link.lane(hop.end) for hop in self._chain())
        return dict(sorted((back + Counter(self.chain_crossings)).items()))

    @cached_property
    def chain_hops(self) -> tuple[Route, ...]:
        """The hops of the rings cut open before they close."""
        ranks = len(self.orders[0])
        return tuple(route for place, route in enumerate(self.hops) if place % ranks < ranks - 1)

    def _chain(self) -> Iterator[Hop]:
        return (hop for route in self.chain_hops for hop in route.hops)

    @cached_property
    def paths(self) -> dict[PathClass, int]:
        """How many hops are of each kind of path."""
        return dict(Counter(hop.path for hop in self.hops))


def bus_bandwidth(machine: Machine, orders: tuple[Ring, ...], hops: tuple[Route, ...]) -> tuple[str, float, float]:
    """The lane that bounds the rings, the bus bandwidth that it allows, and that of one way at a time, GB/s."""
    rates = machine.capacities
    moves = [(hop, 1.0) for hop in hops]
    demand, one_way = link_demand(moves), link_demand(moves, both_ways=False)
    rate, lane = min((rates[lane] * len(orders) / crossings, lane) for lane, crossings in demand.items())
    return lane, rate, min(rates[lane] * len(orders) / crossings for lane, crossings in one_way.items())


def link_demand(moves: Iterable[tuple[Route, float]], *, both_ways: bool = True) -> dict[str, float]:
    """What moves ask of each lane: their amounts, and as much more as going through a CPU slows the link.

    ``both_ways``: all go at the same time.
    """
    crossings = [(route, crossing, amount) for route, amount in moves for crossing in route.hops]
    used = {(route.via_host, crossing.lane) for route, crossing, _ in crossings}
    demand: dict[str, float] = {}
    for route, crossing, amount in crossings:
        both = both_ways and (route.via_host, crossing.link.lane(crossing.end)) in used
        demand[crossing.lane] = demand.get(crossing.lane, 0.0) + amount / _share(route, crossing, both=both)
    return demand


def _share(route: Route, crossing: Hop, *, both: bool) -> float:
    """What a link keeps of its bandwidth where it carries data between GPUs through a CPU."""
    if crossing.link.kind != "pcie":
        return 1.0
    if route.via_host:
        return HOST_MEMORY_SHARE_BOTH_WAYS if both else HOST_MEMORY_SHARE_ONE_WAY
    return crossing.link.p2p_both_ways if both and route.path in ("PHB", "SYS") else 1.0


def most_on_a_host(gpus: Iterable[Gpu]) -> int:
    """How many of these GPUs the host with most of them has."""
    return max(Counter(gpu.host for gpu in gpus).values())


def find_rings(machine: Machine, gpus: tuple[Gpu, ...]) -> Rings:
    """The rings over these GPUs, at least two."""
    by_host = [tuple(group) for _, group in groupby(sorted(gpus, key=lambda g: g.index), key=lambda g: g.host)]
    found = [_host_rings(machine, host) for host in by_host]
    channels = min(len(orders) for orders, _ in found)
    speed = min(speed for _, speed in found)
    orders = tuple(tuple(name for rings, _ in found for name in rings[c]) for c in range(channels))
    hops = tuple(hop for order in orders for hop in _hops(machine, order, most_on_a_host(gpus)))
    if len(by_host) > 1:
        speed = min(speed, _network_speed(hops, channels))
    return Rings(orders, speed, len(by_host), hops, *bus_bandwidth(machine, orders, hops))


def _hops(machine: Machine, order: Ring, ranks: int) -> Iterator[Route]:
    for a, b in zip(order, (*order[1:], order[0]), strict=True):
        yield machine.transfer_route(a, b, ranks)


def _network_speed(hops: tuple[Route, ...], channels: int) -> float:
    """NCCL's speed a channel where the channels share the network's links."""
    crossings = Counter(lane for hop in hops for lane in hop.lanes)
    across = [crossing for hop in hops if hop.path == "NET" for crossing in hop.hops]
    rates = {crossing.lane: crossing.link.nccl_gb_s for crossing in across if crossing.link.kind == "network"}
    return min(rate / crossings[lane] for lane, rate in rates.items()) if rates else float(channels)


def _host_rings(machine: Machine, gpus: tuple[Gpu, ...]) -> tuple[tuple[Ring, ...], float]:
    """Channels in one host and their speed."""
    names = tuple(gpu.name for gpu in gpus)
    if len(names) == 1:
        return (names,), tables.SPEEDS[0]
    hopper = all(gpu.profile.capability >= (9, 0) for gpu in gpus)
    search = _Search(machine, names)
    best: tuple[tuple[Ring, ...], float] = ((names,), 0.1)  # NCCL falls back to the plain order too
    reach = len(_NEAR_TO_FAR)
    for speed in (s for s in (tables.SPEEDS_HOPPER if hopper else tables.SPEEDS) if s <= search.fastest):
        if best[1] > 0.1 and speed < 0.49 * best[1]:
            break
        for far in range(reach):
            rings = search.rings(speed, _NEAR_TO_FAR[: far + 1])
            if rings:
                reach = far + 1  # with a solution found, NCCL never looks at farther paths again
                if len(rings) * speed > len(best[0]) * best[1]:
                    best = (rings, speed)
                break
    orders, speed = best
    if speed >= tables.SPLIT_FROM:
        doubled = tuple(ring for ring in orders for _ in range(2))[: tables.MOST_CHANNELS // 2]
        return doubled, speed * len(orders) / len(doubled)
    return orders[: tables.MOST_CHANNELS // 2], speed


class _Search:
    """Lays rings over the bandwidth that NCCL believes the lanes have."""

    def __init__(self, machine: Machine, names: Ring) -> None:
        self.names = names
        pairs = ((a, b) for a in names for b in names if a != b)
        self.routes = {(a, b): machine.transfer_route(a, b, len(names)) for a, b in pairs}
        self.vendor = machine.host.cpu_vendor
        self.capacity: dict[str, float] = {}
        for route in self.routes.values():
            for hop in route.hops:
                self.capacity[hop.lane] = hop.link.nccl_gb_s
        self.fastest = max(min(h.link.nccl_gb_s for h in route.hops) for route in self.routes.values())

    def rings(self, speed: float, paths: tuple[PathClass, ...]) -> tuple[Ring, ...]:
        """As many rings as fit at this speed over these kinds of path."""
        left = dict(self.capacity)
        found: list[Ring] = []
        tries = [_MOST_TRIES]
        # "Try having different channels (except when going through AMD CPUs)" (search.cc)
        one_order = self.vendor == "amd" and paths[-1] == "SYS"
        while len(found) < tables.MOST_CHANNELS // 2:
            ring = found[-1] if found and self._fits(found[-1], speed, left) else None
            if ring is None and not (found and one_order):
                ring = self._extend((self.names[0],), speed, paths, left, tries)
            if ring is None:
                break
            for a, b in zip(ring, (*ring[1:], ring[0]), strict=True):
                self._take(a, b, speed, left)
            found.append(ring)
        return tuple(found)

    def _extend(
        self, path: Ring, speed: float, paths: tuple[PathClass, ...], left: dict[str, float], tries: list[int]
    ) -> Ring | None:
        """The first ring that continues ``path``: nearest neighbours first, stepping back where none fits."""
        tries[0] -= 1
        if tries[0] < 0:
            return None
        last = path[-1]
        if len(path) == len(self.names):
            closes = self.routes[last, path[0]].path in paths and self._room(last, path[0], speed, left)
            return path if closes else None
        for name in self._next(last, path):
            if self.routes[last, name].path in paths and self._room(last, name, speed, left):
                self._take(last, name, speed, left)
                ring = self._extend((*path, name), speed, paths, left, tries)
                self._take(last, name, -speed, left)
                if ring:
                    return ring
        return None

    def _next(self, last: str, path: Ring) -> list[str]:
        start = self.names.index(last)
        around = [n for n in (*self.names[start + 1 :], *self.names[:start]) if n not in path]
        return sorted(around, key=lambda n: (-self._rate(last, n), len(self.routes[last, n].hops)))

    def _rate(self, a: str, b: str) -> float:
        return min(hop.link.nccl_gb_s for hop in self.routes[a, b].hops)

    def _fits(self, ring: Ring, speed: float, left: dict[str, float]) -> bool:
        trial = dict(left)
        for a, b in zip(ring, (*ring[1:], ring[0]), strict=True):
            if not self._room(a, b, speed, trial):
                return False
            self._take(a, b, speed, trial)
        return True

    def _demand(self, a: str, b: str, speed: float) -> Iterator[tuple[str, float]]:
        route = self.routes[a, b]
        overhead = tables.INTEL_P2P_OVERHEAD if self.vendor == "intel" and route.path == "PHB" else 1.0
        for hop in route.hops:
            yield hop.lane, speed * (overhead if hop.link.kind == "pcie" else 1.0)

    def _room(self, a: str, b: str, speed: float, left: dict[str, float]) -> bool:
        return all(left[lane] >= need - 1e-9 for lane, need in self._demand(a, b, speed))

    def _take(self, a: str, b: str, speed: float, left: dict[str, float]) -> None:
        for lane, need in self._demand(a, b, speed):
            left[lane] = round(left[lane] - need, 6)
