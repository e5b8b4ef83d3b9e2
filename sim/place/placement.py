"""Placement: which device each rank runs on, and how long each of its operations takes alone there."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from sim.errors import UserError
from sim.graph import OpGraph
from sim.timeline import CollectiveInfo, DurationSource

SHARE_UNIT = 2.0**-32


def share_of(part: float) -> float:
    """The multiple of ``SHARE_UNIT`` next to a part of a lane's time; never 0."""
    return max(round(part / SHARE_UNIT), 1) * SHARE_UNIT


class Flow(msgspec.Struct, frozen=True):
    """What a transfer does to the machine's links: after ``latency_ns``, in which no link is busy, it moves its bytes
    in ``transfer_ns`` where it is alone.

    ``shares``: (lane, part of the lane's time that it needs while it runs at that rate), 0 < part <= 1, by name of
    lane; the lane that bounds it has 1.  Parts are whole multiples of ``SHARE_UNIT``: so their sums are exact, in any
    order.  (Where one flow stands for all of a class, a part is what they take together: ``sim.replay.folding``.)
    """

    latency_ns: int
    transfer_ns: int
    shares: tuple[tuple[str, float], ...]


class Held(msgspec.Struct, frozen=True):
    """What a collective's kernel takes of its device from compute beside it, in parts per million: ``sms_ppm`` of the
    SMs while it is there, ``memory_ppm`` of the memory bandwidth while it transfers."""

    sms_ppm: int
    memory_ppm: int


class CollectiveDoubt(msgspec.Struct, frozen=True):
    """How far a collective's time may be off: the 10th and 90th percentile of actual over predicted, and what is to
    blame."""

    p10: float
    p90: float
    source: str


class Costs(msgspec.Struct, frozen=True):
    """One program on one device: per operation its duration alone, launch lag, stream gap, and where the duration
    came from.

    ``collectives`` tells algorithm and size of each collective operation; ``flows`` the load on links of each transfer
    that shares them with others (its duration is the flow's, alone); ``workspaces`` the stream (lane) on which a host
    call launches the first matrix product: cuBLAS takes its workspace then; ``held`` what each collective takes of the
    device, and ``bounds`` what bounds a kernel where that is not compute ("memory" or "floor"); ``losses`` what kernels
    bound by compute lose of their speed while so many SMs are held, by ``Held.sms_ppm`` and operation, in parts per
    million, where that is known to be another part than the SMs'; ``doubts`` how sure the time of each collective is.
    """

    duration_ns: tuple[int, ...]
    lag_ns: tuple[int, ...]
    gap_ns: tuple[int, ...]
    source: tuple[DurationSource, ...]
    collectives: dict[int, CollectiveInfo]
    flows: dict[int, Flow] = {}
    workspaces: dict[int, int] = {}
    held: dict[int, Held] = {}
    bounds: dict[int, str] = {}
    losses: dict[int, dict[int, int]] = {}
    doubts: dict[int, CollectiveDoubt] = {}


class PlacedRank(msgspec.Struct, frozen=True):
    """One rank on its device; ranks that run the same program alike share ``costs``.

    ``outside``: what else of the device's memory is taken, by name: not by PyTorch's allocator, but by the context
    and by NCCL.  nvidia-smi shows it, ``memory_allocated`` does not.
    """

    rank: int
    device: str
    device_name: str
    program: int
    costs: Costs
    memory_bytes: int | None = None
    compute_capability: str = ""
    outside: dict[str, int] = {}


NONE = -1  # no doubt


class Interval(NamedTuple):
    """Actual over predicted time: the 10th and 90th percentile, and the share of the variance that pieces share."""

    p10: float
    p90: float
    common: float


class Source(msgspec.Struct, frozen=True):
    """One source of error, and what would settle it."""

    name: str
    cure: str


class Part(NamedTuple):
    """One source's part in an operation's error; ``piece`` names the work whose own error it is."""

    source: Source
    interval: Interval
    piece: str


Kind = tuple[Part, ...]
"""All that may be wrong with an operation's duration: errors that multiply."""


class RankDoubt(msgspec.Struct, frozen=True):
    """One rank's operations: for each the index of its kind, or NONE; and those of host work and of launching."""

    kind: tuple[int, ...]
    host: int
    launch: int


class Doubts(msgspec.Struct, frozen=True):
    """The kinds of a placement, and which operation has which; no rank is there where all durations are measured."""

    kinds: tuple[Kind, ...] = ()
    ranks: dict[int, RankDoubt] = {}

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every source once, in order of its name."""
        found = {part.source.name: part.source for kind in self.kinds for part in kind}
        return tuple(found[name] for name in sorted(found))


class RankPower(msgspec.Struct, frozen=True):
    """Watts of a rank's device: its limit, waiting, and in each operation (an estimate)."""

    limit_w: float
    idle_w: float
    watts: tuple[float, ...]


class Placement(msgspec.Struct, frozen=True):
    """A graph that has its place on a machine: all that the replay needs to know, and how sure it is."""

    graph: OpGraph
    machine: str
    ranks: tuple[PlacedRank, ...]
    warnings: tuple[str, ...] = ()
    doubts: Doubts = Doubts()
    power: dict[int, RankPower] = {}

    def check(self) -> None:
        """Raise UserError where a cost is missing or negative."""
        for placed in self.ranks:
            ops = len(self.graph.programs[placed.program].ops)
            costs = placed.costs
            for field in (costs.duration_ns, costs.lag_ns, costs.gap_ns, costs.source):
                if len(field) != ops:
                    raise UserError(f"{self.graph.name}: rank {placed.rank}: {len(field)} costs for {ops} operations")
            if ops and min(*costs.duration_ns, *costs.lag_ns, *costs.gap_ns, 0) < 0:
                raise UserError(f"{self.graph.name}: rank {placed.rank}: a negative duration")
