"""Collectives: which kernels communicate, what they moved, and which of one rank meets which of the others.

New traces say it with the kernel or with its record_param_comms op (collective, elements, process group); old ones
give the name of the annotation around the launch (``nccl:all_reduce``) with the input's shape, and the kernel's.
Across ranks the collectives of a process group meet by sequence number, or by their place in the step.

Bytes are counted as nccl-tests counts them: the whole tensor.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from dataclasses import replace

import msgspec

from sim.ops import DTYPE_BYTES, CollectiveKind
from sim.workload.kineto import Args, DeviceEvent, HostEvent, KinetoTrace
from sim.workload.link.meeting import WORLD, Meeting
from sim.workload.link.nodes import Node, RankLines
from sim.workload.link.works import DTYPES, SCALAR_TYPES

COMM_KERNEL = re.compile(r"^(void )?(nccl|rccl|oneccl|msccl)", re.IGNORECASE)
COMM_OP = re.compile(r"^(record_param_comms|(nccl|rccl|gloo|xccl|ucc|mpi):.*)$")

# In the order they are looked for in a name without its punctuation: the longer names first.
_KINDS: tuple[tuple[str, CollectiveKind], ...] = (
    ("allreduce", "all_reduce"), ("reducescatter", "reduce_scatter"), ("allgather", "all_gather"),
    ("alltoall", "all_to_all"), ("broadcast", "broadcast"), ("barrier", "barrier"), ("reduce", "reduce"),
    ("gather", "all_gather"), ("scatter", "broadcast"),
)  # fmt: skip


def find_collectives(lines: RankLines) -> list[Node]:
    """Turn the kernels that communicate into collectives; returned in order of launch."""
    ops = _CommOps(lines.trace)
    counts: defaultdict[str, int] = defaultdict(int)
    found: list[Node] = []
    kernels = [
        n for s in lines.streams.values() for n in s.by_launch if n.kind == "kernel" and COMM_KERNEL.match(n.name)
    ]
    for node in sorted(kernels, key=lambda n: (n.launch.start if n.launch is not None else n.start, n.start)):
        meeting = _meeting(node, ops.around(node), lines)
        if meeting is None:
            lines.counts["point-to-point kernels whose other rank the trace does not name: kept as kernels"] += 1
            continue
        node.kind = "collective"
        node.detail = replace(meeting, seq=counts[meeting.group])
        counts[meeting.group] += 1
        found.append(node)
    return found


class _CommOps:
    """The ops that record collectives, by thread and time."""

    def __init__(self, trace: KinetoTrace) -> None:
        self.by_thread: defaultdict[int, list[HostEvent]] = defaultdict(list)
        for event in trace.host:
            if COMM_OP.match(event.name):
                self.by_thread[event.thread].append(event)

    def around(self, node: Node) -> list[HostEvent]:
        """Those that were open when the kernel was launched, outermost first."""
        if node.launch is None:
            return []
        time = node.launch.start
        events = self.by_thread[node.launch.lane]
        place = bisect_right(events, time, key=lambda e: e.start_ns)
        return [e for e in events[max(0, place - 8) : place] if e.end_ns >= time]


def _meeting(node: Node, around: list[HostEvent], lines: RankLines) -> Meeting | None:
    event = node.detail
    assert isinstance(event, DeviceEvent)
    args = next((a for a in (event.args, *(o.args for o in around)) if a.collective), event.args)
    titles = [args.collective or "", *(o.name for o in reversed(around)), event.name]
    members = _members(args, lines)
    group = str(args.group_name) if args.group_name is not None else WORLD
    kind = next((k for k in map(kind_of, titles) if k is not None), None)
    point_to_point = _point_to_point(args, titles, lines.rank)
    if point_to_point is not None:
        kind, peer = point_to_point
        pair = (min(peer, lines.rank), max(peer, lines.rank))
        size, dtype = size_of(kind, args, around, 2)
        return Meeting(kind, size, dtype, f"{group}:{pair[0]}-{pair[1]}", 0, pair, peer)
    if kind is None:
        return None
    size, dtype = size_of(kind, args, around, len(members))
    return Meeting(kind, size, dtype, group, 0, members, None, args.sequence)


def kind_of(title: str) -> CollectiveKind | None:
    """The kind that a title names, or None."""
    plain = re.sub(r"[^a-z]", "", title.lower())
    return next((kind for name, kind in _KINDS if name in plain), None)


def _point_to_point(args: Args, titles: list[str], rank: int) -> tuple[CollectiveKind, int] | None:
    """``send`` or ``recv`` with the other rank: from the arguments, or from a title such as ``nccl:send 0->1``."""
    title = next((t for t in titles if re.search(r"(^|:)(send|recv)\b", t)), None)
    if title is None:
        return None
    arrow = re.search(r"(\d+)->(\d+)|(\d+)<-(\d+)", title)
    if arrow:
        source, target = (arrow[1], arrow[2]) if arrow[1] else (arrow[4], arrow[3])
        ends = int(source), int(target)
    elif args.source_rank is not None and args.target_rank is not None:
        ends = args.source_rank, args.target_rank
    else:
        return None
    if rank not in ends or ends[0] == ends[1] or min(ends) < 0:
        return None
    return ("send", ends[1]) if rank == ends[0] else ("recv", ends[0])


def _members(args: Args, lines: RankLines) -> tuple[int, ...]:
    trace = lines.trace
    ranks: object = args.group_ranks
    if isinstance(ranks, str):
        try:
            ranks = msgspec.json.decode(ranks)
        except msgspec.DecodeError:
            ranks = None
    if isinstance(ranks, list) and ranks and all(isinstance(r, int) and r >= 0 for r in ranks):
        return tuple(sorted(set(ranks)))
    if args.group_name is not None and str(args.group_name) in trace.groups:
        return tuple(sorted(set(trace.groups[str(args.group_name)])))
    size = args.group_size or trace.world_size
    return tuple(range(size)) if size and size > lines.rank else (lines.rank,)


def size_of(kind: CollectiveKind, args: Args, around: list[HostEvent], ranks: int) -> tuple[int, str]:
    """Bytes of the whole tensor, and its dtype."""
    if args.in_elements is not None or args.out_elements is not None:
        dtype = SCALAR_TYPES.get(args.dtype or "", "")
        elements = max(args.in_elements or 0, args.out_elements or 0)
        return elements * DTYPE_BYTES.get(dtype, 4), dtype
    for op in reversed(around):
        elements, dtype = _input_elements(op.args)
        if elements:
            return elements * DTYPE_BYTES[dtype] * (ranks if kind == "all_gather" else 1), dtype
    return 0, ""


def _input_elements(args: Args) -> tuple[int, str]:
    """Elements of an op's tensor inputs; an op over a list of tensors has a list of shapes."""
    try:
        shapes, types = msgspec.json.decode(args.dims), msgspec.json.decode(args.types)
    except msgspec.DecodeError:
        return 0, ""
    if not isinstance(shapes, list) or not isinstance(types, list):
        return 0, ""
    total, found = 0, ""
    for shape, written in zip(shapes, types, strict=False):
        dtype = DTYPES.get(written, "") if isinstance(written, str) else ""
        if dtype and isinstance(shape, list) and all(isinstance(n, int) and n >= 0 for n in shape):
            count = 1
            for n in shape:
                count *= n
            total, found = total + count, dtype
    return total, found
