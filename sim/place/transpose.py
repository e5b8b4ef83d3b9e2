"""A kernel measured on one device, predicted for another: the cost model's ratio of the two, times the measurement.

Where the op and its shapes are known the ratio is the formula's; where they are not, it is that of the devices'
memory bandwidths, and the kernel is counted as an estimate.
"""

from __future__ import annotations

from sim.graph import OpGraph
from sim.ops import Copy, Kernel
from sim.place.kernels import has_shapes, is_known, kernel_cost, memory_cost
from sim.timeline import DurationSource
from sim.topology.device import DeviceProfile, find_device


def rescaled(
    op: Kernel | Copy, graph: OpGraph, captured_on: str, target: DeviceProfile, estimated: dict[str, int]
) -> tuple[int, DurationSource]:
    """Nanoseconds of a measured operation on ``target``, and where the number is from.

    ``estimated`` counts, by name, the kernels whose shapes are not known.  Raises UnknownNameError where no profile
    says what the captured device is.
    """
    assert op.measured_ns is not None
    source = find_device(captured_on)
    if source.name == target.name:
        return op.measured_ns, "measured"
    work = graph.works[op.work] if isinstance(op, Kernel) and op.work is not None else None
    if work is not None and is_known(work.op) and has_shapes(work):
        here, there = kernel_cost(work, target), kernel_cost(work, source)
        return round(op.measured_ns * here.ns / there.ns), "roofline"
    nbytes = op.bytes if isinstance(op, Copy) and op.bytes else 1 << 26
    if isinstance(op, Kernel):
        estimated[op.name] = estimated.get(op.name, 0) + 1
    ratio = memory_cost(nbytes, target).ns / memory_cost(nbytes, source).ns
    return round(op.measured_ns * ratio), "estimate" if isinstance(op, Kernel) else "roofline"
