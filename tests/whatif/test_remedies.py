"""Cures for a job that does not fit, each tried by simulation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sim
from sim.replay.allocator.config import AllocatorConfig
from sim.whatif.remedies import remedies, spec_of

TINY = {
    "model_type": "gpt2", "vocab_size": 2048, "n_positions": 64, "n_embd": 128, "n_layer": 2, "n_head": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> sim.OpGraph:
    folder = tmp_path_factory.mktemp("gpt2")
    (folder / "config.json").write_text(json.dumps(TINY))
    return sim.synthesize(str(folder), batch=16, seq=64, mode="train")


def test_a_graph_knows_the_options_it_was_made_of(job: sim.OpGraph) -> None:
    spec = spec_of(job)
    assert spec is not None
    assert (spec.batch, spec.seq, spec.mode, spec.dtype, spec.micro_batches) == (16, 64, "train", "float32", 1)


def test_each_cure_is_tried_and_some_help(job: sim.OpGraph) -> None:
    whole = sim.summarize(sim.replay(sim.place(job, sim.load_topology("a5000x1"))))
    assert whole.peak_reserved_bytes is not None and whole.peak_allocated_bytes is not None
    # A device with its context of 400 MiB, and a little less than what the job holds at its peak.
    room = (400 << 20) + whole.peak_allocated_bytes - (1 << 20)
    small = sim.load_topology("a5000x1", {"devices.memory_gib": room / 2**30})
    assert sim.summarize(sim.replay(sim.place(job, small))).out_of_memory
    rows = {row.option: row for row in remedies(job, small, (), AllocatorConfig())}
    assert next(iter(rows)) == "--alloc-conf expandable_segments:True"
    assert {"--batch 8 --micro-batches 2", "--batch 4 --micro-batches 4", "--checkpoint full"} <= set(rows)
    # A smaller micro-batch holds fewer activations, and pays with launches.
    halved, quartered = rows["--batch 8 --micro-batches 2"], rows["--batch 4 --micro-batches 4"]
    assert quartered.peak_reserved_bytes <= halved.peak_reserved_bytes < whole.peak_reserved_bytes
    assert halved.fits and halved.step_ms > 0


def test_a_trace_cannot_be_made_anew(shared_dir: Path) -> None:
    graph, _ = sim.read(shared_dir / "data/traces/v100-resnet50-0workers.pt.trace.json.gz")
    assert spec_of(graph) is None
    small = sim.load_topology("a5000x1", {"devices.memory_gib": 2.5})
    assert [row.option for row in remedies(graph, small, (), AllocatorConfig())] == [
        "--alloc-conf expandable_segments:True"
    ]
