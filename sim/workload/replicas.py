"""A training step of one GPU on several: what DistributedDataParallel would have added to it.

A workload that was synthesized is synthesized anew with the plan, from a model or a script: exact, for it says what it
was made of.  A trace is
what it is, so the operations are put into it: behind every ``torch::autograd::AccumulateGrad`` (a gradient is ready:
the trace says when and, recorded with shapes, how large) the copy of the gradient into its bucket; behind the last of a
bucket its all-reduce on a stream of its own; behind the last of the step the waiting and the copies back.  Buckets are
those that :mod:`sim.workload.ddp` makes for a synthesized step.

Left out for a trace: the broadcast of buffers, that a gradient accumulated over several backward passes is reduced
once, and the reducer's own host time beyond its ops.
"""

from __future__ import annotations

import contextlib
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import msgspec

from sim.errors import InputError, UserError
from sim.graph import OpGraph, Program, RankProgram, read
from sim.ops import Alloc, Collective, DeviceOp, HostCall, Kernel, Lane, Mark, Op, TensorMeta, Work, renumbered
from sim.timeline import Timeline
from sim.workload.inputs import WORKLOAD_SUFFIX
from sim.workload.kineto import HostEvent, KinetoTrace, read_trace
from sim.workload.link import link_traces
from sim.workload.link.works import Works
from sim.workload.script.spec import ScriptSpec, spec_of_script
from sim.workload.spec import spec_of

READY = "torch::autograd::AccumulateGrad"
GROUP = "dp"
Tell = Callable[[str], None]


def read_replicated(paths: Sequence[Path], plan: str, tell: Tell = lambda doing: None) -> OpGraph:
    """One rank's workload or trace as a job of ``plan`` (``dp=8``; of a workload any plan that ``synth`` knows).

    UserError where the input has several ranks, says too little of its gradients, or the plan cannot be.
    """
    if len(paths) != 1 or paths[0].is_dir():
        raise UserError(f"--parallel {plan} makes several ranks of one: give one workload file or one trace")
    path = paths[0]
    if path.name.endswith(WORKLOAD_SUFFIX):
        return _synthesized_anew(path, plan, tell)
    axis, _, size = plan.partition("=")
    if axis != "dp" or not size.isdigit() or int(size) < 1:
        raise UserError(f"--parallel {plan!r}: a trace can be replicated over data-parallel ranks only, as in dp=8")
    tell(f"reading {path.name}")
    return _replicated(read_trace(path), int(size), tell)


def _synthesized_anew(path: Path, plan: str, tell: Tell) -> OpGraph:
    graph = read(path)
    if len(graph.ranks) > 1:
        raise InputError(path, f"has {len(graph.ranks)} ranks already; --parallel {plan} takes a workload of one")
    script = spec_of_script(graph)
    if script is not None:
        return _script_anew(msgspec.structs.replace(script, parallel=plan, ranks=None), tell)
    spec = spec_of(graph)
    if spec is None:
        raise InputError(path, f"does not say what it was made of; make it with `tracesim synth ... --parallel {plan}`")
    from sim.workload.synth import synthesize

    tell(f"building {spec.model} under {plan}")
    changed = msgspec.structs.replace(spec, parallel=plan)
    changed.check()
    return synthesize(changed)


def one_gpu(paths: Sequence[Path], plan: str, tell: Tell = lambda doing: None) -> tuple[OpGraph, int]:
    """The job of these inputs as one GPU would do it alone, and how many of its batches a step of the job does: the
    input itself where ``plan`` makes several ranks of it, else the step that the workload says it was made from.

    UserError where the input does not say what one GPU would do.
    """
    from sim.workload.inputs import read_inputs

    graph = read_inputs(paths, tell).graph
    if len(graph.ranks) == 1:
        return graph, _batches(plan)
    script = spec_of_script(graph)
    if script is not None:
        batches = _batches(script.parallel) if script.ranks is None else _batches_of_ranks(graph)
        alone = msgspec.structs.replace(script, parallel="", ranks=None if script.ranks is None else 1, hosts=1)
        return _script_anew(alone, tell), batches
    spec = spec_of(graph)
    if spec is None or not _is_plan(spec.parallel):
        raise InputError(paths[0], f"has {len(graph.ranks)} ranks and does not say what one GPU would do alone")
    from sim.workload.synth import synthesize

    tell(f"building {spec.model} for one GPU")
    return synthesize(spec.on_one_gpu()), _batches(spec.parallel)


