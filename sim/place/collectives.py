"""What one collective costs on a machine, alone: its time, what chose it, and the bytes it puts on every link.

``plan`` is pure: the same machine, kind, bytes and GPUs give the same plan.  Times start when the last rank has
arrived.  Where the machine's file has a measured curve, that comes first (``source`` "profile"); otherwise NCCL's
own model chooses and the links decide (``source`` "roofline").  Ignored: faults, CPU jitter, other traffic (the
replay shares links in time from ``loads``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil
from typing import Literal, cast, get_args

from sim.errors import UnknownNameError, UserError
from sim.ops import CollectiveKind
from sim.place import nccl_tables as tables
from sim.place.collectives_measured import Reading, read_curve
from sim.place.nccl_rings import Rings, bus_bandwidth, find_rings, link_demand, most_on_a_host
from sim.place.nccl_time import CHAINED, FALLBACK_NOTE, Ask, Cost, candidates, choose, cost, hop_us, nvls_tree
from sim.topology.machine import Gpu, Machine, PathClass, Route
from sim.units import ns_from_us

Loads = tuple[tuple[str, int], ...]
Transfer = tuple[int, int, int]


@dataclass(frozen=True)
class CollectivePlan:
    """One collective on its GPUs.

    ``ns`` = ``latency_ns`` (no link is busy) + ``transfer_ns`` (the bytes of ``loads`` are on their lanes, all at one
    common rate).  ``call_ns`` is what calls issued back to back would show: never less than the host takes for one;
    of a send, what the sender's kernel takes.  ``as_measured``: read off the host's own curve, nothing of it
    carried over by a model.
    ``loads``: (lane, bytes) in name order; ``bound``: the lane or part that bounds the transfer.
    """

    kind: CollectiveKind
    nbytes: int
    ranks: int
    latency_ns: int
    transfer_ns: int
    call_ns: int
    algorithm: str
    protocol: str
    channels: int
    source: Literal["profile", "roofline"]
    bound: str
    loads: Loads
    note: str = ""
    as_measured: bool = False

    @property
    def ns(self) -> int:
        """Time on the devices."""
        return self.latency_ns + self.transfer_ns

    @property
    def call_us(self) -> float:
        """``call_ns`` in microseconds."""
        return self.call_ns / 1e3

    @property
    def algbw_gb_s(self) -> float:
        """Bytes / call time (nccl-tests, PERFORMANCE.md)."""
        return self.nbytes / self.call_ns if self.call_ns else 0.0

    @property
    def busbw_gb_s(self) -> float:
        """algbw x what each rank's link carries of a byte."""
        return self.algbw_gb_s * bus_factor(self.kind, self.ranks)


def bus_factor(kind: str, ranks: int) -> float:
    """busbw / algbw as nccl-tests defines it."""
    if kind == "all_reduce":
        return 2 * (ranks - 1) / ranks
    return (ranks - 1) / ranks if kind in ("all_gather", "reduce_scatter", "all_to_all") else 1.0


def plan(machine: Machine, kind: str, nbytes: int, gpus: tuple[int, ...]) -> CollectivePlan:
    """The plan of one collective over these GPUs (places in the machine's order, one a rank).

    ``nbytes`` is the whole tensor as nccl-tests counts it.  For send and recv the two GPUs are sender and receiver.
    UserError for an unknown kind, GPUs that are not there or stand twice, and bytes below 0.
    """
    kind = _checked_kind(kind)
    _check(machine, kind, nbytes, gpus)
    if len(gpus) == 1:
        return _alone(kind, nbytes)
    if kind in ("send", "recv"):
        moved = replace(plan_transfers(machine, ((gpus[0], gpus[1], nbytes),)), kind=kind, nbytes=nbytes)
        return _senders_own(machine, moved, gpus) if kind == "send" else moved
    if kind == "all_to_all":
        piece = ceil(nbytes / len(gpus))
        members = sorted(gpus)
        every = tuple((a, b, piece) for a in members for b in members if a != b)
        moved = plan_transfers(machine, every)
        call_ns = max(moved.call_ns, _host_ns(machine))
        return replace(moved, kind=kind, nbytes=nbytes, ranks=len(gpus), call_ns=call_ns)
    if kind == "barrier":  # torch.distributed's barrier is an all-reduce of one element
        return replace(plan(machine, "all_reduce", 4, gpus), kind="barrier")
    return _PLANNERS[machine.collectives.library](machine, kind, nbytes, gpus)


def _checked_kind(kind: str) -> CollectiveKind:
    if kind not in get_args(CollectiveKind):
        raise UnknownNameError("collective", kind, get_args(CollectiveKind))
    return cast(CollectiveKind, kind)


