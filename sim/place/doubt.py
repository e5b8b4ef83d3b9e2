"""Doubt: how far each operation's duration may be off, and which source of error it shares with which others.

Every source has an 80 % interval of actual over predicted time, from data that no fit had seen (docs/ranges.md says
which).  A source's error is in part common to all pieces of work that it touches (a card that is slower than its
sibling, a device predicted from others) and in part each piece's own (a shape for which the library has a better
kernel): ``common`` is the share of the variance that is common.  A piece that is computed again is the same piece.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial

import msgspec

from sim.graph import OpGraph, Program
from sim.ops import Copy, HostCall, Kernel, Op, Work
from sim.place.collective_spread import spread_of
from sim.place.collectives import CollectivePlan
from sim.place.kernels.pointwise import POINTWISE, is_walked
from sim.place.named import NameClass, class_of, dtype_of
from sim.place.placement import (
    NONE,
    CollectiveDoubt,
    Doubts,
    Interval,
    Kind,
    Part,
    PlacedRank,
    Placement,
    RankDoubt,
    Source,
)
from sim.timeline import DurationSource
from sim.topology.abilities import UNKNOWN, abilities_of, family
from sim.topology.device import DeviceProfile, find_device
from sim.topology.machine import Gpu

# Of the variance of log(measured / predicted), what two pieces of one workload share.  Shapes left out of the fits
# (tools/doubt_shares.py): products by number of rows, row kernels by length of row, elementwise ops by size; lent: the
# differences between the devices left out whole are shared too.
COMMON = {
    "gemm_float16": (0.1, 0.4),
    "gemm_float32": (0.05, 0.25),
    "elementwise": (0.25, 0.9),
    "softmax": (0.95, 0.95),
    "layer_norm": (0.7, 0.9),
    "attention": (1.0, 1.0),  # published for one kernel: whatever is wrong is wrong for all
}
NAMES = {
    "gemm_float16": "matrix products in half precision",
    "gemm_float32": "matrix products in single precision",
    "elementwise": "elementwise kernels",
    "softmax": "softmax kernels",
    "layer_norm": "normalizations",
    "attention": "fused attention",
    "convolution": "convolutions",
    "strided": "strided, broadcast and converting kernels",
    "other": "kernels of kinds that were never measured",
}
# Kinds of kernels with a formula but without a measurement: as wide as the widest that devices left out whole show
# (products in half precision for convolutions, softmax for what is bound by bytes), all of it common.  Strided kernels
# have constants from one trace of one device (sim/place/kernels/layout.py), which says nothing of others.  Of
# convolutions only sums are known, so how they compare with products is taken to be in as much doubt as products are,
# independently of it: times the square root of two in the logarithm.
UNMEASURED = {"convolution": ("gemm_float16", 2.0**0.5), "strided": ("softmax", 1.0), "other": ("softmax", 1.0)}
# A kernel measured on another device and carried over by the class of its name (sim/place/named.py).
NAMED: dict[NameClass, str] = {
    "products": "gemm",
    "convolutions": "convolution",
    "attention": "attention",
    "bytes": "elementwise",
}
# No formula or no shapes, only the bytes of the tensors: assumed, nothing is known.
ESTIMATE = Interval(*UNKNOWN, 0.5)
# Two cards of one model: Sinha et al., Not All GPUs Are Created Equal (SC22, arXiv 2208.11035): whiskers of 8 % of the
# median on average over five clusters and all applications, which is 5.4 standard deviations.
CARD = Interval(0.981, 1.019, 1.0)
# Medians of the time from one op to the next with one launch, of five public traces' hosts: 20.6 (H100), 21 (V100, 8
# GPUs), 30, 40 and 52 us (V100), all with the profiler on; a tenth of the fastest are below 11.5 us.  Of 15 us, which
# is the default of a machine's host:
HOST = Interval(0.77, 2.6, 1.0)
# A trace's host against another: the ratios of any two of those five paces.
OTHER_HOST = Interval(0.5, 2.0, 1.0)
# Of the A100's figures that all devices take over: launch latencies of 5.5 to 11.0 us and gaps of 0.7 to 1.35 us in
# public traces of V100s and an H100 (9.6 and 1.15 us there).
LAUNCH = Interval(0.6, 1.2, 1.0)
# NCCL's 24 GB/s of a PCIe 4.0 x16 slot: pinned copies reach 26.3 (p2pBandwidthLatencyTest, EPYC 9374F); copies of
# pageable memory half (CUDA's bandwidthTest on many hosts), and which they are a synthesized job does not say.
HOST_COPY = Interval(0.91, 2.0, 1.0)

CALIBRATE = "`tracesim calibrate` on one"
TRACE = "`tracesim trace` of the job on one"
LINKS = "`tracesim calibrate --links` on that host"


def doubts_of(placement: Placement, gpus: Sequence[Gpu]) -> Doubts:
    """What may be wrong with every operation of a placement on GPUs of a machine."""
    register = _Register(placement.graph, {gpu.name: gpu.profile for gpu in gpus}, placement.machine)
    ranks = {placed.rank: register.rank(placed) for placed in placement.ranks}
    return Doubts(tuple(register.kinds), ranks)


def of_collective(plan: CollectivePlan) -> CollectiveDoubt:
    """The doubt of one collective's time, by the links that bound it."""
    p10, p90 = spread_of(plan)
    links = plan.bound.partition(":")[0]
    return CollectiveDoubt(p10, p90, f"collectives bound by {links}")


