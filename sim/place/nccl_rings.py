"""The rings that NCCL lays over a machine, what they load each link with, and what bounds them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise

from sim.place import nccl_tables as tables
from sim.place.nccl_hosts import chains_of_host
from sim.place.nccl_search import Ring, rings_of_host
from sim.place.nccl_tables import Hardware
from sim.topology.machine import Gpu, Hop, Machine, PathClass, Route

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
    used = {(crossing.staged, crossing.lane) for _, crossing, _ in crossings}
    demand: dict[str, float] = {}
    for route, crossing, amount in crossings:
        both = both_ways and (crossing.staged, crossing.link.lane(crossing.end)) in used
        demand[crossing.lane] = demand.get(crossing.lane, 0.0) + amount / _share(route, crossing, both=both)
    return demand


def _share(route: Route, crossing: Hop, *, both: bool) -> float:
    """What a link keeps of its bandwidth where it carries data between GPUs through a CPU."""
    if crossing.link.kind != "pcie":
        return 1.0
    if crossing.staged:
        return HOST_MEMORY_SHARE_BOTH_WAYS if both else HOST_MEMORY_SHARE_ONE_WAY
    return crossing.link.p2p_both_ways if both and route.path in ("PHB", "SYS") else 1.0


def most_on_a_host(gpus: Iterable[Gpu]) -> int:
    """How many of these GPUs the host with most of them has."""
    return max(Counter(gpu.host for gpu in gpus).values())


def find_rings(machine: Machine, gpus: tuple[Gpu, ...]) -> Rings:
    """The rings over these GPUs, at least two: in one host, or from host to host by their NICs."""
    by_host = [tuple(group) for _, group in groupby(sorted(gpus, key=lambda g: g.index), key=lambda g: g.host)]
    ranks = most_on_a_host(gpus)
    if len(by_host) == 1:
        orders, speed = rings_of_host(machine, by_host[0])
        hops = tuple(route for order in orders for route in _hops(machine, order, ranks))
    else:
        orders, speed, hops = _across(machine, by_host, ranks)
    return Rings(orders, speed, len(by_host), hops, *bus_bandwidth(machine, orders, hops))


def _hops(machine: Machine, order: Ring, ranks: int) -> Iterator[Route]:
    for a, b in zip(order, (*order[1:], order[0]), strict=True):
        yield machine.transfer_route(a, b, ranks)


def _across(
    machine: Machine, by_host: list[tuple[Gpu, ...]], ranks: int
) -> tuple[tuple[Ring, ...], float, tuple[Route, ...]]:
    """Orders, speed and hops of rings over several hosts: channel by channel, one host's chain after the other's."""
    found = [chains_of_host(machine, host) for host in by_host]
    channels = min(len(chains) for chains, _ in found)
    orders: list[Ring] = []
    hops: list[Route] = []
    for channel in range(channels):
        chains = [chains[channel] for chains, _ in found]
        orders.append(tuple(name for chain in chains for name in chain.order))
        for chain, following in zip(chains, (*chains[1:], chains[0]), strict=True):
            hops += (machine.transfer_route(a, b, ranks) for a, b in pairwise(chain.order))
            hops.append(chain.to(machine, following))
    speed = min(*(speed for _, speed in found), _network_speed(hops))
    return tuple(orders), speed, tuple(hops)


def _network_speed(hops: Iterable[Route]) -> float:
    """NCCL's speed a channel where the channels share the network's links."""
    crossings = Counter(lane for hop in hops for lane in hop.lanes)
    across = [crossing for hop in hops if hop.path == "NET" for crossing in hop.hops]
    rates = {crossing.lane: crossing.link.nccl_gb_s for crossing in across if crossing.link.kind == "network"}
    return min((rate / crossings[lane] for lane, rate in rates.items()), default=float("inf"))