def _batches(plan: str) -> int:
    """Replicas that have a batch each: the ranks along dp and fsdp."""
    from sim.workload.parallel import parse_plan

    return prod(size for axis, size in parse_plan(plan).axes if axis in ("dp", "fsdp"))


def _is_plan(text: str) -> bool:
    """A workload made by other means than ``synth`` may tell its plan in words of its own."""
    from sim.workload.parallel import parse_plan

    try:
        parse_plan(text)
    except UserError:
        return False
    return True


def _batches_of_ranks(graph: OpGraph) -> int:
    """Those of a job that a script made itself: a batch each, where all of its ranks do everything together."""
    found = {op.group for program in graph.programs for op in program.ops if isinstance(op, Collective)}
    parts = sorted(group for group in found if len(graph.groups[group]) > 1)
    if parts:
        raise UserError(
            f"{graph.name}: communicates in {', '.join(parts)}, of which each is a part of the ranks: these may share a"
            " batch, and what one GPU would do alone is not known; ask for another measure, as in speedup=1.1"
        )
    return len(graph.ranks)


def _script_anew(spec: ScriptSpec, tell: Tell) -> OpGraph:
    """The script runs again; what it prints is not a replay's output."""
    spec.check()
    from sim.workload.script.run import synthesize_script

    with contextlib.redirect_stdout(sys.stderr):
        return synthesize_script(spec, tell)


# A trace ------------------------------------------------------------------------------------------------------------


class Gradient(NamedTuple):
    """A gradient that is ready: when, on which thread of the trace, and what it is."""

    time: int
    thread: int
    tensor: TensorMeta


def _replicated(trace: KinetoTrace, ranks: int, tell: Tell) -> OpGraph:
    gradients = list(_gradients(trace))
    tell("linking launches, kernels and waits")
    linked = link_traces([trace])
    if any(isinstance(op, Collective) for op in linked.graph.programs[0].ops):
        raise InputError(trace.path, "has collectives already; --parallel takes the trace of a run on one GPU")
    program, works = _Reducer(linked.graph, linked.measured, gradients).run()
    rank = linked.graph.ranks[0]
    graph = msgspec.structs.replace(
        linked.graph,
        name=f"{linked.graph.name} dp={ranks}",
        programs=(program,),
        ranks=tuple(RankProgram(r, 0, rank.device) for r in range(ranks)),
        works=works,
        groups={GROUP: (tuple(range(ranks)),)},
        provenance={**linked.graph.provenance, "parallel": f"dp={ranks}"},
    )
    graph.check()
    return graph


def _gradients(trace: KinetoTrace) -> Iterator[Gradient]:
    """In the order in which they became ready, on the linked timeline's clock."""
    starts = [events[0].start_ns for events in (trace.host, trace.runtime) if events]
    starts += [min(event.start_ns for event in trace.device)] if trace.device else []
    origin, works = min(starts, default=0), Works()
    found = sorted((e for e in trace.host if e.name == READY), key=lambda e: e.end_ns)
    if not found:
        raise InputError(trace.path, f"no {READY} in it: not a training run, or recorded without CPU activities")
    for event in found:
        yield Gradient(event.end_ns - origin, event.thread, _tensor(trace, event, works))


def _tensor(trace: KinetoTrace, event: HostEvent, works: Works) -> TensorMeta:
    index = works.index(event)
    tensor = next((work.inputs[:1] for work, i in works.found.items() if i == index), ())
    if not tensor:
        raise InputError(trace.path, "its gradients have no shapes; record it with record_shapes=True")
    return tensor[0]