class _Register:
    """Kinds by what makes them, each once."""

    def __init__(self, graph: OpGraph, profiles: Mapping[str, DeviceProfile], machine: str) -> None:
        self.kinds: list[Kind] = []
        self._graph = graph
        self._profiles = profiles
        self._machine = machine
        self._index: dict[Kind, int] = {}
        self._works: dict[tuple[int, str, DurationSource], int] = {}
        self._captured_on = {r.rank: r.device for r in graph.ranks}
        self._alone: dict[tuple[int, str, str], RankDoubt] = {}
        self._ranks: dict[tuple[object, ...], RankDoubt] = {}

    def rank(self, placed: PlacedRank) -> RankDoubt:
        """Ranks that run a program on one kind of GPU differ by their collectives at most."""
        costs, profile, on = placed.costs, self._profiles[placed.device], self._captured_on[placed.rank]
        collectives = tuple((i, doubt, costs.duration_ns[i]) for i, doubt in costs.doubts.items())
        alone, key = (placed.program, profile.name, on), (placed.program, profile.name, on, collectives)
        if key not in self._ranks:
            if alone not in self._alone:
                self._alone[alone] = self._without_collectives(placed, profile, on)
            kinds = list(self._alone[alone].kind)
            for i, doubt, ns in collectives:
                kinds[i] = self._collective(placed, i, doubt, ns)
            self._ranks[key] = msgspec.structs.replace(self._alone[alone], kind=tuple(kinds))
        return self._ranks[key]

    def _without_collectives(self, placed: PlacedRank, profile: DeviceProfile, captured_on: str) -> RankDoubt:
        program = self._graph.programs[placed.program]
        on_cpu = profile.kind != "gpu"
        if on_cpu and _is_captured(program):  # a run on a CPU keeps its durations; only its collectives are computed
            return RankDoubt((NONE,) * len(program.ops), NONE, NONE)
        kinds = tuple(self._op(placed, i, op, profile, captured_on) for i, op in enumerate(program.ops))
        host = OTHER_HOST if _is_captured(program) else HOST
        pace = Part(Source("the host's pace", "`tracesim trace` of any job on that host"), host, "")
        launch = Part(Source(f"launches on {profile.full_name}", CALIBRATE), LAUNCH, "")
        return RankDoubt(kinds, self._add((pace,)), NONE if on_cpu else self._add((launch,)))

    def _add(self, kind: Kind) -> int:
        if kind not in self._index:
            self._index[kind] = len(self.kinds)
            self.kinds.append(kind)
        return self._index[kind]

    def _collective(self, placed: PlacedRank, i: int, doubt: CollectiveDoubt, ns: int) -> int:
        if doubt.p10 == doubt.p90 == 1.0:
            return NONE
        info = placed.costs.collectives[i]
        # Over faster links it is another piece: what is its own need not be wrong alike.
        piece = f"{info.kind} {info.bytes} {info.ranks} {ns}"
        # What links and protocols are taken to reach is wrong for all sizes alike in the larger part.
        interval = Interval(doubt.p10, doubt.p90, 0.7)
        return self._add((Part(Source(f"{doubt.source} on {self._machine}", LINKS), interval, piece),))

    def _op(self, placed: PlacedRank, i: int, op: Op, profile: DeviceProfile, captured_on: str) -> int:
        if isinstance(op, Copy) and op.kind in ("h2d", "d2h"):
            return self._add((Part(Source("copies between host and device", LINKS), HOST_COPY, ""),))
        if not isinstance(op, Kernel | Copy):
            return NONE
        source = placed.costs.source[i]
        work = op.work if isinstance(op, Kernel) else None
        name = op.name if source == "estimate" else ""
        known = (NONE if work is None else work, f"{name}{profile.name}<{captured_on}", source)
        if known not in self._works:
            found = None if work is None else self._graph.works[work]
            self._works[known] = self._add(_kernel(op, found, source, profile, captured_on))
        return self._works[known]


