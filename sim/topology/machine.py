"""A machine as a graph: GPUs, CPUs, switches and the links between them, with the routes that bytes take.

Rates are GB/s, which is bytes a nanosecond.  What can be full is a *lane*: one direction of a full-duplex link
(``pcie:gpu0>cpu0``) or a half-duplex link as a whole (``pcie:gpu0-cpu0``); flows load lanes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import networkx as nx

from sim.errors import UserError
from sim.topology.device import DeviceProfile
from sim.topology.names import natural
from sim.topology.schema import Collectives, HostCosts, LinkKind, NcclSettings, NodeKind

PathClass = Literal["LOC", "NVL", "NVS", "PIX", "PXB", "PHB", "SYS", "NET"]


@dataclass(frozen=True)
class Gpu:
    """One device: its place in the machine's order, its profile and the host it is in."""

    index: int
    name: str
    profile: DeviceProfile
    host: int


@dataclass(frozen=True)
class Link:
    """One link between ``a`` and ``b``; ``bandwidth_gb_s`` is one direction's, or both together where half-duplex."""

    cls: str
    kind: LinkKind
    a: str
    b: str
    bandwidth_gb_s: float
    nccl_gb_s: float
    latency_us: float
    duplex: Literal["full", "half"]
    source: str
    p2p_both_ways: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.cls}:{self.a}-{self.b}"

    def other(self, node: str) -> str:
        """The end that is not ``node``."""
        return self.b if node == self.a else self.a

    def lane(self, start: str) -> str:
        """Name of the lane that leaves ``start``."""
        return self.name if self.duplex == "half" else f"{self.cls}:{start}>{self.other(start)}"


@dataclass(frozen=True)
class Hop:
    """A link, crossed from ``start``; ``staged`` where a GPU's kernel writes to host memory or reads from it so."""

    link: Link
    start: str
    staged: bool = False

    @cached_property
    def lane(self) -> str:
        return self.link.lane(self.start)

    @cached_property
    def end(self) -> str:
        return self.link.other(self.start)


@dataclass(frozen=True)
class Route:
    """The hops from one node to another, and what kind of path that is in ``nvidia-smi topo -m`` words."""

    hops: tuple[Hop, ...]
    path: PathClass

    @property
    def via_host(self) -> bool:
        """Whether data are staged in host memory on the way."""
        return any(hop.staged for hop in self.hops)

    @property
    def links(self) -> tuple[Link, ...]:
        return tuple(hop.link for hop in self.hops)

    @property
    def lanes(self) -> tuple[str, ...]:
        return tuple(hop.lane for hop in self.hops)

    @property
    def bandwidth_gb_s(self) -> float:
        """The slowest link's rate, each lane shared by as many crossings as this route makes of it."""
        lanes = self.lanes
        rates = [hop.link.bandwidth_gb_s / lanes.count(hop.lane) for hop in self.hops]
        return min(rates, default=float("inf"))

    @property
    def latency_us(self) -> float:
        return sum(hop.link.latency_us for hop in self.hops)


@dataclass(frozen=True)
class Change:
    """One value replaced by an override."""

    path: str
    before: object
    after: object


