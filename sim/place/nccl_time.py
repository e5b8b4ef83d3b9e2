"""What NCCL expects of each algorithm and protocol, which one it takes, and what that costs on the links.

Two clocks, kept apart.  *Expected* is NCCL's own tuning model; it alone decides which algorithm and protocol run.
*Cost* is what the choice then takes, from the machine's links and from how NCCL's kernels hand data on: every turn
of a rank moves one chunk, in slices that are handed over one by one.  docs/collectives.md derives it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil, log2

from sim.place import nccl_tables as tables
from sim.place.nccl_rings import Rings
from sim.place.nccl_tables import Algorithm, Protocol
from sim.topology.machine import Gpu, Machine, PathClass

# One exchange of a flag through an NVSwitch takes 1.2 us longer than over a direct NVLink: p2pBandwidthLatencyTest,
# 3.1 us on 8 x A100 behind NVSwitches against 1.9 us on V100s linked directly (ABCI, public benchmark report).
# LL waits for it at every hop, Simple at every slice: its fence lasts until the writes have arrived.
NVSWITCH_EXCHANGE_US = 1.2
# Kinds whose data go along the ring once and stop before it closes.
CHAINED = ("broadcast", "reduce")
# What is taken where NCCL_ALGO and NCCL_PROTO allow only what this machine cannot run.
FALLBACK: tuple[Algorithm, Protocol] = ("ring", "simple")
FALLBACK_NOTE = "nothing that NCCL_ALGO and NCCL_PROTO allow can run here: ring, simple is taken instead"


@dataclass(frozen=True)
class Ask:
    """A collective: kind, bytes of the whole tensor, GPUs in ring order of the machine, rings found for them."""

    machine: Machine
    kind: str
    nbytes: int
    gpus: tuple[Gpu, ...]
    rings: Rings

    @property
    def ranks(self) -> int:
        return len(self.gpus)

    @property
    def hops(self) -> float:
        """Times that 1/ranks of the tensor crosses each hop of the ring."""
        return {"all_reduce": 2 * (self.ranks - 1), "broadcast": self.ranks, "reduce": self.ranks}.get(
            self.kind, self.ranks - 1
        )

    @cached_property
    def added_us(self) -> float:
        """What a change of the links' latency adds to a hop, averaged over the ring.

        NCCL's hop latencies stand for the links as the machine's file has them: only a change of these can be told.
        """
        if self.machine.baseline is None:
            return 0.0
        hops = self.rings.hops
        return sum(self.machine.added_latency_us(hop) for hop in hops) / len(hops)

    @cached_property
    def near_nics(self) -> bool:
        """Whether every way to the network leads over PCIe switches alone, or from Hopper on by a neighbour (PXN)."""
        steps = [step for hop in self.rings.hops if hop.path == "NET" for step in hop.hops]
        by_cpu = any(self.machine.kind(step.end) == "cpu" for step in steps)
        return not by_cpu and (self.capability >= (9, 0) or all(step.link.kind != "nvlink" for step in steps))

    @cached_property
    def capabilities(self) -> frozenset[tuple[int, int]]:
        return frozenset(profile.capability for profile in {id(g.profile): g.profile for g in self.gpus}.values())

    @property
    def capability(self) -> tuple[int, int]:
        return min(self.capabilities)

    @property
    def generation(self) -> tables.Generation:
        return tables.generation(self.capability)


@dataclass(frozen=True)
class Cost:
    """Microseconds without transfer, and of transfer; the lane or part that bounds the transfer."""

    latency_us: float
    transfer_us: float
    bound: str

    @property
    def us(self) -> float:
        return self.latency_us + self.transfer_us


def choose(ask: Ask) -> tuple[Algorithm, Protocol]:
    """What NCCL runs: the least expected time of what is possible and allowed; ties go to the first in its order."""
    options = candidates(ask) or [FALLBACK]
    return min(options, key=lambda option: expected_us(ask, *option))


def candidates(ask: Ask) -> list[tuple[Algorithm, Protocol]]:
    """Algorithms and protocols that this machine, this kind and the settings allow."""
    settings = ask.machine.nccl
    found: list[tuple[Algorithm, Protocol]] = []
    for algorithm in tables.ALGORITHMS:
        # "Only disable algo for Allreduce since others only have one" (tuning.cc)
        if ask.kind == "all_reduce" and algorithm not in settings.algorithms:
            continue
        if algorithm != "ring" and not (_nvls(ask) if algorithm == "nvls" else ask.kind == "all_reduce"):
            continue
        for protocol in tables.PROTOCOLS:
            known = protocol in tables.BASE_US[algorithm] and protocol in settings.protocols
            if known and (protocol != "ll128" or _ll128(ask)):
                found.append((algorithm, protocol))
    return found


def _nvls(ask: Ask) -> bool:
    """NVLink SHARP: Hopper and later behind an NVSwitch, one host, all-reduce, three ranks or more."""
    behind = set(ask.rings.paths) == {"NVS"}
    return ask.kind == "all_reduce" and behind and ask.capability >= (9, 0) and ask.ranks > 2


def nvls_tree(ask: Ask) -> bool:
    """Whether NCCL may take NVLSTree, which is not modelled: NVLink SHARP in each of several hosts (from 2.18 on)."""
    behind = set(ask.rings.paths) == {"NVS", "NET"}
    able = ask.capability >= (9, 0) and ask.machine.nccl.release >= tables.NVLS_TREE_FROM
    return ask.kind == "all_reduce" and behind and able and not ask.machine.nccl.NCCL_ALGO


def _ll128(ask: Ask) -> bool:
    """By default where every hop in a host is NVLink and NICs are near, on the capabilities NCCL has tested.

    NCCL_PROTO can ask for it.
    """
    if ask.machine.nccl.NCCL_PROTO and not ask.machine.nccl.NCCL_PROTO.startswith("^"):
        return True
    alike = len(ask.capabilities) == 1
    near = ask.rings.hardware == "nvlink" and ask.near_nics
    return near and alike and ask.capability in tables.LL128_CAPABILITIES


# NCCL's expectation ---------------------------------------------------------------------------------------------


def expected_us(ask: Ask, algorithm: Algorithm, protocol: Protocol) -> float:
    """NCCL's own estimate (tuning.cc): latency + bytes / bandwidth."""
    bandwidth = _expected_bandwidth(ask, algorithm, protocol)
    latency = _expected_latency(ask, algorithm, protocol)
    if algorithm == "tree":
        bandwidth *= _correction(protocol, ask.nbytes)
    across = (algorithm, protocol, ask.kind) == ("ring", "simple", "all_reduce") and ask.rings.hosts > 1
    if across and ask.nbytes >= tables.RING_PLATEAU_BYTES * ask.rings.channels * ask.ranks:
        latency *= tables.RING_PLATEAU[ask.generation]
    return latency + ask.nbytes / bandwidth / 1e3


