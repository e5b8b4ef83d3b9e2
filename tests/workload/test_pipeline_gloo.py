"""A real pipeline of two gloo processes on this CPU, and the synthesized one: the same sends and receives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sim.graph import OpGraph
from sim.ops import Collective
from sim.workload.synth import SynthSpec, synthesize
from tests.workload.pipeline_loop import BATCH, SEQ, Sent
from tests.workload.tiny_models import IMAGES, model_folder


def really_sent(folder: str, schedule: str, micro_batches: int, path: Path) -> list[Sent]:
    """What each of the two ranks sent and received in its second step."""
    answers = [path / f"rank{rank}.json" for rank in range(2)]
    common = [folder, schedule, str(micro_batches), str(path / "store")]
    started = [
        subprocess.Popen([sys.executable, "-m", "tests.workload.pipeline_loop", str(rank), *common, str(answer)])
        for rank, answer in enumerate(answers)
    ]
    try:
        assert [process.wait(timeout=240) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    return [[[tuple(one) for one in call] for call in json.loads(answer.read_text())] for answer in answers]


def synthesized(graph: OpGraph, rank: int) -> Sent:
    """The same of a graph: what one host call launches is one call's."""
    calls: dict[int, list[tuple[str, int, int]]] = {}
    for op in graph.program_of(graph.ranks[rank]).ops:
        if isinstance(op, Collective):
            assert op.launch is not None
            assert op.peer is not None
            calls.setdefault(op.launch, []).append((op.kind, op.bytes, op.peer))
    return list(calls.values())


@pytest.mark.parametrize(
    ("family", "schedule", "micro_batches"),
    [
        ("llama", "1f1b", 3),
        pytest.param("llama", "gpipe", 2, marks=pytest.mark.slow),
        pytest.param("llama", "interleaved", 4, marks=pytest.mark.slow),
        ("bert", "1f1b", 3),
        pytest.param("bert", "interleaved", 4, marks=pytest.mark.slow),
        pytest.param("vit", "1f1b", 3, marks=pytest.mark.slow),
    ],
)
def test_real_ranks_send_the_same_in_the_same_order(
    family: str, schedule: str, micro_batches: int, tmp_path: Path
) -> None:
    folder = model_folder(tmp_path / "model", family, num_hidden_layers=4)
    graph = synthesize(
        SynthSpec(
            model=folder, batch=BATCH, seq=None if family in IMAGES else SEQ, mode="train", parallel="pp=2",
            schedule=schedule, micro_batches=micro_batches, optimizer="none",  # type: ignore[arg-type]
        )
    )  # fmt: skip
    real = really_sent(folder, schedule, micro_batches, tmp_path)
    for rank in range(2):
        assert len(real[rank]) > 2
        assert synthesized(graph, rank) == real[rank]
