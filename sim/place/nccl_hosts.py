"""The ways that NCCL would find through one host of several: in by a NIC, over all GPUs, out by the same NIC.

After the same search (NVIDIA/nccl src/graph/search.cc) with NICs on the machine: a channel begins at a NIC that has
bandwidth left, enters by the GPU nearest to it and ends at one that reaches it again, so that eight NICs make eight
rails.  A GPU far from the NIC hands its data to the NIC's own GPU over NVLink (PXN, from 2.12 on).  Left out: leaving
by another NIC than the one entered by (NCCL_CROSS_NIC), which NCCL does where it finds more bandwidth so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from sim.place import nccl_tables as tables
from sim.place.nccl_search import (
    MOST_FOUND,
    NEAR_TO_FAR,
    Attempt,
    Ring,
    Search,
    believed_gb_s,
    most_bandwidth,
    rings_of_host,
    speeds_to_try,
)
from sim.topology.machine import PXN_FROM, Gpu, Hop, Machine, Route

PXN = "PXN"
_NEAR = ("PIX", "PXB")
_NIC_NEAR_TO_FAR = (*_NEAR, PXN, "PHB", "SYS")


@dataclass(frozen=True)
class Chain:
    """A channel's part in one host: the GPUs in order, and the NIC before and after with the way out to it.

    ``nic`` is None in a host that has none, whose GPUs are joined to the next host's some other way.
    """

    order: Ring
    nic: str | None = None
    out: Route | None = None

    def to(self, machine: Machine, following: Chain) -> Route:
        """The way from this host's last GPU to the next host's first one."""
        first = following.order[0]
        if self.nic and self.out and following.nic:
            between = machine.network_route(self.nic, following.nic)
            if between:
                return Route((*self.out.hops, *between.hops, *machine.from_nic(following.nic, first).hops), "NET")
        return machine.transfer_route(self.order[-1], first)


@dataclass(frozen=True)
class _WayOut:
    """From a GPU to a NIC: the kind of path, or PXN; ``onto`` is the same and on onto the network."""

    kind: str
    route: Route
    onto: Route


def chains_of_host(machine: Machine, gpus: tuple[Gpu, ...]) -> tuple[tuple[Chain, ...], float]:
    """Channels through one host of several and their speed."""
    search = _NicSearch(machine, tuple(gpu.name for gpu in gpus))
    if not search.nics:
        orders, speed = rings_of_host(machine, gpus)
        return tuple(Chain(order) for order in orders), speed
    speeds = speeds_to_try(gpus, search.fastest, tables.SPEEDS_HOSTS, tables.SPEEDS_HOSTS_HOPPER)
    plain = (search.chain(search.names, search.nics[0]),)
    return most_bandwidth(gpus, plain, speeds, search.passes, search.chains)


class _NicSearch(Search):
    """Lays chains from a NIC back to it."""

    def __init__(self, machine: Machine, names: Ring) -> None:
        super().__init__(machine, names)
        self._machine = machine
        own = (nic for name in names if (nic := machine.own_nic(name)))
        self.nics = tuple(dict.fromkeys((*own, *(nic for name in names for nic in machine.nics(name)))))
        self._near = {(nic, name): self._from_nic(nic, name) for nic in self.nics for name in names}
        self._ways_in = {(nic, name): self._way_in(nic, name) for nic in self.nics for name in names}
        self._ways_out = {(name, nic): self._way_out(name, nic) for nic in self.nics for name in names}
        for route in (*self._ways_in.values(), *(way.onto for way in self._ways_out.values())):
            self.know(route)

    @property
    def fastest(self) -> float:
        """What the best path to a network believes to have."""
        return max(believed_gb_s(way.onto) for way in self._ways_out.values())

    @property
    def passes(self) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
        """Kinds of path between GPUs, and to a NIC, that are tried one after the other: those that this host has."""
        here = {route.path for route in self.routes.values()}
        there = {way.kind for way in self._ways_out.values()}
        paths = [path for path in NEAR_TO_FAR if path in here]
        ways = [way for way in _NIC_NEAR_TO_FAR if way in there]
        reaches = range(1, len(paths) + 1) if paths else (0,)
        return [(tuple(paths[:far]), tuple(ways[: out + 1])) for out in range(len(ways)) for far in reaches]

    def chain(self, order: Ring, nic: str) -> Chain:
        """The chain over these GPUs that begins and ends at the NIC."""
        return Chain(order, nic, self._ways_out[order[-1], nic].route)

    def chains(self, speed: float, kinds: tuple[tuple[str, ...], tuple[str, ...]]) -> tuple[Chain, ...]:
        """As many chains as fit at this speed, through the first NIC that has room each.

        ``kinds``: of path between GPUs, and to the NIC, as in ``passes``.
        """
        paths, ways = kinds
        attempt = Attempt(speed, paths, dict(self.capacity))
        found: list[Chain] = []
        while len(found) < MOST_FOUND:
            chain = next(self._found(attempt, ways), None)
            if chain is None:
                break
            for route in self._crossed(chain):
                self.take(route, attempt)
            found.append(chain)
        return tuple(found)

    def _found(self, attempt: Attempt, ways: tuple[str, ...]) -> Iterator[Chain]:
        """Chains that fit, by NIC and by the GPU to enter by."""
        for nic in self.nics:
            ends = frozenset(name for name in self.names if self._leaves(name, nic, attempt, ways))
            for entry in self._entries(nic, ways):
                into = self._ways_in[nic, entry]
                if not self.room(into, attempt) or not (ends - {entry} or self.names == (entry,)):
                    continue
                attempt.nic, attempt.ends = nic, ends
                self.take(into, attempt)
                order = self.extend((entry,), attempt)
                self.take(into, attempt, -1)
                if order:
                    yield self.chain(order, nic)

    def _entries(self, nic: str, ways: tuple[str, ...]) -> list[str]:
        """The GPUs that a NIC can hand data to, the nearest first: of those equally near, the one whose own it is."""
        able = [name for name in self.names if self._machine.route(nic, name).path in ways]
        return sorted(able, key=lambda name: (*self._near[nic, name], self._machine.own_nic(name) != nic))

    def _from_nic(self, nic: str, name: str) -> tuple[int, float, int]:
        """Sorts near before far."""
        route = self._machine.route(nic, name)
        return _NIC_NEAR_TO_FAR.index(route.path), -believed_gb_s(route), len(route.hops)

    def _leaves(self, name: str, nic: str, attempt: Attempt, ways: tuple[str, ...]) -> bool:
        way = self._ways_out[name, nic]
        return way.kind in ways and self.room(way.onto, attempt)

    def closes(self, path: Ring, attempt: Attempt) -> bool:
        """Whether the last GPU can go back to the NIC."""
        return path[-1] in attempt.ends and self.room(self._ways_out[path[-1], attempt.nic].onto, attempt)

    def next(self, path: Ring, attempt: Attempt) -> list[str]:
        """The GPUs not yet in the path: near the NIC before far from it, except where all are equally near the last
        one and the NIC's turn is yet to come; then the far ones first (ncclTopoSearchNextGpuSort)."""
        last = path[-1]
        around = sorted(self.around(path), key=lambda name: (self._near[attempt.nic, name], self.nearness[last, name]))
        alike = len({self.nearness[last, name] for name in around}) == 1
        return around[::-1] if alike and len(around) > 1 and len(path) < len(self.names) - 1 else around

    def _crossed(self, chain: Chain) -> Iterator[Route]:
        nic = chain.nic or ""
        yield self._ways_in[nic, chain.order[0]]
        yield from (self.routes[pair] for pair in pairwise(chain.order))
        yield self._ways_out[chain.order[-1], nic].onto

    def _way_in(self, nic: str, name: str) -> Route:
        up = self._machine.uplink(nic)
        return Route((Hop(up.link, up.end), *self._machine.from_nic(nic, name).hops), "NET")

    def _way_out(self, name: str, nic: str) -> _WayOut:
        """Straight to the NIC where it is near, else by a GPU that it is near to, else by way of the CPU."""
        machine = self._machine
        straight = machine.to_nic(name, nic)
        kind: str = machine.route(name, nic).path
        if kind not in _NEAR and machine.nccl.release >= PXN_FROM:
            by = next((peer for peer in self._entries(nic, _NEAR) if self._over_nvlink(name, peer)), None)
            if by:
                kind = PXN
                straight = Route((*self.routes[name, by].hops, *machine.to_nic(by, nic).hops), "NET")
        return _WayOut(kind, straight, Route((*straight.hops, machine.uplink(nic)), "NET"))

    def _over_nvlink(self, name: str, peer: str) -> bool:
        return name != peer and self.routes[name, peer].path in ("NVL", "NVS")
