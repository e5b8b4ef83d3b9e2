"""Fits what strided, broadcast and converting kernels cost beside their bytes to an H100 trace of ../shared.

    python tools/fit_layout.py          prints the constants of sim/place/kernels/layout.py, and the errors

The trace holds one forward pass of a model with PyTorch 2.6 and records shapes and strides.  Each kind of kernel
counts once.  The last column leaves the kernel out of the fit: what the constants then say of it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sim
from sim.ops import Kernel, TensorMeta, Work
from sim.place.calibration.descent import descend
from sim.place.kernels import kernel_cost, layout, memory
from sim.topology.device import DeviceProfile, load_device

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("TRACESIM_SHARED", ROOT.parent / "shared"))
TRACE = "data/traces/h100-qwen0.5b-forward.pt.trace.json.gz"
OPS = ("copy_", "add", "mul", "neg", "cat", "silu", "pow", "index_select")
LEAST_ELEMENTS = 1 << 22  # smaller kernels show their floor
LIMITS = {
    "CLOCKS": (0.0, 1.0), "CLOCKS_A_DIM": (0.0, 0.5), "CLOCKS_AN_OPERAND": (0.0, 0.5), "CONVERTING_CLOCKS": (0.0, 3.0),
    "CAT_CLOCKS": (0.0, 3.0), "PICKING_CLOCKS": (0.0, 3.0), "SPECIAL_CLOCKS": (0.0, 1.0), "BESIDE": (1.0, 8.0),
}  # fmt: skip
START = {
    "CLOCKS": 0.2, "CLOCKS_A_DIM": 0.1, "CLOCKS_AN_OPERAND": 0.1, "CONVERTING_CLOCKS": 0.5,
    "CAT_CLOCKS": 1.0, "PICKING_CLOCKS": 1.0, "SPECIAL_CLOCKS": 0.3, "BESIDE": 2.0,
}  # fmt: skip


def measured_kernels(shared: Path = SHARED) -> list[tuple[Work, float]]:
    """Every kind of elementwise kernel of the trace with the median of its durations in microseconds."""
    graph, _ = sim.read(shared / TRACE)
    found: dict[Work, list[float]] = {}
    for op in graph.programs[0].ops:
        if isinstance(op, Kernel) and op.work is not None and op.measured_ns is not None:
            work = _typed(graph.works[op.work])
            if work.op.removeprefix("aten::") in OPS and max(t.elements for t in work.inputs) >= LEAST_ELEMENTS:
                found.setdefault(work, []).append(op.measured_ns / 1e3)
    return [(work, median(times)) for work, times in found.items()]


def _typed(work: Work) -> Work:
    """The profiler does not write the dtype of a tensor list: what this model joins is bfloat16."""
    if work.op != "aten::cat":
        return work
    return Work(work.op, tuple(TensorMeta("bfloat16", t.shape, t.stride) for t in work.inputs), (), work.scalars)


def use(values: dict[str, float]) -> None:
    for name, value in values.items():
        setattr(memory if name == "BESIDE" else layout, name, value)


def used() -> dict[str, float]:
    return {name: getattr(memory if name == "BESIDE" else layout, name) for name in START}


def errors(kernels: list[tuple[Work, float]], device: DeviceProfile) -> list[float]:
    """Predicted over measured, less one."""
    return [kernel_cost(work, device).ns / 1e3 / us - 1.0 for work, us in kernels]


def fit(kernels: list[tuple[Work, float]], device: DeviceProfile) -> dict[str, float]:
    shipped = used()

    def loss(values: dict[str, float]) -> float:
        use(values)
        found = errors(kernels, device)
        return sum(map(abs, found)) / len(found)

    best = descend(START, loss, LIMITS)
    use(shipped)
    return best


def main() -> None:
    device, kernels = load_device("h100-sxm"), measured_kernels()
    print(fit(kernels, device))
    shipped = used()
    for i, ((work, us), error) in enumerate(zip(kernels, errors(kernels, device), strict=True)):
        use(fit(kernels[:i] + kernels[i + 1 :], device))
        alone = errors([kernels[i]], device)[0]
        use(shipped)
        shapes = [list(t.shape) for t in work.inputs][:2]
        print(f"{us:7.1f} us {error:+6.1%} left out {alone:+6.1%}  {work.op} {shapes}")


if __name__ == "__main__":
    main()