@dataclass(frozen=True, eq=False)
class Machine:
    """GPUs in order, other nodes by name, links, and what the host and its libraries are set to.

    ``baseline`` is the machine as its file says, where overrides changed this one.
    """

    name: str
    description: str
    source: str
    hypothetical: bool
    assumed: tuple[str, ...]
    hosts: int
    gpus: tuple[Gpu, ...]
    nodes: dict[str, NodeKind]
    links: tuple[Link, ...]
    host: HostCosts
    nccl: NcclSettings
    collectives: Collectives
    changes: tuple[Change, ...] = ()
    baseline: Machine | None = None
    _routes: dict[tuple[str, str], Route] = field(default_factory=dict, repr=False)
    _ways: dict[tuple[str, frozenset[LinkKind]], dict[str, tuple[Hop, ...]]] = field(default_factory=dict, repr=False)
    _parts: dict[tuple[str, str], Route] = field(default_factory=dict, repr=False)

    @cached_property
    def graph(self) -> nx.MultiGraph[str]:
        """Nodes with ``kind``; edges keyed by link name with ``link``."""
        graph: nx.MultiGraph[str] = nx.MultiGraph()
        for gpu in self.gpus:
            graph.add_node(gpu.name, kind="gpu")
        for name, kind in self.nodes.items():
            graph.add_node(name, kind=kind)
        for link in self.links:
            graph.add_edge(link.a, link.b, key=link.name, link=link)
        return graph

    @cached_property
    def capacities(self) -> dict[str, float]:
        """Bytes a nanosecond of every lane, by name."""
        return {lane: link.bandwidth_gb_s for link in self.links for lane in (link.lane(link.a), link.lane(link.b))}

    @cached_property
    def _gpu_names(self) -> frozenset[str]:
        return frozenset(gpu.name for gpu in self.gpus)

    def kind(self, node: str) -> str:
        """``gpu`` or the node's kind."""
        return "gpu" if node in self._gpu_names else self.nodes[node]

    # Routes -----------------------------------------------------------------------------------------------------

    def route(self, a: str, b: str) -> Route:
        """The path bytes take from node ``a`` to ``b``: NVLink where it joins them, else PCIe, else the network.

        No path leads through another GPU (UserError where only such a path exists).  Of equal paths the one with most
        bandwidth wins, then the first by name.
        """
        if (a, b) not in self._routes:
            self._routes[a, b] = self._find_route(a, b)
        return self._routes[a, b]

    def _find_route(self, a: str, b: str) -> Route:
        if a == b:
            return Route((), "LOC")
        hops = next(filter(None, (self._shortest(a, b, kinds) for kinds in _NEAR_TO_FAR)), ())
        if not hops:
            raise UserError(
                f"{self.name}: {a} and {b} are joined only through other devices; give them a switch or CPU"
            )
        return Route(hops, self._path_class(a, hops))

    def _shortest(self, a: str, b: str, kinds: frozenset[LinkKind]) -> tuple[Hop, ...]:
        """Fewest links of these kinds, then greatest bandwidth, then names.  () where none leads."""
        if (a, kinds) not in self._ways:
            self._ways[a, kinds] = self._ways_from(a, kinds)
        return self._ways[a, kinds].get(b, ())

    def _ways_from(self, a: str, kinds: frozenset[LinkKind]) -> dict[str, tuple[Hop, ...]]:
        """The way to every node that these kinds of link lead to.

        Where several are equally good, NICs take those over the network in turn, as switches spread flows over spines;
        elsewhere the first by name is taken.
        """
        turn = self._turns.get(a, 0) if kinds == _NETWORK else 0
        reached: dict[str, tuple[float, tuple[Hop, ...]]] = {a: (float("inf"), ())}
        frontier = [a]
        while frontier:
            found: dict[str, list[tuple[float, Hop]]] = {}
            for node in frontier:
                rate = reached[node][0]
                for hop in self._leaving(node, kinds):
                    if hop.end in reached:
                        continue
                    best = min(rate, hop.link.bandwidth_gb_s)
                    if hop.end not in found or best > found[hop.end][0][0]:
                        found[hop.end] = [(best, hop)]
                    elif best == found[hop.end][0][0]:
                        found[hop.end].append((best, hop))
            for node, ways in found.items():
                best, hop = ways[turn % len(ways)]
                reached[node] = (best, (*reached[hop.start][1], hop))
            frontier = sorted((node for node in found if node not in self._gpu_names), key=natural)
        return {node: hops for node, (_, hops) in reached.items()}

    @cached_property
    def _neighbours(self) -> dict[str, tuple[Hop, ...]]:
        """The hops from a node, by the other end's name, the strongest first between two nodes."""
        around: dict[str, list[Link]] = {node: [] for node in self.graph}
        for link in self.links:
            around[link.a].append(link)
            around[link.b].append(link)
        return {
            node: tuple(
                Hop(link, node)
                for link in sorted(links, key=lambda k: (natural(k.other(node)), -k.bandwidth_gb_s, k.cls))
            )
            for node, links in around.items()
        }

    def _leaving(self, node: str, kinds: frozenset[LinkKind]) -> Iterable[Hop]:
        return (hop for hop in self._neighbours[node] if hop.link.kind in kinds)

    def _path_class(self, start: str, hops: tuple[Hop, ...]) -> PathClass:
        kinds = [hop.link.kind for hop in hops]
        if "network" in kinds:
            return "NET"
        inner = [self.kind(hop.end) for hop in hops[:-1]]
        if kinds[0] == "nvlink":
            return "NVS" if "nvswitch" in inner else "NVL"
        cpus = sum(kind == "cpu" for kind in (self.kind(start), *inner, self.kind(hops[-1].end)))
        if cpus > 1:
            return "SYS"
        if cpus == 1:
            return "PHB"
        return "PIX" if inner.count("pcie-switch") <= 1 else "PXB"

    # Host memory ------------------------------------------------------------------------------------------------

    @cached_property
    def _home(self) -> dict[str, str]:
        return {gpu.name: self._nearest_host_node(gpu.name) for gpu in self.gpus}

    def _nearest_host_node(self, gpu: str) -> str:
        """The memory (or, where the file names none, the CPU) that is fewest links away; by name where equal."""
        for kind in ("memory", "cpu"):
            for nodes in self._around(gpu):
                homes = [node for node in nodes if self.kind(node) == kind]
                if homes:
                    return homes[0]
        return gpu

    def _around(self, gpu: str) -> Iterator[list[str]]:
        """The host's other nodes as the GPU reaches them over PCIe and sockets: one link away, two, and so on."""
        reached = {gpu}
        nodes = [gpu]
        while nodes:
            step = {
                hop.end for node in nodes for hop in self._leaving(node, _IN_A_HOST) if hop.end not in self._gpu_names
            }
            nodes = sorted(step - reached, key=natural)
            reached.update(nodes)
            yield nodes

    def host_memory(self, gpu: str) -> str:
        """The node that holds host memory for this GPU: its socket's memory, or the CPU; itself where it has none."""
        return self._home[gpu]

    def host_to_device(self, gpu: str) -> Route:
        """The way of a host-to-device copy."""
        return self.route(self.host_memory(gpu), gpu)

    def device_to_host(self, gpu: str) -> Route:
        """The way of a device-to-host copy."""
        return self.route(gpu, self.host_memory(gpu))

    def through_host(self, a: str, b: str) -> Route:
        """From GPU to GPU by way of the sender's host memory: written there, read back from there."""
        memory = self.host_memory(a)
        return Route((*_staged(self.route(a, memory)), *_staged(self.route(memory, b))), self.route(a, b).path)

    # Changes ----------------------------------------------------------------------------------------------------

    @cached_property
    def _latency_before(self) -> dict[str, float]:
        return {link.name: link.latency_us for link in self.baseline.links} if self.baseline else {}

    def added_latency_us(self, route: Route) -> float:
        """What overrides added to the latency of the route's links (below 0: took away); 0 for links that are new."""
        if self.baseline is None:
            return 0.0
        before = self._latency_before
        return sum(link.latency_us - before.get(link.name, link.latency_us) for link in route.links)

    # Peers ------------------------------------------------------------------------------------------------------

    def gpu(self, name: str) -> Gpu:
        """The GPU of that name."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Gpu]:
        return {gpu.name: gpu for gpu in self.gpus}

    def p2p(self, a: str, b: str, ranks: int = 2) -> bool:
        """Whether GPU ``a`` can reach ``b``'s memory without the host: NVLink, or PCIe where cards and driver allow.

        NCCL's rule for a communicator with so many ranks in this host (NVIDIA/nccl src/graph/paths.cc,
        ncclTopoCheckP2p, defaults): up to 2.22 any PCIe path inside a host, but none through an Intel or Arm CPU; from
        2.23 on none through any CPU, but for two GPUs on an AMD host ("many interleaved data flows" slow it down).
        NCCL_P2P_DISABLE and NCCL_P2P_LEVEL rule over it.
        """
        path = self.route(a, b).path
        if path in ("LOC", "NET"):
            return path == "LOC"
        level = "LOC" if self.nccl.NCCL_P2P_DISABLE else self.nccl.NCCL_P2P_LEVEL or self._p2p_level(ranks)
        if path in ("NVL", "NVS"):
            return level != "LOC"
        cards = self.gpu(a).profile.pcie_p2p and self.gpu(b).profile.pcie_p2p
        return cards and _P2P_ORDER.index(path) <= _P2P_ORDER.index(level)

    def _p2p_level(self, ranks: int) -> PathClass:
        crowded = ranks > 2 and self.nccl.release >= _P2P_FOR_PAIRS_ONLY
        return "PXB" if crowded or self.host.cpu_vendor in ("arm", "intel") else "SYS"

    def transfer_route(self, a: str, b: str, ranks: int = 2) -> Route:
        """The way of a GPU-to-GPU transfer: direct, over the network, or through host memory where no P2P is.

        ``ranks``: how many GPUs of the host the communicator has.
        """
        parts = self.transfer_parts(a, b, ranks)
        return parts[0] if len(parts) == 1 else Route(tuple(hop for part in parts for hop in part.hops), "NET")

    def transfer_parts(self, a: str, b: str, ranks: int = 2) -> tuple[Route, ...]:
        """The transfer's route in parts that many transfers share: out to a NIC, over the network, in from a NIC."""
        if b not in self._beside[a]:
            return self._by_nics(a, b) or (self.route(a, b),)
        return (self.route(a, b) if self.p2p(a, b, ranks) else self.through_host(a, b),)

    @cached_property
    def _beside(self) -> dict[str, set[str]]:
        """Of each GPU: what it reaches without a network."""
        return {
            gpu.name: {*self._ways_from(gpu.name, _NVLINK), *self._ways_from(gpu.name, _IN_A_HOST)} for gpu in self.gpus
        }

    # NICs -------------------------------------------------------------------------------------------------------

    def nics(self, gpu: str) -> tuple[str, ...]:
        """The NICs of this GPU's host that are on a network, the nearest first, then by name."""
        return tuple(nic for nics in self._nics[gpu] for nic in nics)

    @cached_property
    def _nics(self) -> dict[str, list[list[str]]]:
        """Of each GPU: its host's NICs by distance."""
        return {
            gpu.name: [n for nodes in self._around(gpu.name) if (n := self._on_network(nodes))] for gpu in self.gpus
        }

    def _on_network(self, nodes: Iterable[str]) -> list[str]:
        return [n for n in nodes if self.kind(n) == "nic" and any(self._leaving(n, _NETWORK))]

    @cached_property
    def _turns(self) -> dict[str, int]:
        """Every NIC's place among all, which also is its turn among ways that are equally good."""
        return {nic: place for place, nic in enumerate(node for node, kind in self.nodes.items() if kind == "nic")}

    def own_nic(self, gpu: str) -> str | None:
        """The nearest NIC; GPUs that have the same ones equally near take turns (ncclTopoGetLocalNet)."""
        return self._own_nics.get(gpu)

    @cached_property
    def _own_nics(self) -> dict[str, str]:
        served: Counter[tuple[str, ...]] = Counter()
        own: dict[str, str] = {}
        for gpu, around in self._nics.items():
            if around:
                nearest = tuple(around[0])
                own[gpu] = nearest[served[nearest] % len(nearest)]
                served[nearest] += 1
        return own

    def uplink(self, nic: str) -> Hop:
        """The way from a NIC onto its network: the strongest link where it has several."""
        return max(self._leaving(nic, _NETWORK), key=lambda hop: hop.link.bandwidth_gb_s)

    def network_route(self, a: str, b: str) -> Route | None:
        """From one NIC to another over network links and switches alone; None where they are not so joined."""
        hops = self._shortest(a, b, _NETWORK)
        return self._part(a, b, lambda: hops) if hops else None

    def to_nic(self, gpu: str, nic: str) -> Route:
        """From a GPU to a NIC: straight where the NIC reads the GPU's memory, else staged in host memory."""
        return self._part(gpu, nic, lambda: self._to_nic(gpu, nic))

    def _to_nic(self, gpu: str, nic: str) -> tuple[Hop, ...]:
        if self.gpudirect(gpu, nic):
            return self.route(gpu, nic).hops
        memory = self.host_memory(gpu)
        return (*_staged(self.route(gpu, memory)), *self.route(memory, nic).hops)

    def from_nic(self, nic: str, gpu: str) -> Route:
        """The same the other way."""
        return self._part(nic, gpu, lambda: self._from_nic(nic, gpu))

    def _from_nic(self, nic: str, gpu: str) -> tuple[Hop, ...]:
        if self.gpudirect(gpu, nic):
            return self.route(nic, gpu).hops
        memory = self.host_memory(gpu)
        return (*self.route(nic, memory).hops, *_staged(self.route(memory, gpu)))

    def gpudirect(self, gpu: str, nic: str) -> bool:
        """Whether a NIC reads and writes the GPU's memory itself (GPUDirect RDMA).

        Only cards that let other devices reach their memory do, and NCCL lets only NICs no farther than PCIe switches
        (NVIDIA/nccl src/graph/paths.cc, ncclTopoCheckGdr: PXB); NCCL_NET_GDR_LEVEL rules over it.
        """
        level = self.nccl.NCCL_NET_GDR_LEVEL or "PXB"
        near = _P2P_ORDER.index(self.route(gpu, nic).path) <= _P2P_ORDER.index(level)
        return near and self.gpu(gpu).profile.pcie_p2p

    def _part(self, start: str, end: str, hops: Callable[[], tuple[Hop, ...]]) -> Route:
        """A part of routes over the network, one and the same for all of them."""
        if (start, end) not in self._parts:
            self._parts[start, end] = Route(hops(), "NET")
        return self._parts[start, end]

    def _by_nics(self, a: str, b: str) -> tuple[Route, ...] | None:
        """Out by the sender's own NIC, in by the receiver's.

        Where these are on networks that never meet: over NVLink to a neighbour whose NIC is on the receiver's (PXN).
        """
        into = self.own_nic(b)
        for by in (a, *self._pxn_neighbours(a)) if into else ():
            out = self.own_nic(by)
            between = self.network_route(out, into) if out and into else None
            if out and into and between:
                handed = () if by == a else (self.route(a, by),)
                return (*handed, self.to_nic(by, out), between, self.from_nic(into, b))
        return None

    def _pxn_neighbours(self, gpu: str) -> tuple[str, ...]:
        return self._over_nvlink[gpu] if self.nccl.release >= PXN_FROM else ()

    @cached_property
    def _over_nvlink(self) -> dict[str, tuple[str, ...]]:
        """Of each GPU: those of its host that NVLink joins it to."""
        by_host: dict[int, list[str]] = {}
        for gpu in self.gpus:
            by_host.setdefault(gpu.host, []).append(gpu.name)
        return {
            gpu.name: tuple(k for k in by_host[gpu.host] if k != gpu.name and self._shortest(gpu.name, k, _NVLINK))
            for gpu in self.gpus
        }

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a reader of numbers from this machine must know: what is assumed, hypothetical or impossible to buy."""
        told = ["this machine is hypothetical: nobody sells it"] if self.hypothetical else []
        told += [f"assumed: {text}" for text in self.assumed]
        if not self.hypothetical:
            told += [
                f"{gpu.name} ({gpu.profile.full_name}) has no NVLink ports, yet the file gives it NVLink"
                for gpu in self.gpus
                if gpu.profile.nvlink is None and any(self._leaving(gpu.name, _NVLINK))
            ]
        return tuple(told)


# "Set P2P level to PXB on AMD CPUs when using more than 2 GPUs per node" (release 2.23)
_P2P_FOR_PAIRS_ONLY = (2, 23)
# A GPU far from a NIC hands its data to one near it (NCCL_PXN_DISABLE, release notes of 2.12)
PXN_FROM = (2, 12)
_NVLINK: frozenset[LinkKind] = frozenset({"nvlink"})
_NETWORK: frozenset[LinkKind] = frozenset({"network"})
_IN_A_HOST: frozenset[LinkKind] = frozenset({"pcie", "smp", "memory"})
_NEAR_TO_FAR = (_NVLINK, _IN_A_HOST, _IN_A_HOST | _NETWORK)
_P2P_ORDER = ("LOC", "NVL", "PIX", "PXB", "PHB", "SYS")


def _staged(route: Route) -> tuple[Hop, ...]:
    """The route's hops as a GPU's kernel takes them to or from host memory."""
    return tuple(replace(hop, staged=True) for hop in route.hops)
