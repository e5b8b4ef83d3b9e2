"""Placing a graph on a machine: a GPU for each rank, and every operation's duration there alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from sim.errors import UserError
from sim.graph import OpGraph, Program
from sim.ops import Collective, Copy, DeviceOp, HostCall, Kernel, Lane, Op
from sim.place.borrowed import Borrowed
from sim.place.captured import AS_CAPTURED, CPU
from sim.place.collectives import CollectivePlan, plan
from sim.place.doubt import doubts_of, of_collective
from sim.place.host import host_us
from sim.place.kernels import KernelCost, floor_us, kernel_cost, memory_cost
from sim.place.named import Unexplained
from sim.place.outside import CUDA_CONTEXT_BYTES, nccl_bytes
from sim.place.placement import CollectiveDoubt, Costs, Flow, Held, PlacedRank, Placement, share_of
from sim.place.power import power_of
from sim.place.sharing import held_by, losses
from sim.place.synchronous import computed_in_calls
from sim.place.transpose import rescaled
from sim.timeline import CollectiveInfo, DurationSource
from sim.topology.machine import Gpu, Machine
from sim.units import ns_from_us, transfer_ns

Timed = tuple[int, DurationSource]
# What goes to cuBLAS, which takes a workspace from the caching allocator at its first call on a stream
# (aten/src/ATen/cuda/CublasHandlePool.cpp, PyTorch 2.13).
CUBLAS_OPS = frozenset(
    f"aten::{op}{inplace}" for op in ("mm", "addmm", "bmm", "baddbmm", "addmv", "dot") for inplace in ("", "_")
)
# Calls that a synthesized program makes besides its ops; they launch nothing.
SYNC_CALLS = ("cudaDeviceSynchronize", "cudaStreamSynchronize")


def place_on_machine(graph: OpGraph, machine: Machine, gpus: Sequence[int] = (), strict: bool = False) -> Placement:
    """See :func:`sim.place.place.place`."""
    chosen = _chosen(graph, machine, gpus or graph.gpus)
    warnings = _of_the_cpu(graph, chosen)
    if all(gpu.profile.kind == "cpu" for gpu in chosen):
        graph = computed_in_calls(graph)
    of_rank = {r.rank: gpu for r, gpu in zip(graph.ranks, chosen, strict=True)}
    placer = _Placer(graph, machine, of_rank)
    ranks = tuple(
        PlacedRank(
            rank=r.rank,
            device=gpu.name,
            device_name=gpu.profile.full_name,
            program=r.program,
            costs=placer.costs(r.rank, r.program, r.device, gpu),
            memory_bytes=gpu.profile.memory_bytes,
            compute_capability=gpu.profile.compute_capability or "",
            outside=placer.outside(r.rank, r.program, gpu),
        )
        for r, gpu in zip(graph.ranks, chosen, strict=True)
    )
    if strict:
        placer.refuse_unexplained()
    placement = Placement(graph, machine.name, ranks, (*placer.warnings(), *warnings))
    return msgspec.structs.replace(
        placement, doubts=doubts_of(placement, machine.gpus), power=power_of(graph, ranks, machine.gpus)
    )


def _chosen(graph: OpGraph, machine: Machine, wanted: Sequence[int]) -> tuple[Gpu, ...]:
    count = len(graph.ranks)
    indices = tuple(wanted) or tuple(range(count))
    there = len(machine.gpus)
    if len(indices) == count > there:
        gpus = "1 GPU" if there == 1 else f"{there} GPUs"
        raise UserError(f"{graph.name} has {count} ranks, {machine.name} only {gpus}; choose a larger --topology")
    for index in indices:
        if not 0 <= index < there:
            raise UserError(
                f"{machine.name} has no GPU {index}, its GPUs are 0 to {there - 1}; choose others with --gpus, or a "
                f"larger --topology"
            )
    if len(set(indices)) != len(indices):
        raise UserError(f"--gpus {','.join(map(str, indices))}: a GPU is named twice")
    if len(indices) != count:
        raise UserError(f"--gpus names {len(indices)} GPUs for the {count} ranks of {graph.name}")
    return tuple(machine.gpus[i] for i in indices)


def _of_the_cpu(graph: OpGraph, gpus: Sequence[Gpu]) -> tuple[str, ...]:
    """Ops of a CPU are calls of a thread, and nothing says what a GPU would make of them: UserError for a GPU."""
    on_cpu = [gpu for r, gpu in zip(graph.ranks, gpus, strict=True) if r.device == CPU]
    for gpu in on_cpu:
        if gpu.profile.kind == "gpu":
            raise UserError(
                f"{graph.name}: ran on a CPU, so it does not tell what {gpu.profile.full_name} would do; replay it "
                f"with --topology {AS_CAPTURED}, or make the model's workload with `tracesim synth`"
            )
    return ("ops ran on a CPU and keep their measured durations: only collectives are computed anew",) if on_cpu else ()


class _Placer:
    """Costs of programs on devices, computed once for ranks that are alike."""

    def __init__(self, graph: OpGraph, machine: Machine, of_rank: dict[int, Gpu]) -> None:
        self._graph = graph
        self._machine = machine
        self._of_rank = of_rank
        self._costs: dict[tuple[object, ...], Costs] = {}
        self._alone_of: dict[tuple[int, str, str], Costs] = {}
        self._transfers: dict[int, dict[int, Collective | Copy]] = {}
        self._groups: dict[tuple[str, int], tuple[int, ...]] = {}
        self._lost: dict[tuple[int, str, int], dict[int, int]] = {}
        self._plans: dict[tuple[str, int, tuple[int, ...]], CollectivePlan] = {}
        self._kernels: dict[tuple[int, str], KernelCost] = {}
        self._unexplained = Unexplained()
        self._borrowed = Borrowed()
        self._notes: list[str] = list(machine.remarks)

    def warnings(self) -> tuple[str, ...]:
        """What a reader of the numbers must know: of the machine, of its collectives, and what was estimated."""
        return (*self._notes, *self._borrowed.told(), *self._unexplained.told())

    def refuse_unexplained(self) -> None:
        """UserError with every kernel that no formula explains, and how often there is one."""
        told = self._unexplained.told(everything=True)
        if told:
            raise UserError(
                f"{self._graph.name}: --strict: {'; '.join(told)}. Without --strict they are estimated like that"
            )

    def costs(self, rank: int, program: int, captured_on: str, gpu: Gpu) -> Costs:
        """Ranks that are alike share one object; those that run a program on one kind of GPU all but its transfers."""
        transfers = self._transfers_of(program)
        groups = {op.group for op in transfers.values() if isinstance(op, Collective)}
        members = tuple((g, tuple(self._group_gpus(g, rank))) for g in sorted(groups))
        way = gpu.name if any(isinstance(op, Copy) for op in transfers.values()) else ""
        key = (program, captured_on, gpu.profile.name, way, members)
        if key not in self._costs:
            alone = self._alone_costs(program, captured_on, gpu)
            self._costs[key] = self._with_transfers(alone, rank, program, gpu)
        return self._costs[key]

    def _transfers_of(self, program: int) -> dict[int, Collective | Copy]:
        """The operations that cross links, by their place in the program."""
        if program not in self._transfers:
            ops = self._graph.programs[program].ops
            self._transfers[program] = {
                i: op
                for i, op in enumerate(ops)
                if isinstance(op, Collective) or (isinstance(op, Copy) and op.kind in ("h2d", "d2h"))
            }
        return self._transfers[program]

    def outside(self, rank: int, program: int, gpu: Gpu) -> dict[str, int]:
        """The memory of a GPU that is gone before PyTorch's allocator asks for any."""
        if gpu.profile.kind != "gpu":
            return {}
        channels: dict[str, int] = {}
        for op in self._transfers_of(program).values():
            if isinstance(op, Collective) and op.group not in channels:
                channels[op.group] = self._planned(op, rank).channels
        buffers = {f"NCCL buffers of group {group}": nccl_bytes(count) for group, count in channels.items() if count}
        return {"CUDA context": CUDA_CONTEXT_BYTES, **buffers}

    def _group_gpus(self, group: str, rank: int) -> tuple[int, ...]:
        if (group, rank) not in self._groups:
            self._groups[group, rank] = self._find_group_gpus(group, rank)
        return self._groups[group, rank]

    def _find_group_gpus(self, group: str, rank: int) -> tuple[int, ...]:
        members = self._graph.group_of(group, rank)
        absent = [r for r in members if r not in self._of_rank]
        free = [gpu for gpu in self._machine.gpus if gpu not in self._of_rank.values()] if absent else []
        if len(absent) > len(free):
            raise UserError(
                f"{self._graph.name}: process group {group!r} has {len(members)} ranks, more than the "
                f"{len(self._machine.gpus)} GPUs of {self._machine.name}; choose a larger --topology"
            )
        # Ranks whose traces are not there take part in collectives from the GPUs that are left.
        for r, gpu in zip(absent, free, strict=False):
            self._of_rank[r] = gpu
        return tuple(self._of_rank[r].index for r in members)

    def _alone_costs(self, number: int, captured_on: str, gpu: Gpu) -> Costs:
        """A program on a kind of GPU, but for its transfers: those depend on where the rank is."""
        key = (number, captured_on, gpu.profile.name)
        if key not in self._alone_of:
            program, transfers = self._graph.programs[number], self._transfers_of(number)
            launching = frozenset(op.launch for op in program.ops if isinstance(op, DeviceOp) and op.launch is not None)
            nothing: Timed = (0, "measured")
            timed = [
                nothing if i in transfers else self._alone(op, program.lanes[op.lane], i in launching, captured_on, gpu)
                for i, op in enumerate(program.ops)
            ]
            durations = tuple(ns for ns, _ in timed)
            self._alone_of[key] = Costs(
                duration_ns=durations,
                lag_ns=tuple(self._lag(op, durations, gpu) for op in program.ops),
                gap_ns=tuple(self._gap(op, gpu) for op in program.ops),
                source=tuple(source for _, source in timed),
                collectives={},
                workspaces=self._workspaces(program),
                bounds=self._bounds(program, gpu),
            )
        return self._alone_of[key]

    def _with_transfers(self, alone: Costs, rank: int, number: int, gpu: Gpu) -> Costs:
        program = self._graph.programs[number]
        durations, sources = list(alone.duration_ns), list(alone.source)
        collectives: dict[int, CollectiveInfo] = {}
        flows: dict[int, Flow] = {}
        held: dict[int, Held] = {}
        doubts: dict[int, CollectiveDoubt] = {}
        for i, op in self._transfers_of(number).items():
            if isinstance(op, Copy):
                flows[i], sources[i] = self._host_copy(op, gpu), "roofline"
                durations[i] = flows[i].latency_ns + flows[i].transfer_ns
                continue
            planned = self._planned(op, rank)
            durations[i], sources[i] = planned.ns, planned.source
            doubts[i] = of_collective(planned)
            flows[i] = self._flow(planned.latency_ns, planned.transfer_ns, planned.loads)
            taken = held_by(planned, self._machine, gpu, self._group_gpus(op.group, rank))
            if taken is not None and program.lanes[op.lane].kind == "stream":
                held[i] = taken
            collectives[i] = CollectiveInfo(
                op.kind, op.bytes, planned.ranks, planned.algorithm, planned.protocol, op.group, op.seq
            )
        parts = {taken.sms_ppm for taken in held.values()}
        return msgspec.structs.replace(
            alone,
            duration_ns=tuple(durations),
            source=tuple(sources),
            collectives=collectives,
            flows=flows,
            held=held,
            bounds=alone.bounds if held else {},
            losses={ppm: self._losses(number, gpu, alone.bounds, ppm) for ppm in sorted(parts)},
            doubts=doubts,
        )

    def _losses(self, number: int, gpu: Gpu, bounds: dict[int, str], sms_ppm: int) -> dict[int, int]:
        """Of kernels that compute bounds and whose cost was computed: what they lose while SMs are held."""
        key = (number, gpu.profile.name, sms_ppm)
        if key not in self._lost:
            works = {
                i: op.work
                for i, op in enumerate(self._graph.programs[number].ops)
                if isinstance(op, Kernel) and op.measured_ns is None and op.work is not None and i not in bounds
            }
            distinct = sorted(set(works.values()))
            lost = dict(
                zip(distinct, losses([self._graph.works[w] for w in distinct], gpu.profile, sms_ppm), strict=True)
            )
            self._lost[key] = {i: lost[work] for i, work in works.items()}
        return self._lost[key]

    def _bounds(self, program: Program, gpu: Gpu) -> dict[int, str]:
        """Of kernels whose cost was computed; of a measured one nothing is known, and compute is taken to bound it."""
        known = {
            i: self._kernels[op.work, gpu.profile.name].bound
            for i, op in enumerate(program.ops)
            if isinstance(op, Kernel) and op.measured_ns is None and op.work is not None
        }
        return {i: bound for i, bound in known.items() if bound != "compute"}

    def _workspaces(self, program: Program) -> dict[int, int]:
        """Of synthesized programs only: a trace has its workspaces among its own allocations."""
        first: dict[int, int] = {}
        for op in program.ops:
            if isinstance(op, Kernel) and op.measured_ns is None and op.launch is not None and op.name in CUBLAS_OPS:
                first.setdefault(op.lane, op.launch)
        return {launch: lane for lane, launch in first.items()}

    def _alone(self, op: Op, lane: Lane, launches: bool, captured_on: str, gpu: Gpu) -> Timed:
        if isinstance(op, HostCall):
            return self._host(op, lane, launches)
        if isinstance(op, Kernel | Copy) and op.measured_ns is not None:
            return rescaled(op, self._graph, captured_on, gpu.profile, self._unexplained)
        if isinstance(op, Kernel):
            return self._kernel(op, gpu)
        if isinstance(op, Copy):
            return self._copy(op, gpu)
        return 0, "measured"

    def _host(self, op: HostCall, thread: Lane, launches: bool) -> Timed:
        if op.measured_ns is not None:
            return op.measured_ns, "measured"
        if op.name in SYNC_CALLS:
            return 0, "profile"
        return ns_from_us(host_us(self._machine.host, op, thread, launches)), "profile"

    def _kernel(self, op: Kernel, gpu: Gpu) -> Timed:
        if op.work is None:
            raise UserError(f"{self._graph.name}: kernel {op.name} has neither a measured duration nor a work")
        key = (op.work, gpu.profile.name)
        if key not in self._kernels:
            self._kernels[key] = kernel_cost(self._graph.works[op.work], gpu.profile)
        cost = self._kernels[key]
        if cost.source == "estimate":
            self._unexplained.add("have no cost formula or no shapes, estimated by bytes", op.name)
        else:
            self._borrowed.add(gpu.profile, cost.lender, self._graph.works[op.work])
        return cost.ns, cost.source

    def _copy(self, op: Copy, gpu: Gpu) -> Timed:
        """On the device: a memset writes, a copy reads and writes."""
        cost = memory_cost(op.bytes if op.kind == "memset" else 2 * op.bytes, gpu.profile)
        return cost.ns, cost.source

    def _host_copy(self, op: Copy, gpu: Gpu) -> Flow:
        """Between host memory and the device, over the links between them."""
        machine = self._machine
        route = machine.host_to_device(gpu.name) if op.kind == "h2d" else machine.device_to_host(gpu.name)
        latency = ns_from_us(route.latency_us + floor_us(gpu.profile))
        transfer = transfer_ns(op.bytes, route.bandwidth_gb_s)
        return self._flow(latency, transfer, [(lane, op.bytes) for lane in route.lanes])

    def _flow(self, latency_ns: int, transfer: int, loads: Iterable[tuple[str, int]]) -> Flow:
        """Each lane's part of its time: the lane that needs longest for its bytes is the one that bounds the flow."""
        times = {lane: nbytes / self._machine.capacities[lane] for lane, nbytes in loads if nbytes}
        longest = max(times.values(), default=1.0)
        shares = sorted((lane, share_of(time / longest)) for lane, time in times.items())
        return Flow(latency_ns, transfer, tuple(shares))

    def _planned(self, op: Collective, rank: int) -> CollectivePlan:
        key = (op.kind, op.bytes, self._group_gpus(op.group, rank))
        if key not in self._plans:
            self._plans[key] = planned = plan(self._machine, *key)
            if planned.note and planned.note not in self._notes:
                self._notes.append(planned.note)
        return self._plans[key]

    def _lag(self, op: Op, durations: Sequence[int], gpu: Gpu) -> int:
        """From the beginning of the launching call to the earliest start: a synthesized op launches at its end."""
        if not isinstance(op, DeviceOp):
            return 0
        if op.lag_ns is not None:
            return op.lag_ns
        launch = gpu.profile.launch
        latency = 0.0 if launch is None or launch.launch_latency_us is None else launch.launch_latency_us
        return (durations[op.launch] if op.launch is not None else 0) + ns_from_us(latency)

    def _gap(self, op: Op, gpu: Gpu) -> int:
        if not isinstance(op, DeviceOp):
            return 0
        if op.gap_ns is not None:
            return op.gap_ns
        launch = gpu.profile.launch
        return 0 if launch is None or launch.kernel_gap_us is None else ns_from_us(launch.kernel_gap_us)