def _is_captured(program: Program) -> bool:
    return any(isinstance(op, HostCall) and op.measured_ns is not None for op in program.ops)


def _kernel(
    op: Kernel | Copy, work: Work | None, source: DurationSource, profile: DeviceProfile, captured_on: str
) -> Kind:
    card = Part(Source(f"one {profile.full_name} against another", "measuring on the very card"), CARD, "")
    if source == "measured":
        return (card,)
    if source == "estimate" and op.measured_ns is not None:
        name = NAMED[class_of(op.name, "" if work is None else work.op)]
        name = f"gemm_{family(dtype_of(op.name))}" if name == "gemm" else name
        return (*_both(partial(_of_class, name, op.name, known=False), profile, captured_on), card)
    if source == "estimate":
        piece = "" if work is None else _piece(work)
        return (Part(Source(f"kernels without a formula on {profile.full_name}", TRACE), ESTIMATE, piece), card)
    return (
        *_both(partial(_of_class, op_class(work), "" if work is None else _piece(work)), profile, captured_on),
        card,
    )


def _both(part_on: Callable[[DeviceProfile], Part], profile: DeviceProfile, captured_on: str) -> Kind:
    """The model's error on a device; of a kernel measured on another its error there too, the other way round, because
    the model's ratio of both was taken."""
    here = part_on(profile)
    if not captured_on or find_device(captured_on).name == profile.name:
        return (here,)
    there = part_on(find_device(captured_on))
    turned = Interval(1 / there.interval.p90, 1 / there.interval.p10, there.interval.common)
    return (here, there._replace(interval=turned))


def _of_class(name: str, piece: str, profile: DeviceProfile, *, known: bool = True) -> Part:
    """The spread of a class of kernels: the device's own where it was measured itself, and where the kernel is
    ``known`` to be one of those that were."""
    abilities = abilities_of(profile)
    if profile.kind != "gpu" and name in UNMEASURED:
        low, high, own, common = *UNKNOWN, False, 1.0
    elif name in UNMEASURED:
        like, wider = UNMEASURED[name]
        widest = abilities.spreads[like].fit
        low, high, own, common = widest.borrowed_p10**wider, widest.borrowed_p90**wider, False, 1.0
    elif not known:
        fit, own = abilities.spreads[name].fit, False
        low, high, common = fit.borrowed_p10, fit.borrowed_p90, COMMON[name][1]
    else:
        low, high, own = abilities.interval(name)
        common = COMMON[name][not own]
    # Where shapes of the device itself were left out of a fit, measuring more of them would change little.
    judged = own and abilities.spreads[name].own
    source = Source(f"{NAMES[name]} on {profile.full_name}", TRACE if judged else CALIBRATE)
    return Part(source, Interval(low, high, common), piece)


def _piece(work: Work) -> str:
    return f"{work.op} {work.inputs} {work.outputs} {work.scalars}"


PRODUCTS = frozenset(("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "addmv", "mv", "dot", "addbmm"))
# The first class of which a word is in the op's name.
CLASSES = (
    ("convolution", ("conv",)),
    ("attention", ("attention",)),
    ("softmax", ("softmax",)),
    ("layer_norm", ("layer_norm", "rms_norm")),
)


@lru_cache(maxsize=8192)
def op_class(work: Work | None) -> str:
    """The class of kernels whose held-out errors an op shares; copies and memsets are elementwise.

    The microbenchmarks hold elementwise ops on dense tensors, and softmax and layer norm forward: what walks its
    tensors element by element, reduces, picks, draws numbers or goes backward was not among them.
    """
    op = "" if work is None else work.op.removeprefix("aten::").removesuffix("_")
    if work is None:
        return "elementwise"
    if op in PRODUCTS or op.endswith("attention_math"):
        return f"gemm_{family(next((t.dtype for t in work.inputs if t.dtype), 'float32'))}"
    found = next((name for name, words in CLASSES if any(word in op for word in words)), "")
    if found:
        return "other" if found in ("softmax", "layer_norm") and "backward" in op else found
    if op not in POINTWISE:
        return "other"
    return "strided" if is_walked(work) else "elementwise"