def _check(machine: Machine, kind: CollectiveKind, nbytes: int, gpus: tuple[int, ...]) -> None:
    if nbytes < 0:
        raise UserError(f"a collective of {nbytes} bytes cannot be; give 0 or more")
    count = len(machine.gpus)
    wrong = [g for g in gpus if not 0 <= g < count]
    if wrong or not gpus:
        raise UserError(f"{machine.name} has {count} devices, 0 to {count - 1}; asked for {wrong or 'none'}")
    if len(gpus) > count or len(set(gpus)) < len(gpus):
        raise UserError(f"each rank needs its own device; asked for {list(gpus)}")
    if kind in ("send", "recv") and len(gpus) != 2:
        raise UserError(f"{kind} takes two devices, sender and receiver; asked for {list(gpus)}")


def _alone(kind: CollectiveKind, nbytes: int) -> CollectivePlan:
    """One rank needs no network."""
    return CollectivePlan(
        kind=kind,
        nbytes=nbytes, ranks=1, latency_ns=0, transfer_ns=0, call_ns=0, algorithm="none", protocol="none", channels=0,
        source="roofline", bound="nothing", loads=(), note="one rank needs no network",
    )  # fmt: skip


# NCCL -----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=512)
def _rings(machine: Machine, gpus: tuple[int, ...]) -> Rings:
    return find_rings(machine, tuple(machine.gpus[g] for g in sorted(gpus)))


@lru_cache(maxsize=512)
def _chains(machine: Machine, gpus: tuple[int, ...]) -> Rings:
    """The rings with the bandwidth that they have cut open: the last rank sends nothing on to the first."""
    rings = _rings(machine, gpus)
    lane, bus, one_way = bus_bandwidth(machine, rings.orders, rings.chain_hops)
    return replace(rings, bound=lane, bus_gb_s=bus, one_way_gb_s=one_way)


def _ask(machine: Machine, kind: str, nbytes: int, gpus: tuple[int, ...]) -> Ask:
    members: tuple[Gpu, ...] = tuple(machine.gpus[g] for g in sorted(gpus))
    found = _chains if kind in CHAINED else _rings
    return Ask(machine, kind, nbytes, members, found(machine, tuple(sorted(gpus))))


def _nccl(machine: Machine, kind: CollectiveKind, nbytes: int, gpus: tuple[int, ...]) -> CollectivePlan:
    ask = _ask(machine, kind, nbytes, gpus)
    algorithm, protocol = choose(ask)
    modelled = cost(ask, algorithm, protocol)
    reading = read_curve(machine, kind, nbytes, len(gpus)) if ask.rings.hosts == 1 else None
    if reading is not None and reading.ranks != len(gpus):
        reading = _for_fewer(machine, ask, reading)
    if reading is not None:
        reading = _on_this_host(machine, ask, modelled, reading, gpus)
    told = reading or modelled
    note = reading.note if reading else ""
    able = bool(candidates(ask))
    if not able:
        note = f"{FALLBACK_NOTE}; {note}" if note else FALLBACK_NOTE
    elif nvls_tree(ask):
        note = f"NCCL may take NVLSTree here, which is not modelled: {algorithm} is taken"
    latency_ns, transfer_ns = ns_from_us(told.latency_us), ns_from_us(told.transfer_us)
    return CollectivePlan(
        kind=kind,
        nbytes=nbytes,
        ranks=len(gpus),
        latency_ns=latency_ns,
        transfer_ns=transfer_ns,
        call_ns=max(latency_ns + transfer_ns, _host_ns(machine)),
        algorithm=algorithm,
        protocol=protocol,
        channels=ask.rings.channels,
        source="profile" if reading else "roofline",
        bound=modelled.bound,
        loads=_loads(ask, algorithm),
        note=note,
        as_measured=able and reading is not None and reading.own,
    )


def _for_fewer(machine: Machine, ask: Ask, reading: Reading) -> Reading:
    """A reading by steps from more ranks than asked for, where the links give the rings of fewer more or less.

    What the links give is the model's, of the machine as it was measured: the curve knows no other number of ranks.
    """
    measured_on = machine.baseline or machine
    host = ask.gpus[0].host
    more = tuple(gpu.index for gpu in measured_on.gpus if gpu.host == host)[: reading.ranks]
    fewer = _rings(measured_on, tuple(gpu.index for gpu in ask.gpus))
    ratio = _rings(measured_on, more).bus_gb_s / fewer.bus_gb_s
    if abs(ratio - 1) < 1e-9:
        return reading
    gives = "more" if ratio < 1 else "less"
    why = f"its transfer scaled by {ratio:.3g}, since the links give these rings {gives} (bound by {fewer.bound})"
    return replace(reading, transfer_us=reading.transfer_us * ratio, note=f"{reading.note}; {why}")