def bucket_of_each(tensors: Sequence[TensorMeta]) -> list[list[int]]:
    """Which gradients (by place) share a bucket, in the order of the buckets: PyTorch's own assignment."""
    import torch

    from sim.workload.ddp import bucket_limits

    metas = [torch.empty(t.shape, dtype=getattr(torch, t.dtype), device="meta") for t in tensors]
    groups, _ = torch.distributed._compute_bucket_assignment_by_size(
        metas, bucket_limits(None), [False] * len(metas), list(range(len(metas)))
    )
    return [list(group) for group in groups]


Make = Callable[[dict[object, int]], Op]


class _Put(NamedTuple):
    """A new operation behind an old one; ``make`` is given the new place of every operation that came before, old ones
    by their number, new ones by their key."""

    key: object
    make: Make


class _Reducer:
    """Puts the reducer's operations into a program, step by step."""

    def __init__(self, graph: OpGraph, measured: Timeline, gradients: Sequence[Gradient]) -> None:
        self._program = graph.programs[0]
        self._gradients = gradients
        self._works = {work: i for i, work in enumerate(graph.works)}
        self._behind: dict[int, list[_Put]] = {}
        self._steps = sorted((step.start_ns, step.end_ns) for step in measured.steps)
        self._calls = _calls(self._program, measured)
        self._launched = _launched(self._program)
        self._communication = len(self._program.lanes)
        self._seq = 0
        self._keys = 0

    def run(self) -> tuple[Program, tuple[Work, ...]]:
        sizes = [self._reduce(step) for step in self._by_step()]
        number = 1 + max(lane.id for lane in self._program.lanes)
        lanes = (*self._program.lanes, Lane("stream", number, "nccl"))
        memory = _bucket_memory(self._program, sizes[0] if sizes else [])
        return Program(lanes, _interleaved(self._program.ops, self._behind, memory)), tuple(self._works)

    def _by_step(self) -> list[list[Gradient]]:
        """The gradients of each step; those outside of all steps are not reduced: what surrounds them is missing."""
        if not self._steps:
            return [list(self._gradients)]
        found: list[list[Gradient]] = [[] for _ in self._steps]
        begins = [begin for begin, _ in self._steps]
        for gradient in self._gradients:
            i = bisect_right(begins, gradient.time) - 1
            if i >= 0 and gradient.time <= self._steps[i][1]:
                found[i].append(gradient)
        return [step for step in found if step]

    def _reduce(self, step: Sequence[Gradient]) -> list[int]:
        """One step's operations; the sizes of its buckets, which are reduced in their order, each when it is full."""
        buckets = bucket_of_each([gradient.tensor for gradient in step])
        bucket_of = {i: b for b, members in enumerate(buckets) for i in members}
        sizes = [sum(step[i].tensor.nbytes for i in members) for members in buckets]
        missing = [len(members) for members in buckets]
        reductions: list[object] = []
        for i, gradient in enumerate(step):
            call, stream = self._place(gradient)
            copied = self._kernel(call, gradient.thread, stream, "aten::mul", gradient.tensor)
            missing[bucket_of[i]] -= 1
            while len(reductions) < len(buckets) and not missing[len(reductions)]:
                size = sizes[len(reductions)]
                reductions.append(self._all_reduce(call, gradient.thread, stream, copied, size, gradient.tensor.dtype))
        call, stream = self._place(step[-1])
        for members, reduction in zip(buckets, reductions, strict=True):
            for i in members:
                self._kernel(call, step[-1].thread, stream, "aten::copy_", step[i].tensor, after=reduction)
        return sizes

    def _place(self, gradient: Gradient) -> tuple[int, int]:
        """The last call of the gradient's thread before it was ready, and the stream it had launched onto last."""
        times, calls = self._calls.get(gradient.thread, ([], []))
        place = bisect_right(times, gradient.time) - 1
        for call in reversed(calls[: place + 1]):
            if call in self._launched.stream_of:
                return calls[place], self._launched.stream_of[call]
        raise UserError(f"{READY} before its thread has launched anything: the trace begins in the middle of a step")

    # New operations ---------------------------------------------------------------------------------------------

    def _kernel(
        self, call: int, thread: int, stream: int, name: str, tensor: TensorMeta, after: object | None = None
    ) -> object:
        """An op over one gradient, launched behind ``call``; the key of its kernel."""
        inputs = (tensor, tensor) if name == "aten::copy_" else (tensor,)
        work = self._works.setdefault(Work(name, inputs, (tensor,)), len(self._works))
        launch = self._put(call, lambda at: HostCall(lane=thread, name=name))
        behind = self._launched.behind(stream, call)
        return self._put(
            behind,
            lambda at: Kernel(
                lane=stream, name=name, launch=at[launch], work=work, after=() if after is None else (at[after],)
            ),
        )

    def _all_reduce(self, call: int, thread: int, stream: int, copied: object, nbytes: int, dtype: str) -> object:
        launch = self._put(call, lambda at: HostCall(lane=thread, name="c10d::allreduce_"))
        seq, lane = self._seq, self._communication
        self._seq += 1
        return self._put(
            self._launched.behind(stream, call),
            lambda at: Collective(
                lane=lane, name="ncclDevKernel_AllReduce", launch=at[launch], after=(at[copied],), kind="all_reduce",
                bytes=nbytes, group=GROUP, seq=seq, dtype=dtype,
            ),
        )  # fmt: skip

    def _put(self, behind: int, make: Make) -> object:
        self._keys += 1
        key = ("new", self._keys)
        self._behind.setdefault(behind, []).append(_Put(key, make))
        return key


