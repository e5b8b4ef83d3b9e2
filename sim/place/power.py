"""What a GPU draws while it does what: an estimate from its data sheet's board power.

Four states: a kernel that its arithmetic bounds draws the board's power limit; one that its bytes bound, collectives
and a device that waits draw shares of it, from published measurements of data-centre cards.  Ignored: clocks that
follow the load, what the numbers in the operands do (up to 67 % for the same product, arXiv 2212.08805), temperature,
and all that is not the board: host, fans, network.
"""

from __future__ import annotations

from collections.abc import Sequence

from sim.graph import OpGraph
from sim.ops import Collective, Copy, Kernel, Op
from sim.place.kernels import has_shapes, is_known, kernel_cost
from sim.place.placement import PlacedRank, RankPower
from sim.topology.device import DeviceProfile
from sim.topology.machine import Gpu

# Shares of the board's power.  Compute: large products settle at the limit (the power blocks of the device profiles).
COMPUTE = 1.0
# An H200 draws up to 300 of its 700 W while decoding saturates its memory (arXiv 2605.11999).
MEMORY = 0.43
# nvidia-smi of idle A100s: 53 of 400 W (SXM), 45 of 300 W (PCIe); a process with a CUDA context adds 26 to 50 W on
# cards with HBM (arXiv 2605.23918): 0.20 to 0.32.
IDLE = 0.2
# Between these two; training's communication phases draw far less than its compute phases (arXiv 2508.14318).
COMMUNICATION = (IDLE + MEMORY) / 2
# Of kernels of which only the name is known.
PRODUCT_NAMES = ("gemm", "conv", "cutlass", "attention", "flash", "fmha", "dgrad", "wgrad", "mma")


def power_of(graph: OpGraph, ranks: Sequence[PlacedRank], gpus: Sequence[Gpu]) -> dict[int, RankPower]:
    """What each rank's device draws idle and in each operation; ranks whose device's power is not known are absent."""
    profiles = {gpu.name: gpu.profile for gpu in gpus}
    made: dict[tuple[int, str], RankPower | None] = {}
    found = {}
    for placed in ranks:
        profile = profiles[placed.device]
        key = (placed.program, profile.name)
        if key not in made:
            made[key] = _power(graph, placed, profile)
        power = made[key]
        if power is not None:
            found[placed.rank] = power
    return found


def _power(graph: OpGraph, placed: PlacedRank, profile: DeviceProfile) -> RankPower | None:
    if profile.tdp_w is None or profile.kind != "gpu":
        return None
    shares: dict[tuple[int | None, str], float] = {}
    watts = tuple(profile.tdp_w * _share(op, graph, profile, shares) for op in graph.programs[placed.program].ops)
    return RankPower(profile.tdp_w, profile.tdp_w * IDLE, watts)


def _share(op: Op, graph: OpGraph, profile: DeviceProfile, known: dict[tuple[int | None, str], float]) -> float:
    if isinstance(op, Collective):
        return COMMUNICATION
    if isinstance(op, Copy):
        return MEMORY if op.kind in ("d2d", "memset") else IDLE
    if not isinstance(op, Kernel):
        return IDLE
    key = (op.work, "" if op.work is not None else op.name)
    if key not in known:
        known[key] = COMPUTE if _computes(op, graph, profile) else MEMORY
    return known[key]


def _computes(op: Kernel, graph: OpGraph, profile: DeviceProfile) -> bool:
    work = graph.works[op.work] if op.work is not None else None
    if work is not None and is_known(work.op) and has_shapes(work):
        return kernel_cost(work, profile).bound == "compute"
    return any(word in op.name for word in PRODUCT_NAMES)
