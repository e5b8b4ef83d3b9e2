"""Training throughput that Lambda Labs measured on RTX A5000s in June 2021, with our predictions beside it.

    python tools/validate_throughput.py

The runs are those of lambdal/deeplearning-benchmark (pytorch/results/{A5000,2xA5000,4xA5000}, commit aeb58df; system:
Threadripper 3970X, ASRock TRX40 Creator, PyTorch 1.9.0a0 of NVIDIA's container 21.06): NVIDIA/DeepLearningExamples,
BERT/run_squad.py and ConvNets/main.py.  The options below are what those scripts do, as far as their logs say it:

* BERT in float16: apex O2, a model in half with float32 master weights, FusedAdam, gradients clipped to 1, attention of
  separate kernels; in float32: BertAdam, a loop over parameters.  TF32: PyTorch 1.9 lets products run in it by default.
* ResNet50 "FP16": apex O1 (autocast), static loss scale, SGD with momentum, NCHW, synthetic images.

``published`` counts the first iteration (3.4 to 5.1 s of starting up) among 100 of BERT's; ``steady`` is the mean of
iterations 2 to 101 by the time stamps in the same logs.  The last two tables take one assumption at a time away.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sim
from sim.graph import OpGraph
from sim.report.summary import Summary
from sim.report.text import plain_table
from sim.workload.spec import from_options
from sim.workload.synth import synthesize

GPUS = (1, 2, 4)
P2P_OFF = {"nccl.NCCL_P2P_DISABLE": "true"}


class Workload(NamedTuple):
    """What was run, and sequences or images a second on 1, 2 and 4 GPUs; ``steady_ms``: a step without the first."""

    name: str
    options: dict[str, Any]
    published: tuple[float, float, float]
    steady_ms: tuple[float, ...] = ()

    @property
    def batch(self) -> int:
        return int(self.options["batch"])

    def measured_ms(self, gpus: int) -> float:
        """A step: by time stamps where the log has them, else by the published throughput."""
        at = GPUS.index(gpus)
        return self.steady_ms[at] if self.steady_ms else 1e3 * gpus * self.batch / self.published[at]


_BERT = {"model": "bert-large", "seq": 384, "mode": "train", "attention": "eager", "max_grad_norm": 1.0}
_RESNET = {"model": "resnet-50", "mode": "train", "optimizer": "sgd", "momentum": 0.9}
WORKLOADS = {
    "bert-fp16": Workload(
        "BERT-large SQuAD FP16",
        {**_BERT, "batch": 16, "dtype": "float16", "master_weights": True, "optimizer_kernels": "fused"},
        (45.26, 84.22, 169.5), (316.97, 340.80, 367.27),
    ),
    "bert-fp32": Workload(
        "BERT-large SQuAD FP32", {**_BERT, "batch": 8, "tf32": True, "optimizer_kernels": "for-loop"},
        (14.50, 26.35, 51.07), (508.69, 569.51, 615.79),
    ),
    "resnet-fp16": Workload(
        "ResNet50 FP16", {**_RESNET, "batch": 448, "autocast": "float16", "loss_scaling": True},
        (703.7, 1394.2, 2770.6),
    ),
    "resnet-fp32": Workload("ResNet50 FP32", {**_RESNET, "batch": 224}, (405.8, 804.4, 1600.6)),
}  # fmt: skip
# One assumption changed at a time.
VARIANTS: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "bert-fp16": (
        ("fused attention", {"attention": "sdpa"}),
        ("autocast of a float32 model instead of O2", {"dtype": None, "master_weights": False, "autocast": "float16"}),
        ("no float32 master weights", {"master_weights": False}),
        ("foreach optimizer", {"optimizer_kernels": "foreach"}),
    ),
    "bert-fp32": (
        ("no TF32", {"tf32": False}),
        ("no TF32, fused attention", {"tf32": False, "attention": "sdpa"}),
        ("foreach optimizer", {"optimizer_kernels": "foreach"}),
    ),
    "resnet-fp16": (("channels last", {"channels_last": True}),),
    "resnet-fp32": (("channels last", {"channels_last": True}),),
}


def graph_of(workload: Workload, gpus: int, **changes: Any) -> OpGraph:
    options = {**workload.options, **changes}
    plan = {} if gpus == 1 else {"parallel": f"dp={gpus}"}
    return synthesize(from_options(**{**options, **plan}))


def predict(graph: OpGraph, gpus: int, settings: dict[str, str] | None = None) -> Summary:
    return sim.summarize(sim.replay(sim.place(graph, sim.load_topology(f"a5000x{gpus}", settings or {}))))


def throughput_table() -> Table:
    table = plain_table(
        "workload", "GPUs", "published", "steady", "predicted", "", "efficiency", "predicted", "without P2P"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for workload in WORKLOADS.values():
        alone: tuple[float, float] | None = None
        for gpus in GPUS:
            graph = graph_of(workload, gpus)
            measured, ours = workload.measured_ms(gpus), predict(graph, gpus).step_ms
            alone = alone or (measured, ours)
            rate = 1e3 * gpus * workload.batch
            steady = f"{rate / measured:.2f}" if workload.steady_ms else ""
            table.add_row(
                workload.name if gpus == 1 else "", str(gpus), f"{workload.published[GPUS.index(gpus)]:.2f}", steady,
                f"{rate / ours:.2f}", f"{measured / ours - 1:+.1%}", f"{alone[0] / measured:.1%}",
                f"{alone[1] / ours:.1%}",
                "" if gpus == 1 else f"{alone[1] / predict(graph, gpus, P2P_OFF).step_ms:.1%}",
            )  # fmt: skip
    table.caption = "sequences or images a second; efficiency: of one GPU's rate times the GPUs"
    return table


def causes_table() -> Table:
    table = plain_table("workload on one GPU", "changed", "ms", "", "of the measured step")
    for column in table.columns[2:]:
        column.justify = "right"
    for name, workload in WORKLOADS.items():
        measured = workload.measured_ms(1)
        base = predict(graph_of(workload, 1), 1).step_ms
        table.add_row(workload.name, "", f"{base:.1f}", "", f"{base / measured - 1:+.1%}")
        for what, changes in VARIANTS[name]:
            ours = predict(graph_of(workload, 1, **changes), 1).step_ms
            table.add_row("", what, f"{ours:.1f}", f"{ours - base:+.1f}", f"{ours / measured - 1:+.1%}")
    return table


def main() -> None:
    console = Console()
    if console.width < 118:
        console = Console(width=118)
    for doing, table in (("on 1, 2 and 4 A5000s", throughput_table), ("with other assumptions", causes_table)):
        with console.status(f"training steps {doing}"):
            made = table()
        console.print(made)


if __name__ == "__main__":
    main()