def _correction(protocol: Protocol, nbytes: int) -> float:
    place = int(log2(max(nbytes >> 6, 1)))
    row = tables.TREE_CORRECTION[protocol]
    return row[place] if place < len(row) else 1.0


def _expected_bandwidth(ask: Ask, algorithm: Algorithm, protocol: Protocol) -> float:
    """Algorithm bandwidth, GB/s."""
    bus = ask.rings.believed_gb_s
    if algorithm == "nvls":
        return bus * tables.NVLS_SHARE
    if algorithm == "ring" and protocol == "ll":
        return min(_ll_limit(ask), bus * _expected_ll_share(ask)) * ask.ranks / ask.hops
    if algorithm == "ring":
        return _ring_bus(ask, protocol, bus) * ask.ranks / ask.hops
    return _tree_bus(ask, protocol, bus) / 2


def _expected_ll_share(ask: Ask) -> float:
    if ask.machine.nccl.release > tables.OLD_RELEASE:
        return tables.RING_LL_SHARE
    sums = ask.rings.hosts > 1 or ask.kind in ("all_reduce", "reduce")
    return tables.OLD_RING_LL_SHARE if sums else tables.OLD_RING_LL_SHARE_ONE_HOST_NO_SUM


def _ll_limit(ask: Ask) -> float:
    if ask.rings.hosts == 1:
        return tables.LL_LIMIT_ONE_HOST[ask.generation]
    vendor = "amd" if ask.machine.host.cpu_vendor == "amd" else "intel"
    return tables.LL_LIMIT_HOSTS[vendor][tables.node_column(ask.rings.hosts) - 1]