def _on_this_host(machine: Machine, ask: Ask, modelled: Cost, reading: Reading, gpus: tuple[int, ...]) -> Reading:
    """The measured curve; where links were changed, its transfer scaled as the model's."""
    if machine.baseline is None:
        return reading
    before = _ask(machine.baseline, ask.kind, ask.nbytes, gpus)
    was = cost(before, *choose(before))
    ratio = modelled.transfer_us / was.transfer_us if was.transfer_us else 1.0
    latency = max(reading.latency_us + modelled.latency_us - was.latency_us, 0.0)
    added = latency - reading.latency_us
    told = [] if abs(ratio - 1) < 1e-9 else [f"its transfer scaled by {ratio:.3g}"]
    told += [] if abs(added) < 1e-9 else [f"its latency {added:+.3g} us"]
    if not told:
        return replace(reading, note=f"{reading.note}; what was changed makes no difference to it")
    note = f"{reading.note}; {' and '.join(told)} for what was changed (bound by {modelled.bound})"
    return replace(reading, latency_us=latency, transfer_us=reading.transfer_us * ratio, note=note, own=False)


def _host_ns(machine: Machine) -> int:
    """What the host takes to issue one collective of NCCL."""
    return ns_from_us(machine.host.collective_us) if machine.collectives.library == "nccl" else 0


def _loads(ask: Ask, algorithm: str) -> Loads:
    """Bytes on each lane, of all channels together."""
    if algorithm == "nvls":
        return tuple((lane, round(ask.nbytes * (1 + 1 / ask.ranks))) for lane in ask.rings.crossings)
    share = ask.nbytes / len(ask.rings.orders)
    if algorithm == "tree":
        crossings = ask.rings.tree_crossings
    elif ask.kind in CHAINED:
        crossings = ask.rings.chain_crossings
    else:
        crossings, share = ask.rings.crossings, share * ask.hops / ask.ranks
    return tuple((lane, round(share * count)) for lane, count in crossings.items())


def _rounded(bytes_on: dict[str, float]) -> Loads:
    return tuple((lane, round(amount)) for lane, amount in sorted(bytes_on.items()))


# Point to point -------------------------------------------------------------------------------------------------


@dataclass
class _Shared:
    """A part that routes have in common and the bytes of all transfers over it: thousands are counted as one."""

    part: Route
    nbytes: float = 0.0
    _us: float | None = None

    def hops_us(self, machine: Machine, *, plain: bool) -> float:
        """The latency of its links, or where NCCL's figures stand for that what a change of the links adds."""
        if self._us is None:
            self._us = self.part.latency_us if plain else machine.added_latency_us(self.part)
        return self._us


def plan_transfers(machine: Machine, transfers: Iterable[Transfer]) -> CollectivePlan:
    """A group of sends that run together: (from, to, bytes) each; the lane with most to carry bounds it.

    NCCL sends up to 16 KiB by LL and more by Simple, and does not tune the choice.
    """
    asked = tuple(transfers)
    names = [gpu.name for gpu in machine.gpus]
    ranks = most_on_a_host([machine.gpus[g] for g in sorted({end for a, b, _ in asked for end in (a, b)})])
    largest = max(size for _, _, size in asked)
    plain = machine.collectives.library != "nccl"
    protocol: tables.Protocol = "ll" if largest <= tables.P2P_LL_BYTES else "simple"
    wire = 1 / tables.RING_LL_SHARE if protocol == "ll" and not plain else 1.0
    shared: dict[int, _Shared] = {}
    posted: Counter[int] = Counter()
    latency = 0.0
    for a, b, size in asked:
        parts = machine.transfer_parts(names[a], names[b], ranks)
        hops_us = 0.0
        for part in parts:
            one = shared.get(id(part)) or shared.setdefault(id(part), _Shared(part))
            one.nbytes += size
            hops_us += one.hops_us(machine, plain=plain)
        path = parts[0].path if len(parts) == 1 else "NET"
        posted[a] += path == "NET"
        latency = max(latency, hops_us if plain else _send_us(path, protocol, hops_us))
    moves = [(one.part, one.nbytes) for one in shared.values()]
    transfer, bound = _busiest(machine, moves)
    if not plain:  # a thread of the CPU posts a card's sends over a network one by one, while the first ones move
        posting = (max(posted.values()) - 1) * tables.net_post_us(machine.host.cpu_vendor)
        latency += max(posting - transfer * wire, 0.0)
    bytes_on: dict[str, float] = {}
    for part, carried in moves:
        for lane in part.lanes:
            bytes_on[lane] = bytes_on.get(lane, 0.0) + carried
    latency_ns, transfer_ns = ns_from_us(latency), ns_from_us(transfer * wire)
    return CollectivePlan(
        kind="send", nbytes=largest, ranks=2, latency_ns=latency_ns, transfer_ns=transfer_ns,
        call_ns=latency_ns + transfer_ns, algorithm="send", protocol="tcp" if plain else protocol, channels=1,
        source="roofline", bound=bound, loads=_rounded(bytes_on),
    )  # fmt: skip


