"""Ranks that are alike are replayed once: the quotient of a placement by the symmetry of its ranks, groups and lanes.

Two ranks are *alike* where nothing the replay computes can tell them apart: they run the same program at the same
costs, and whatever they meet (the ranks of their collectives, the lanes of their transfers) is alike in turn.  That is
colour refinement (1-dimensional Weisfeiler-Leman, as in bisimulation) over three kinds of things:

* a **rank** by its program, its costs (all but the names of lanes), its device and memory, the colour of its instance
  of every process group, and the lanes that its own copies load, by how much each copy loads them;
* an **instance** of a process group by the times of its collectives, the multiset of its ranks' colours, and the lanes
  that it loads, by how much each collective loads them;
* a **lane** by its class of links and the multiset of the instances and ranks that load it, with their loads.

Colours are refined until no class falls apart any more.

Why the result is exact.  *Claim*: at every moment ranks of one class have done the same, and flows of one class (the
same collective of instances, or the same copy of ranks, of one colour) move at the same rate.  Suppose so up to some
moment.  A rank's next moment depends on its program, its costs and the ends of its transfers.  A collective ends
after the last arrival: the largest over its ranks, so over their classes, which are the same for all instances of a
colour.  Rates are max-min fair: rates grow together until a lane is full.  Lanes of one colour carry, of every class
of flows that is under way (all of it or none, by the claim), the same loads, so they fill at the same instant, and
flows of one class touch lanes of the same colours, so they stop growing together.  Sharing of a device and memory are
a rank's own.  So the next moment is the same for all ranks of a class too.

The quotient has one rank of each class and one lane of each class, each group with the classes that meet in it, and
each flow with the load that all flows of its class together put on that lane.  Loads are whole multiples of 2**-32
(:mod:`sim.place.placement`), so these sums are exact in floating point: every rate and moment is the same to the bit.

Not folded, because the claim has no proof there: a job in which the ranks of a meeting disagree about its flow.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import NamedTuple, TypeVar

import msgspec

from sim.graph import Program
from sim.ops import Collective
from sim.place.placement import Costs, Flow, PlacedRank, Placement

Shares = tuple[tuple[str, float], ...]
T = TypeVar("T", bound=Hashable)
Label = Hashable  # how an edge of the graph of ranks, instances and lanes is told from others


class Thing(NamedTuple):
    """A rank, an instance of a process group (its name and the ranks that are there), or a lane."""

    kind: str
    name: Hashable


class Folded(NamedTuple):
    """A placement of the ranks that stand for all, and for every rank the one that stands for it."""

    placement: Placement
    leader_of: dict[int, int]


def unfolded(placement: Placement) -> Folded:
    """Every rank stands for itself."""
    return Folded(placement, {placed.rank: placed.rank for placed in placement.ranks})


def fold(placement: Placement, *, contention: bool = True) -> Folded:
    """The quotient of a placement; without ``contention`` flows share no lanes, so lanes tell no ranks apart."""
    own = _own_colours(placement, contention=contention)
    if len(set(own.values())) == len(own):
        return unfolded(placement)
    try:
        job = _Job(placement, own, contention=contention)
    except _DisagreementError:
        return unfolded(placement)
    colours = refined(job.colours, job.edges)
    leaders: dict[int, int] = {}
    for rank in own:
        leaders.setdefault(colours[_rank(rank)], rank)
    if len(leaders) == len(own):
        return unfolded(placement)
    leader_of = {rank: leaders[colours[_rank(rank)]] for rank in own}
    return Folded(_quotient(job, colours, leader_of), leader_of)


# Colours ------------------------------------------------------------------------------------------------------------


class _Numbers(dict[Hashable, int]):
    """Small numbers for whatever is asked for, in the order in which it is first seen."""

    def __missing__(self, key: Hashable) -> int:
        self[key] = len(self)
        return self[key]


def refined(colours: dict[T, int], edges: dict[T, list[tuple[int, T]]]) -> dict[T, int]:
    """The coarsest colouring, no coarser than ``colours``, in which things of one colour have the same edges: as many
    of each label to each colour."""
    classes = len(set(colours.values()))
    while True:
        numbers = _Numbers()
        finer = {
            thing: numbers[colour, tuple(sorted((label, colours[other]) for label, other in edges.get(thing, ())))]
            for thing, colour in colours.items()
        }
        if len(numbers) == classes:
            return colours
        colours, classes = finer, len(numbers)


def _own_colours(placement: Placement, *, contention: bool) -> dict[int, int]:
    """Ranks by all that is their own: program, costs and how sure these are, and what decides their memory."""
    numbers, alike = _Numbers(), _Numbers()
    of_costs: dict[tuple[int, int, int], int] = {}
    colours = {}
    for placed in placement.ranks:
        doubt = placement.doubts.ranks.get(placed.rank)
        key = (placed.program, id(placed.costs), id(doubt))
        if key not in of_costs:
            program = placement.graph.programs[placed.program]
            of_costs[key] = alike[_costs_key(program, placed.costs, contention=contention), doubt]
        colours[placed.rank] = numbers[of_costs[key], _fields(placed, but=("rank", "device", "costs"))]
    return colours


def _costs_key(program: Program, costs: Costs, *, contention: bool) -> Hashable:
    """All of a rank's costs, but of its flows not the lanes; those of collectives are told by who meets."""
    copies = _Flows(_copies(program, costs) if contention else ())
    return (_fields(costs, but=("flows",)), copies.pattern)