def _calls(program: Program, measured: Timeline) -> dict[int, tuple[list[int], list[int]]]:
    """Per thread when its calls were made, and which operations they are."""
    found: dict[int, tuple[list[int], list[int]]] = {}
    for span in measured.spans:
        if program.lanes[span.track].kind == "thread":
            times, ops = found.setdefault(span.track, ([], []))
            times.append(span.start_ns)
            ops.append(span.op)
    return found


class _Launched(NamedTuple):
    """Which stream each call launches onto; per stream, launches in order with the last operation up to each."""

    stream_of: dict[int, int]
    on: dict[int, tuple[list[int], list[int]]]

    def behind(self, stream: int, call: int) -> int:
        """The last operation of the stream that was launched no later than ``call``, or the call itself."""
        launches, ops = self.on[stream]
        place = bisect_right(launches, call) - 1
        return max(call, ops[place]) if place >= 0 else call


def _launched(program: Program) -> _Launched:
    stream_of: dict[int, int] = {}
    on: dict[int, tuple[list[int], list[int]]] = {}
    for i, op in enumerate(program.ops):
        if isinstance(op, DeviceOp) and op.launch is not None:
            stream_of[op.launch] = op.lane
            launches, ops = on.setdefault(op.lane, ([], []))
            # A stream runs in the order of its list, whatever thread launched: a launch counts from the latest before.
            launches.append(max(op.launch, launches[-1] if launches else 0))
            ops.append(i)
    return _Launched(stream_of, on)


def _bucket_memory(program: Program, sizes: Sequence[int]) -> list[Op]:
    """The buckets, there before the first step; only where the trace has memory events of its own."""
    blocks = [op.block for op in program.ops if isinstance(op, Alloc)]
    main = next((op.lane for op in program.ops if isinstance(op, Mark | Alloc)), 0)
    if not blocks:
        return []
    return [
        Alloc(lane=main, block=max(blocks) + 1 + i, bytes=size, category="communication", name="ddp_bucket")
        for i, size in enumerate(sizes)
    ]


def _interleaved(old: Sequence[Op], behind: dict[int, list[_Put]], first: Sequence[Op]) -> tuple[Op, ...]:
    """The old operations in their order, each followed by the new ones behind it; references follow."""
    ops: list[Op] = list(first)
    at: dict[object, int] = {}
    for i, op in enumerate(old):
        at[i] = len(ops)
        ops.append(renumbered(op, at))
        for put in behind.get(i, ()):
            at[put.key] = len(ops)
            ops.append(put.make(at))
    return tuple(ops)