def _senders_own(machine: Machine, moved: CollectivePlan, gpus: tuple[int, ...]) -> CollectivePlan:
    """The send with what its own kernel takes as ``call_ns``, where the receiver reads: less than until data arrive."""
    pair = [machine.gpus[g] for g in gpus]
    route = machine.transfer_route(pair[0].name, pair[1].name)
    reads = all(gpu.profile.capability == tables.READS_OVER_NVLINK for gpu in pair) and route.path in ("NVL", "NVS")
    if machine.collectives.library != "nccl" or not reads:
        return moved
    links = int(min(hop.link.nccl_gb_s for hop in route.hops) / tables.NVLINK_OF_A100_GB_S)
    channels = min(1 << (2 * max(links, 1) - 1).bit_length(), tables.MOST_CHANNELS)
    copied = tables.BASE_US["ring"]["simple"] + moved.nbytes / (channels * tables.SENDER_COPY_GB_S) / 1e3
    small = tables.BASE_US["ring"]["ll"] if moved.protocol == "ll" else copied
    note = "the sender's own kernel, which ends before the data have arrived: the receiver reads"
    return replace(moved, call_ns=min(ns_from_us(min(small, copied)), moved.ns), channels=channels, note=note)


def _busiest(machine: Machine, moves: list[tuple[Route, float]]) -> tuple[float, str]:
    """Microseconds that the busiest lane needs, and its name."""
    rates = machine.capacities
    return max((amount / rates[lane] / 1e3, lane) for lane, amount in link_demand(moves).items())


def _send_us(path: PathClass, protocol: tables.Protocol, added_us: float) -> float:
    return tables.BASE_US["ring"][protocol] + max(hop_us(path, protocol) + added_us, 0.0)


# The textbook ring ----------------------------------------------------------------------------------------------


def _textbook(machine: Machine, kind: CollectiveKind, nbytes: int, gpus: tuple[int, ...]) -> CollectivePlan:
    """The ring, or this host's own curve; where links were changed, its transfer scaled as the ring's."""
    ring = _ring(machine, kind, nbytes, gpus)
    reading = read_curve(machine, kind, nbytes, len(gpus)) if len({machine.gpus[g].host for g in gpus}) == 1 else None
    if reading is None:
        return ring
    was = ring if machine.baseline is None else _ring(machine.baseline, kind, nbytes, gpus)
    ratio = ring.transfer_ns / was.transfer_ns if was.transfer_ns else 1.0
    latency_ns = max(ns_from_us(reading.latency_us) + ring.latency_ns - was.latency_ns, 0)
    transfer_ns = round(ns_from_us(reading.transfer_us) * ratio)
    scaled = "" if ratio == 1.0 else f"; its transfer scaled by {ratio:.3g} for what was changed"
    return replace(
        ring, latency_ns=latency_ns, transfer_ns=transfer_ns, call_ns=latency_ns + transfer_ns, source="profile",
        note=reading.note + scaled, as_measured=reading.own and not scaled,
    )  # fmt: skip


def _ring(machine: Machine, kind: CollectiveKind, nbytes: int, gpus: tuple[int, ...]) -> CollectivePlan:
    """Each step costs the slowest path's latency and one rank's piece over the slowest lane."""
    ranks = len(gpus)
    names = [machine.gpus[g].name for g in gpus]
    routes = tuple(machine.route(a, b) for a, b in zip(names, (*names[1:], names[0]), strict=True))
    orders = (tuple(names),)
    chained = kind in CHAINED
    rings = Rings(orders, 0.0, 1, routes, *bus_bandwidth(machine, orders, routes[:-1] if chained else routes))
    ask = Ask(machine, kind, nbytes, tuple(machine.gpus[g] for g in gpus), rings)
    steps = ranks - 1 if chained else ask.hops
    latency_ns = ns_from_us(steps * max(route.latency_us for route in routes))
    transfer_ns = ceil(nbytes * (1 if chained else steps / ranks) / rings.bus_gb_s)
    gloo = machine.collectives.library == "gloo"
    return CollectivePlan(
        kind=kind,
        nbytes=nbytes, ranks=ranks, latency_ns=latency_ns, transfer_ns=transfer_ns,
        call_ns=latency_ns + transfer_ns, algorithm="ring", protocol="tcp" if gloo else "alpha-beta", channels=1,
        source="roofline", bound=rings.bound, loads=_loads(ask, "ring"),
    )  # fmt: skip


_PLANNERS = {"nccl": _nccl, "gloo": _textbook, "alpha-beta": _textbook}