def _ring_bus(ask: Ask, protocol: Protocol, bus: float) -> float:
    if protocol == "ll":
        return min(_ll_limit(ask), bus * tables.RING_LL_SHARE)
    if protocol == "ll128":
        crowded = ask.ranks < 2 * ask.rings.hosts
        share = tables.RING_LL128_SHARE_ONE_RANK_A_HOST if crowded else tables.RING_LL128_SHARE
        return min(bus * share, len(ask.rings.orders) * tables.RING_LL128_PER_CHANNEL[ask.generation])
    return bus


def _tree_bus(ask: Ask, protocol: Protocol, bus: float) -> float:
    column = tables.node_column(ask.rings.hosts)
    channels = len(ask.rings.orders)
    bus = min(bus * tables.TREE_SHARE, channels * tables.TREE_PER_CHANNEL[ask.generation][column])
    if protocol == "ll":
        return min(bus * tables.TREE_LL_SHARE, _ll_limit(ask))
    if protocol == "ll128":
        share = tables.TREE_LL128_SHARE_ONE_HOST if ask.rings.hosts == 1 else tables.TREE_LL128_SHARE_HOSTS
        return min(bus * share, channels * tables.TREE_LL128_PER_CHANNEL[ask.generation][column])
    return bus


def _expected_latency(ask: Ask, algorithm: Algorithm, protocol: Protocol) -> float:
    base = tables.BASE_US[algorithm][protocol]
    hop = tables.HOP_US[ask.rings.hardware][algorithm][protocol]
    if algorithm == "nvls":
        return base + hop
    across = tables.HOP_US["network"][algorithm][protocol]
    hosts = ask.rings.hosts
    if algorithm == "tree":
        return base + 2 * ((ask.ranks / hosts - 1) * hop + int(log2(hosts)) * across)
    if ask.kind in CHAINED:
        return base + (across if hosts > 1 else hop)
    between = (2 if ask.kind == "all_reduce" else 1) * (hosts - 1)
    return base + (ask.hops - between) * max(hop, _posting_us(ask, protocol)) + between * across


def _posting_us(ask: Ask, protocol: Protocol) -> float:
    """What the CPU takes to post one step of a ring over a network."""
    if ask.rings.hosts == 1:
        return 0.0
    return tables.net_post_us(ask.machine.host.cpu_vendor) * (tables.NET_POSTS_SIMPLE if protocol == "simple" else 1)


# Cost -----------------------------------------------------------------------------------------------------------


def cost(ask: Ask, algorithm: Algorithm, protocol: Protocol) -> Cost:
    """What the choice takes on the machine's links."""
    lane, bus = ask.rings.bound, ask.rings.bus_gb_s
    if algorithm == "nvls":
        # Out of each GPU go its own data, read by the others' reductions, and 1/r of the result, to all at once.
        crossing = ask.nbytes * (1 + 1 / ask.ranks)
        latency = _expected_latency(ask, algorithm, protocol) + ask.added_us
        return Cost(latency, crossing / (bus * tables.NVLS_SHARE) / 1e3, lane)
    if algorithm == "tree":
        rate = _tree_bus(ask, protocol, bus) / 2 * _correction(protocol, ask.nbytes)
        turns = 2 * (ask.ranks / ask.rings.hosts - 1 + int(log2(ask.rings.hosts)))
        latency = _expected_latency(ask, algorithm, protocol) + turns * ask.added_us
        return Cost(max(latency, 0.0), ask.nbytes / rate / 1e3, lane)
    if protocol == "ll":
        return _ll_cost(ask, lane, bus)
    if protocol == "ll128":
        return _ll128_cost(ask, lane, bus)
    return _simple_cost(ask, lane, bus)