def _fields(value: Costs | PlacedRank, but: tuple[str, ...]) -> Hashable:
    """Whatever a struct holds, so that no field that is added later is forgotten here."""
    return tuple(_hashable(getattr(value, name)) for name in value.__struct_fields__ if name not in but)


def _hashable(value: object) -> Hashable:
    if isinstance(value, dict):
        return tuple((key, _hashable(held)) for key, held in value.items())
    assert isinstance(value, Hashable)
    return value


# Who meets whom, and what loads what --------------------------------------------------------------------------------


class _DisagreementError(Exception):
    """Ranks of a meeting disagree about its flow, or a rank is missing in its group."""


class _Flows:
    """The flows of one owner: ``loads`` are their distinct shares, ``pattern`` tells of each flow its place, its times
    and which load it is."""

    def __init__(self, flows: Iterable[tuple[int, Flow]]) -> None:
        self.load_of: dict[Shares, int] = {}
        self.pattern = tuple((i, f.latency_ns, f.transfer_ns, self._load(f.shares)) for i, f in flows)

    def _load(self, shares: Shares) -> int:
        return self.load_of.setdefault(shares, len(self.load_of))

    def on_lanes(self) -> dict[str, tuple[float, ...]]:
        """Per lane, the part that each load takes of it."""
        tables = [dict(shares) for shares in self.load_of]
        lanes = sorted({lane for table in tables for lane in table})
        return {lane: tuple(table.get(lane, 0.0) for table in tables) for lane in lanes}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Flows) and (self.pattern, self.load_of) == (other.pattern, other.load_of)

    __hash__ = None  # type: ignore[assignment]


class _RankFlows(NamedTuple):
    """A rank's flows: of its collectives, by group, and of its own copies."""

    by_group: dict[str, _Flows]
    copies: _Flows


class _Job:
    """Ranks, instances and lanes as a graph: a rank is joined to the instances it meets in, an instance (by its
    collectives) and a rank (by its copies) to the lanes that it loads."""

    def __init__(self, placement: Placement, own: dict[int, int], *, contention: bool) -> None:
        self.placement = placement
        self.edges: dict[Thing, list[tuple[int, Thing]]] = {}
        self.flows: dict[Thing, _Flows] = {}  # of instances, and of ranks: their copies
        self.takes: dict[Thing, dict[Thing, tuple[float, ...]]] = {}  # per lane, of whom: the part of each load
        self.instance_of: dict[tuple[str, int], Thing] = {}
        self.present: dict[Thing, tuple[int, ...]] = {}
        self._labels = _Numbers()
        of_rank = _flows_of_ranks(placement, contention=contention)
        for group in sorted({group for flows in of_rank.values() for group in flows.by_group}):
            for members in placement.graph.groups.get(group, ()):
                self._meet(group, {rank: of_rank[rank].by_group.get(group) for rank in members if rank in of_rank})
        for rank, flows in of_rank.items():
            self._load(_rank(rank), flows.copies)
            if any((group, rank) not in self.instance_of for group in flows.by_group):
                raise _DisagreementError
        colours = _Numbers()
        self.colours = {_rank(rank): colours["rank", colour] for rank, colour in own.items()}
        self.colours |= {i: colours["instance", self.flows[i].pattern] for i in self.instance_of.values()}
        self.colours |= {lane: colours["lane", str(lane.name).partition(":")[0]] for lane in self.takes}

    def _meet(self, group: str, present: dict[int, _Flows | None]) -> None:
        """The ranks of an instance agree about its flows, or nothing is folded."""
        if not present:
            return
        agreed = next(iter(present.values()))
        if agreed is None or any(flows is not agreed and flows != agreed for flows in present.values()):
            raise _DisagreementError
        instance = Thing("instance", (group, tuple(present)))
        self.present[instance] = tuple(present)
        for rank in present:
            self.instance_of[group, rank] = instance
            self._join(_rank(rank), instance, group)
        self._load(instance, agreed)

    def _load(self, owner: Thing, flows: _Flows) -> None:
        self.flows[owner] = flows
        for name, parts in flows.on_lanes().items():
            lane = Thing("lane", name)
            self.takes.setdefault(lane, {})[owner] = parts
            self._join(owner, lane, parts)

    def _join(self, a: Thing, b: Thing, label: Label) -> None:
        number = self._labels[label]
        self.edges.setdefault(a, []).append((number, b))
        self.edges.setdefault(b, []).append((number, a))


