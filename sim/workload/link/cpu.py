"""Runs whose device is the CPU: ops are work of the host threads, and gloo's threads carry the collectives.

Only traces that say so themselves are read this way (``"tracesim_device": "cpu"``, which ``tracesim trace`` writes).
An op that is part of another (``aten::addmm`` in ``aten::linear``) is not told apart; what autograd's own wrappers
add is the thread's time between ops.

A collective is started by a ``c10d::`` op and runs on one of gloo's threads (``gloo:all_reduce``), which take it
in turn.  Nothing records who waits for it; a thread that started collectives waited for those that ended

* while it was silent, or before its next op where it had none since it started them: it went on after them;
* before its optimizer stepped: gradients are whole then.

Source: torch/csrc/distributed/c10d/ProcessGroupGloo.cpp of github.com/pytorch/pytorch (a queue of works, taken by
threads named pt_gloo_runloop; each records ``gloo:KIND`` with the shape of its input, and no process group).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator

import msgspec

from sim.workload.kineto import HostEvent
from sim.workload.link.collectives import kind_of, size_of
from sim.workload.link.handoff import SILENCE_NS, silences
from sim.workload.link.host import union
from sim.workload.link.meeting import WORLD, Meeting
from sim.workload.link.nodes import Node, RankLines, ThreadLine

# Wrappers around the ops of a backward pass; the ops inside are the work.
_WRAPPERS = ("autograd::", "torch::autograd::")
_BACKENDS = ("gloo:", "mpi:", "ucc:")
_STARTS = "c10d::"
_OPTIMIZER = "Optimizer.step#"
_GROUPLESS = "collectives between CPUs, which do not tell their process group: taken to be of all ranks"


def add_ops(lines: RankLines) -> list[Node]:
    """Put ops into the threads' lines as calls with work, and collectives; returns these as the program starts them."""
    ops: defaultdict[int, list[Node]] = defaultdict(list)
    collectives: list[Node] = []
    starters: list[tuple[HostEvent, Node]] = []
    for event in lines.trace.host:
        if event.name.startswith(_BACKENDS):
            collectives.extend(_collective(event, lines))
        elif event.annotation or event.name.startswith(_WRAPPERS):
            continue
        else:
            own = ops[event.thread]
            if not own or event.start_ns >= own[-1].end:
                own.append(_call(event))
            if event.name.startswith(_STARTS) and kind_of(event.name) is not None:
                starters.append((event, own[-1]))
    collectives = _started(collectives, starters, lines)
    _end_before_optimizer(lines, collectives)
    for line in lines.threads:
        own = [node for node in collectives if node.lane == line.lane]
        line.told = bool(own)
        around = [node for collective in own for node in _around(collective)]
        line.nodes = sorted([*line.nodes, *ops[line.lane], *around], key=lambda n: (n.start, n.end))
        line.busy = union(line.busy, [(node.start, node.end) for node in own])
    return collectives


def _call(event: HostEvent) -> Node:
    call = Node("call", event.thread, event.name, event.start_ns, event.end_ns)
    call.op = event
    if not event.name.startswith(_STARTS):
        call.work = event
    return call


def _collective(event: HostEvent, lines: RankLines) -> Iterator[Node]:
    kind = kind_of(event.name)
    if kind is None:
        lines.counts["point-to-point transfers between CPUs: left out"] += 1
        return
    ranks = max(lines.trace.world_size or 1, 1)
    node = Node("collective", event.thread, event.name, event.start_ns, event.end_ns)
    node.op = event
    size, dtype = size_of(kind, event.args, [event], ranks)
    node.detail = Meeting(kind, size, dtype, WORLD, 0, tuple(range(ranks)))
    yield node


def _started(collectives: list[Node], starters: list[tuple[HostEvent, Node]], lines: RankLines) -> list[Node]:
    """Fill ``launch`` with the op that started each collective: the first of its kind and size that had not yet
    started one, or else of its kind.  What ran before the first such op was started before the trace: left out."""
    if sum(len(members) > 1 for members in lines.trace.groups.values()) > 1:
        lines.counts[_GROUPLESS] += len(collectives)
    free = sorted(starters, key=lambda starter: starter[0].start_ns)
    first = free[0][0].start_ns if free else None
    found: list[tuple[int, Node]] = []
    for collective in sorted(collectives, key=lambda node: node.start):
        fitting = [s for s in free if s[0].start_ns <= collective.start and _starts(s[0], collective)]
        if fitting:
            size = max(_sizes(collective.op), default=0)
            starter = next((s for s in fitting if size in _sizes(s[0])), fitting[0])
            free.remove(starter)
            found.append((starter[0].start_ns, collective))
            _hand_over(starter[1], collective)
        elif first is None or collective.start >= first:
            found.append((collective.start, collective))
        else:
            lines.counts["collectives that were started before the trace began: left out"] += 1
    return [collective for _, collective in sorted(found, key=lambda pair: pair[0])]


