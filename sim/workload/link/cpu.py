"""Runs whose device is the CPU: ops are work of the host threads, and gloo's threads carry the collectives.

Only traces that say so themselves are read this way (``"tracesim_device": "cpu"``, which ``tracesim trace`` writes).
An op that is part of another (``aten::addmm`` in ``aten::linear``) is not told apart; what autograd's own wrappers
add is the thread's time between ops.
"""

from __future__ import annotations

from collections import defaultdict

from sim.workload.kineto import HostEvent
from sim.workload.link.collectives import kind_of, size_of
from sim.workload.link.host import union
from sim.workload.link.meeting import WORLD, Meeting
from sim.workload.link.nodes import Node, RankLines

# Wrappers around the ops of a backward pass; the ops inside are the work.
_WRAPPERS = ("autograd::", "torch::autograd::")
_GLOO = ("gloo:", "mpi:", "ucc:")


def add_ops(lines: RankLines) -> list[Node]:
    """Put ops into the threads' lines as calls with work, and collectives; returns the collectives by their start."""
    ops: defaultdict[int, list[Node]] = defaultdict(list)
    collectives: list[Node] = []
    until: defaultdict[int, int] = defaultdict(lambda: -(1 << 62))
    for event in lines.trace.host:
        if event.name.startswith(_GLOO):
            node = _collective(event, lines)
            if node is not None:
                collectives.append(node)
        elif not event.annotation and not event.name.startswith(_WRAPPERS) and event.start_ns >= until[event.thread]:
            until[event.thread] = event.end_ns
            call = Node("call", event.thread, event.name, event.start_ns, event.end_ns)
            call.work = event
            ops[event.thread].append(call)
    _start_collectives(collectives, ops)
    for line in lines.threads:
        own = [node for node in collectives if node.lane == line.lane]
        line.nodes = sorted([*line.nodes, *ops[line.lane], *own, *_around(own)], key=lambda n: (n.start, n.end))
        line.busy = union(line.busy, [(node.start, node.end) for node in own])
    return collectives


def _collective(event: HostEvent, lines: RankLines) -> Node | None:
    kind = kind_of(event.name)
    if kind is None:
        lines.counts["point-to-point transfers between CPUs: left out"] += 1
        return None
    ranks = max(lines.trace.world_size or 1, 1)
    node = Node("collective", event.thread, event.name, event.start_ns, event.end_ns)
    size, dtype = size_of(kind, event.args, [event], ranks)
    node.detail = Meeting(kind, size, dtype, WORLD, 0, tuple(range(ranks)))
    return node


def _start_collectives(collectives: list[Node], ops: dict[int, list[Node]]) -> None:
    """Which op started which collective: the first that had not yet started one of its kind.

    The collective runs while its op may still be returning, so that op ends where the collective begins.
    """
    starters = sorted((node for nodes in ops.values() for node in nodes if node.name.startswith("c10d::")), key=_start)
    for collective in sorted(collectives, key=_start):
        meeting = collective.detail
        assert isinstance(meeting, Meeting)
        starter = next((s for s in starters if s.start <= collective.start and kind_of(s.name) == meeting.kind), None)
        if starter is not None:
            starters.remove(starter)
            starter.end = min(starter.end, collective.start)
            starter.own = starter.end - starter.start
            collective.after = [starter]


def _start(node: Node) -> int:
    return node.start


def _around(collectives: list[Node]) -> list[Node]:
    """What gloo's thread does around each collective: from the moment it is told to, and until it returns."""
    calls: list[Node] = []
    for collective in collectives:
        arrival = Node("call", collective.lane, collective.name, collective.start, collective.start)
        arrival.after, collective.after = collective.after, []
        collective.tail = Node("call", collective.lane, collective.name, collective.end, collective.end)
        calls += [arrival, collective.tail]
    return calls
