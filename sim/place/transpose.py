"""A kernel measured on one device, predicted for another: the cost model's ratio of the two, times the measurement.

Where the op and its shapes are known the ratio is the formula's; where they are not, or where a kernel only moves data
for a product, it is that of the class of its name (sim/place/named.py), and the kernel is counted as an estimate.
"""

from __future__ import annotations

from sim.errors import UnknownNameError, UserError
from sim.graph import OpGraph
from sim.ops import Copy, Kernel, Work
from sim.place.kernels import has_shapes, is_known, kernel_cost, memory_cost
from sim.place.named import HOW, NameClass, Unexplained, carried_over_ns, class_of, dtype_of
from sim.timeline import DurationSource
from sim.topology.device import DeviceProfile, find_device

# Ops whose formula speaks of products: kernels of theirs that move data are not what it prices.
PRODUCT_OPS = ("conv", "mm", "linear", "baddbmm")


def rescaled(
    op: Kernel | Copy, graph: OpGraph, captured_on: str, target: DeviceProfile, unexplained: Unexplained
) -> tuple[int, DurationSource]:
    """Nanoseconds of a measured operation on ``target``, and where the number is from.

    ``unexplained`` counts, by name, the kernels that the class of their name had to do for.  Raises UserError where no
    profile says what the captured device is.
    """
    assert op.measured_ns is not None
    source = _device_of(graph, captured_on)
    if source.name == target.name:
        return op.measured_ns, "measured"
    if isinstance(op, Copy):
        nbytes = op.bytes or 1 << 26
        return round(op.measured_ns * memory_cost(nbytes, target).ns / memory_cost(nbytes, source).ns), "roofline"
    work = graph.works[op.work] if op.work is not None else None
    kind = class_of(op.name, "" if work is None else work.op)
    if work is not None and _says(work, kind):
        here, there = kernel_cost(work, target), kernel_cost(work, source)
        if "estimate" not in (here.source, there.source):
            return round(op.measured_ns * here.ns / there.ns), "roofline"
    unexplained.add(HOW[kind], op.name)
    return carried_over_ns(op.measured_ns, kind, dtype_of(op.name), source, target), "estimate"


def _device_of(graph: OpGraph, captured_on: str) -> DeviceProfile:
    try:
        return find_device(captured_on)
    except UnknownNameError as error:
        raise UserError(
            f"{graph.name}: its measured times are of {captured_on!r}, as the trace calls its device, which no profile "
            f"describes, so they cannot be told for another: {error}"
        ) from None


def _says(work: Work, kind: NameClass) -> bool:
    """Whether a formula of the op prices a kernel of that class."""
    if not is_known(work.op) or not has_shapes(work):
        return False
    return kind != "bytes" or not any(part in work.op for part in PRODUCT_OPS)