def _starts(op: HostEvent, collective: Node) -> bool:
    """gloo makes a reduce_scatter of an all_reduce, of which each rank keeps its part."""
    meeting = collective.detail
    assert isinstance(meeting, Meeting)
    kind = kind_of(op.name)
    return kind == meeting.kind or (kind, meeting.kind) == ("reduce_scatter", "all_reduce")


def _hand_over(call: Node, collective: Node) -> None:
    """The collective runs while its op may still be returning: for the order, the op ends where it begins."""
    collective.launch = call
    call.end = max(call.start, min(call.end, collective.start))
    call.own = call.end - call.start


def _sizes(event: HostEvent | None) -> list[int]:
    """Elements of each input that is a tensor or a list of tensors."""
    try:
        shapes = msgspec.json.decode(event.args.dims) if event is not None else []
    except msgspec.DecodeError:
        return []
    return [_count(shape) for shape in shapes if shape] if isinstance(shapes, list) else []


def _count(shape: object) -> int:
    if not isinstance(shape, list):
        return 0
    if any(isinstance(part, list) for part in shape):
        return sum(_count(part) for part in shape)
    count = 1
    for size in shape:
        count *= size if isinstance(size, int) else 0
    return count


def _end_before_optimizer(lines: RankLines, collectives: list[Node]) -> None:
    """Where gloo's thread was held up between telling that a collective is done and recording its end.

    Whoever started it has gone on then: it was done when that thread last went on before its optimizer stepped.
    """
    stepped = _optimizer_steps(lines)
    silent = {lane: silences(lines.threads[lane], lines.origin) for lane in stepped}
    for collective in collectives:
        launch = collective.launch
        if launch is None or launch.lane not in stepped:
            continue
        place = bisect_right(stepped[launch.lane], launch.start)
        if place == len(stepped[launch.lane]) or stepped[launch.lane][place] >= collective.end:
            continue
        begun = stepped[launch.lane][place]
        went_on = (end for begin, end in reversed(silent[launch.lane]) if begin >= launch.start and end <= begun)
        collective.end = max(collective.start, next(went_on, begun))
        collective.own = collective.end - collective.start


def _optimizer_steps(lines: RankLines) -> dict[int, list[int]]:
    """When optimizers began to step, by thread."""
    begun: defaultdict[int, list[int]] = defaultdict(list)
    for event in lines.trace.host:
        if event.annotation and event.name.startswith(_OPTIMIZER):
            begun[event.thread].append(event.start_ns)
    return dict(begun)


def _around(collective: Node) -> list[Node]:
    """What gloo's thread does around a collective: from the moment it is told to, and until it returns."""
    arrival = Node("call", collective.lane, collective.name, collective.start, collective.start)
    arrival.after = [collective.launch] if collective.launch is not None else []
    collective.tail = Node("call", collective.lane, collective.name, collective.end, collective.end)
    return [arrival, collective, collective.tail]


# Who waits ----------------------------------------


def find_waits(lines: RankLines) -> None:
    """Fill ``after`` of the operations that waited for collectives; call when the collectives' ends are settled."""
    started: defaultdict[int, list[Node]] = defaultdict(list)
    for line in lines.threads:
        for node in line.nodes:
            if node.kind == "collective" and node.launch is not None:
                started[node.launch.lane].append(node)
    stepped = _optimizer_steps(lines)
    for lane, collectives in started.items():
        collectives.sort(key=_launched)
        _waited_silently(lines.threads[lane], collectives, lines.origin)
        _optimizer_waited(lines.threads[lane], collectives, stepped.get(lane, []))


def _launched(collective: Node) -> int:
    assert collective.launch is not None
    return collective.launch.start


def _returned(collective: Node) -> Node:
    assert collective.tail is not None
    return collective.tail


def _waited_silently(line: ThreadLine, collectives: list[Node], origin: int) -> None:
    silent = silences(line, origin)
    for collective in collectives:
        launch, tail = collective.launch, _returned(collective)
        assert launch is not None and launch.op is not None
        place = bisect_right(silent, tail.end, key=lambda silence: silence[0]) - 1
        node = line.first_from(max(tail.end, launch.op.end_ns))
        if node is None:
            continue
        in_silence = place >= 0 and tail.end <= silent[place][1]
        nothing_since = line.first_from(launch.op.end_ns) is node and node.start - launch.op.end_ns >= SILENCE_NS
        if in_silence or nothing_since:
            _wait(node, tail)


def _optimizer_waited(line: ThreadLine, collectives: list[Node], stepped: list[int]) -> None:
    done = 0
    for begun in stepped:
        node = line.first_from(begun)
        until = bisect_right(collectives, begun, key=_launched)
        for collective in collectives[done:until]:
            if node is not None and _returned(collective).end <= node.start:
                _wait(node, _returned(collective))
        done = max(done, until)


def _wait(node: Node, tail: Node) -> None:
    if tail not in node.after:
        node.after.append(tail)
