"""Kernels on a CPU: the thread that calls an op computes it, and goes on when it is done.

A synthesized program launches kernels on streams, as a GPU's does.  On a CPU there is no stream to run ahead of: what
a thread does next comes after the kernel it launched.  Collectives stay beside: gloo has threads of its own.
"""

from __future__ import annotations

import msgspec

from sim.graph import OpGraph, Program
from sim.ops import Copy, DeviceOp, Kernel, Op


def computed_in_calls(graph: OpGraph) -> OpGraph:
    """The same graph, with every thread waiting for the kernels that it launches."""
    return msgspec.structs.replace(graph, programs=tuple(map(_in_calls, graph.programs)))


def _in_calls(program: Program) -> Program:
    launched: dict[int, list[int]] = {}
    for i, op in enumerate(program.ops):
        if isinstance(op, Kernel | Copy) and op.launch is not None and op.measured_ns is None:
            launched.setdefault(op.launch, []).append(i)
    ops: list[Op] = []
    pending: dict[int, list[int]] = {}
    for i, op in enumerate(program.ops):
        if isinstance(op, DeviceOp):
            ops.append(op)
            continue
        before = pending.pop(op.lane, [])
        # A kernel stands behind its call in the list; an op between the two need not, and cannot, wait for it.
        there = [j for j in before if j < i]
        ops.append(msgspec.structs.replace(op, after=(*op.after, *there)) if there else op)
        later = [j for j in before if j > i] + launched.get(i, [])
        if later:
            pending[op.lane] = later
    return msgspec.structs.replace(program, ops=tuple(ops))