def _rank(rank: int) -> Thing:
    return Thing("rank", rank)


def _flows_of_ranks(placement: Placement, *, contention: bool) -> dict[int, _RankFlows]:
    """Ranks that share costs share their flows."""
    meetings: dict[int, list[tuple[int, Collective]]] = {}
    known: dict[tuple[int, int], _RankFlows] = {}
    for placed in placement.ranks:
        if placed.program not in meetings:
            ops = placement.graph.programs[placed.program].ops
            meetings[placed.program] = [(i, op) for i, op in enumerate(ops) if isinstance(op, Collective)]
        key = (placed.program, id(placed.costs))
        if key not in known:
            known[key] = _flows_of(meetings[placed.program], placed.costs.flows if contention else {})
    return {placed.rank: known[placed.program, id(placed.costs)] for placed in placement.ranks}


def _flows_of(meetings: list[tuple[int, Collective]], flows: dict[int, Flow]) -> _RankFlows:
    by_group: dict[str, list[tuple[int, Flow]]] = {}
    for i, op in meetings:
        by_group.setdefault(op.group, []).extend([(op.seq, flows[i])] if i in flows else [])
    collectives = {i for i, _ in meetings}
    copies = _Flows((i, flow) for i, flow in flows.items() if i not in collectives)
    return _RankFlows({group: _Flows(mine) for group, mine in by_group.items()}, copies)


def _copies(program: Program, costs: Costs) -> list[tuple[int, Flow]]:
    return [(i, flow) for i, flow in costs.flows.items() if not isinstance(program.ops[i], Collective)]


# The quotient -------------------------------------------------------------------------------------------------------


def _quotient(job: _Job, colours: dict[Thing, int], leader_of: dict[int, int]) -> Placement:
    """One rank and one lane of each class; what loads that lane is the load of its class."""
    placement, graph = job.placement, job.placement.graph
    loads = _loads_of_classes(job, colours)
    leaders = [placed for placed in placement.ranks if leader_of[placed.rank] == placed.rank]
    groups: dict[str, dict[int, tuple[int, ...]]] = {}
    for (group, _), instance in job.instance_of.items():
        standing = tuple(dict.fromkeys(leader_of[rank] for rank in job.present[instance]))
        groups.setdefault(group, {}).setdefault(colours[instance], standing)
    ranks = tuple(msgspec.structs.replace(placed, costs=_with_loads(job, colours, loads, placed)) for placed in leaders)
    folded = msgspec.structs.replace(
        graph,
        ranks=tuple(r for r in graph.ranks if leader_of[r.rank] == r.rank),
        groups={group: tuple(instances.values()) for group, instances in groups.items()},
    )
    return msgspec.structs.replace(placement, graph=folded, ranks=ranks)


def _loads_of_classes(job: _Job, colours: dict[Thing, int]) -> dict[tuple[int, int], Shares]:
    """Per class of owners and load: what all flows of that class together take of one lane of each class."""
    standing: dict[int, Thing] = {}
    for lane in sorted(job.takes):
        standing.setdefault(colours[lane], lane)
    totals: dict[tuple[int, int], dict[str, float]] = {}
    for lane in standing.values():
        for owner, parts in job.takes[lane].items():
            for load, part in enumerate(parts):
                if part:
                    of_lane = totals.setdefault((colours[owner], load), {})
                    of_lane[str(lane.name)] = of_lane.get(str(lane.name), 0.0) + part
    return {key: tuple(sorted(of_lane.items())) for key, of_lane in totals.items()}


def _with_loads(
    job: _Job, colours: dict[Thing, int], loads: dict[tuple[int, int], Shares], placed: PlacedRank
) -> Costs:
    ops = job.placement.graph.programs[placed.program].ops
    flows = {}
    for i, flow in placed.costs.flows.items():
        op = ops[i]
        owner = job.instance_of[op.group, placed.rank] if isinstance(op, Collective) else _rank(placed.rank)
        load = job.flows[owner].load_of.get(flow.shares)
        if load is not None:  # None where nothing is shared
            flows[i] = msgspec.structs.replace(flow, shares=loads.get((colours[owner], load), ()))
    return msgspec.structs.replace(placed.costs, flows=flows)