def _turns(ask: Ask, *, received: bool = True) -> float:
    """Turns that each rank takes one after another: a send a step, and at last one that only receives."""
    if ask.kind in CHAINED:
        return 1.0 if ask.rings.hosts == 1 else float(ask.rings.hosts)
    return ask.hops + (1 if received else 0)


def _mean_hop(ask: Ask, protocol: Protocol) -> float:
    """Latency of a hop, averaged over the ring: data pass every hop in turn."""
    paths = ask.rings.paths
    mean = sum(count * hop_us(path, protocol) for path, count in paths.items()) / sum(paths.values())
    return max(mean + ask.added_us, 0.0)


def hop_us(path: PathClass, protocol: Protocol) -> float:
    """What one hop adds: NCCL's table, and the hand-over through an NVSwitch for the protocol that waits for it."""
    if path == "NET":
        return tables.HOP_US["network"]["ring"][protocol]
    if path in ("NVL", "NVS"):
        switch = NVSWITCH_EXCHANGE_US if path == "NVS" and protocol == "simple" else 0.0
        return tables.HOP_US["nvlink"]["ring"][protocol] + switch
    return tables.HOP_US["pcie"]["ring"][protocol]


def _ll_cost(ask: Ask, lane: str, bus: float) -> Cost:
    """Data and flags travel together: a turn takes what its flags or what its bytes take, whichever is longer."""
    hop = _mean_hop(ask, "ll")
    paths = ask.rings.paths
    switched = hop + NVSWITCH_EXCHANGE_US * paths.get("NVS", 0) / sum(paths.values())
    moving = ask.nbytes * ask.hops / ask.ranks / _ring_bus(ask, "ll", bus) / 1e3
    sent = _turns(ask, received=False) * hop
    waiting = _turns(ask) * switched
    return Cost(tables.BASE_US["ring"]["ll"] + max(sent, waiting - moving), moving, lane)


def _simple_cost(ask: Ask, lane: str, bus: float) -> Cost:
    """Turns of two slices each; where NVLink is as fast as the SMs, the turn that only receives takes as long.

    A link that slows down while both its directions are busy does so between the hand-overs only: they cost what they
    take beyond the time that is lost by it.
    """
    turns = _turns(ask)
    handover = tables.SLICES * turns * _mean_hop(ask, "simple")
    crossing = ask.nbytes * ask.hops / ask.ranks
    lost = crossing / bus / 1e3 - crossing / ask.rings.one_way_gb_s / 1e3
    latency = tables.BASE_US["ring"]["simple"] + max(handover - lost, 0.0)
    chained = ask.kind in CHAINED
    if ask.rings.hardware == "nvlink" and ask.rings.hosts == 1 and not chained:
        crossing *= turns / ask.hops
    return Cost(latency, crossing / bus / 1e3, lane)


def _ll128_cost(ask: Ask, lane: str, bus: float) -> Cost:
    """A turn is a hop, then the SMs pack the channel's lines, then all channels' lines cross the link.

    In a host all ranks take their turns in step, so the three do not overlap.  A chain (broadcast, reduce) passes
    everything on.
    """
    pieces = 1 if ask.kind in CHAINED else ask.ranks
    turns = float(ask.ranks) if pieces == 1 else _turns(ask)
    channels = ask.rings.channels
    grains = ceil(ask.nbytes / (channels * pieces * tables.LL128_GRAIN))
    busy = ceil(ask.nbytes / (max(grains, 1) * pieces * tables.LL128_GRAIN))  # the last channels may have nothing
    chunk = grains * tables.LL128_GRAIN
    repeats = 1.0 if pieces == 1 else turns
    packing = repeats * chunk / tables.RING_LL128_PER_CHANNEL[ask.generation] / 1e3
    crossing = repeats * chunk * busy / (bus * tables.RING_LL128_SHARE) / 1e3
    bound = lane if crossing >= packing else "packing LL128 lines"
    latency = tables.BASE_US["ring"]["ll128"] + turns * _mean_hop(ask, "ll128")
    # A NIC sends what is packed while the SMs pack what follows.
    transfer = packing + crossing if ask.rings.hosts == 1 else max(packing, crossing)
    return Cost(latency, transfer, bound)
