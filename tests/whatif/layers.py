"""A training step drawn with a ruler: layers of equal time, and an all-reduce a layer beside the backward pass."""

from __future__ import annotations

from pathlib import Path

from sim.graph import OpGraph, Program, RankProgram
from sim.ops import Collective, HostCall, Kernel, Lane, Mark, Op
from sim.units import MIB, NS_PER_MS

MAIN, COMPUTE, COMM = 0, 1, 2
LANES = (Lane("thread", 1, "main"), Lane("stream", 7, "compute"), Lane("stream", 20, "nccl"))
DEVICE = "NVIDIA RTX A5000"


def layered(
    ranks: int,
    *,
    layers: int = 24,
    forward_ms: float = 10.0,
    backward_ms: float = 10.0,
    nbytes: int = 100 * MIB,
    launch_ns: int = 0,
) -> OpGraph:
    """Every rank runs ``layers`` forward kernels, then as many backward kernels, each followed by its all-reduce on
    another stream; the step ends when all is done."""
    ops: list[Op] = [Mark(lane=MAIN, name="ProfilerStep#0", step=0, edge="begin")]

    def kernel(name: str, ms: float) -> int:
        ops.append(HostCall(lane=MAIN, name=f"launch {name}", measured_ns=launch_ns))
        launch = len(ops) - 1
        ops.append(
            Kernel(lane=COMPUTE, name=name, measured_ns=round(ms * NS_PER_MS), launch=launch, lag_ns=0, gap_ns=0)
        )
        return len(ops) - 1

    for _ in range(layers):
        kernel("forward", forward_ms)
    reduced = []
    for layer in range(layers):
        gradient = kernel("backward", backward_ms)
        if nbytes:
            ops.append(
                Collective(
                    lane=COMM, name="ncclAllReduce", launch=gradient - 1, lag_ns=0, gap_ns=0, after=(gradient,),
                    bytes=nbytes, group="dp", seq=layer,
                )
            )  # fmt: skip
            reduced.append(len(ops) - 1)
    last = [i for i, op in enumerate(ops) if isinstance(op, Kernel)][-1]
    ops.append(HostCall(lane=MAIN, name="cudaDeviceSynchronize", measured_ns=0, waits=(last, *reduced[-1:])))
    ops.append(Mark(lane=MAIN, name="ProfilerStep#0", step=0, edge="end"))
    graph = OpGraph(
        name="layers",
        programs=(Program(LANES, tuple(ops)),),
        ranks=tuple(RankProgram(rank, 0, DEVICE) for rank in range(ranks)),
        groups={"dp": (tuple(range(ranks)),)},
    )
    graph.check()
    return graph


def ring_machine(folder: Path, ranks: int, *, gib_s: float = 12.0, hop_us: float = 5.0, extra: str = "") -> Path:
    """A machine whose GPUs are joined in a ring, costed as the textbook does: each of 2 (n - 1) steps takes a hop's
    latency and a piece over a link."""
    pairs = ", ".join(f"[gpu{i}, gpu{(i + 1) % ranks}]" for i in range(ranks if ranks > 2 else 1))
    file = folder / f"ring{ranks}.yaml"
    file.write_text(
        f"""name: ring{ranks}
description: a ring for tests
source: a test
devices: {{count: {ranks}, profile: rtx-a5000}}
nodes:
  - {{id: cpu, kind: cpu}}
links:
  ring:
    kind: nvlink
    bandwidth_gb_s: {gib_s * (1 << 30) / 1e9!r}
    latency_us: {hop_us}
    source: a test
    between: [{pairs}]
  host:
    kind: pcie
    bandwidth_gb_s: 24
    source: a test
    between: [[gpu, cpu]]
collectives: {{library: alpha-beta}}
{extra}"""
    )
    return file
