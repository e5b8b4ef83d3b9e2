"""DistributedDataParallel under fake tensors: its buckets against a real run, its collectives and copies by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sim.graph import OpGraph
from sim.ops import Alloc, Collective, HostCall, Kernel, Op
from sim.workload.cards import find_config
from sim.workload.ddp import bucket_limits
from sim.workload.synth import SynthSpec, synthesize
from tests.workload.tiny_models import LAYERS, model_folder

BATCH, SEQ = 2, 16
# 40 MB in float32: enough for a first bucket of 1 MiB and several of 25.
WIDE = {"n_embd": 320, "n_head": 4, "n_layer": 8}


@pytest.fixture
def gloo(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def train(path: Path, family: str = "gpt2", config: dict[str, Any] | None = None, **options: Any) -> OpGraph:
    folder = model_folder(path / "model", family, **(config or {}))
    return synthesize(SynthSpec(**{"model": folder, "batch": BATCH, "seq": SEQ, "mode": "train", **options}))


def ops_of(graph: OpGraph) -> tuple[Op, ...]:
    return graph.programs[0].ops


def reductions(graph: OpGraph) -> list[Collective]:
    return [op for op in ops_of(graph) if isinstance(op, Collective)]


def real_bucket_bytes(folder: str, **options: Any) -> list[int]:
    """The buckets that PyTorch's own DDP has after its first iteration, from its logging data."""
    from transformers import AutoModelForCausalLM

    ddp = torch.nn.parallel.DistributedDataParallel(AutoModelForCausalLM.from_config(find_config(folder)), **options)
    ids = torch.zeros(BATCH, SEQ, dtype=torch.long)
    for _ in range(3):
        ddp(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    data = ddp._get_ddp_logging_data()
    return [int(size) for size in data["rebuilt_bucket_sizes"].split(",")]


@pytest.mark.parametrize(
    ("family", "config", "bucket_mib"),
    [("gpt2", WIDE, None), ("gpt2", {}, 0.02), ("llama", {}, 0.01), ("opt", {}, 0.005)],
    ids=["default buckets", "gpt2", "llama", "opt"],
)
def test_buckets_are_those_of_a_real_run(
    tmp_path: Path, gloo: None, family: str, config: dict[str, Any], bucket_mib: float | None
) -> None:
    folder = model_folder(tmp_path / "real", family, **config)
    real = real_bucket_bytes(folder, bucket_cap_mb=bucket_mib)
    dist.destroy_process_group()
    graph = train(tmp_path, family, config, parallel="dp=8", bucket_mib=bucket_mib)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "again"), 1), rank=0, world_size=1)
    assert len(real) > 2
    assert [op.bytes for op in reductions(graph) if op.kind == "all_reduce"] == real


def test_every_gradient_is_reduced_once(tmp_path: Path) -> None:
    graph = train(tmp_path, parallel="dp=4", bucket_mib=0.01)
    parameters = sum(op.bytes for op in ops_of(graph) if isinstance(op, Alloc) and op.category == "parameter")
    reduced = reductions(graph)
    assert {(op.kind, op.group) for op in reduced} == {("all_reduce", "dp")}
    assert sum(op.bytes for op in reduced) == parameters
    assert [op.seq for op in reduced] == list(range(len(reduced)))
    # The buckets are as large as the gradients, beside them, and there all the time.
    buckets = [op for op in ops_of(graph) if isinstance(op, Alloc) and op.category == "communication"]
    assert [op.bytes for op in buckets] == [op.bytes for op in reduced]


def test_gradients_are_divided_into_buckets_and_copied_back(tmp_path: Path) -> None:
    alone, together = train(tmp_path), train(tmp_path, parallel="dp=4")
    kernels = [Counter(op.name for op in ops_of(g) if isinstance(op, Kernel)) for g in (alone, together)]
    tensors = 2 + 12 * LAYERS + 2
    assert kernels[1] - kernels[0] == Counter({"aten::mul": tensors, "aten::copy_": tensors})
    as_views = train(tmp_path, parallel="dp=4", gradient_as_bucket_view=True)
    counted = Counter(op.name for op in ops_of(as_views) if isinstance(op, Kernel))
    assert counted - kernels[0] == Counter({"aten::mul": tensors})


def test_reduction_overlaps_backward_and_is_waited_for_at_its_end(tmp_path: Path) -> None:
    graph = train(tmp_path, parallel="dp=4", bucket_mib=0.01)
    ops = ops_of(graph)
    first = next(i for i, op in enumerate(ops) if isinstance(op, Collective))
    # It waits for the copy into its bucket, is launched by the engine's thread, and backward goes on meanwhile.
    (copied,) = ops[first].after  # type: ignore[union-attr]
    assert ops[copied].name == "aten::mul"  # type: ignore[union-attr]
    launch = ops[first].launch  # type: ignore[union-attr]
    lanes = graph.programs[0].lanes
    assert lanes[ops[launch].lane].name == "autograd"
    assert lanes[ops[first].lane].name == "nccl:dp"
    backward = [i for i, op in enumerate(ops) if isinstance(op, Kernel) and op.name.endswith("_backward")]
    assert max(backward) > first
    # The first copy out waits for its bucket alone.
    out = next(op for op in ops if isinstance(op, Kernel) and op.name == "aten::copy_")
    assert out.after == (first,)


def test_accumulation_reduces_in_the_last_micro_batch_only(tmp_path: Path) -> None:
    graph = train(tmp_path, parallel="dp=2", micro_batches=3)
    ops = ops_of(graph)
    calls = [i for i, op in enumerate(ops) if isinstance(op, HostCall) and op.name == "autograd::Engine::execute"]
    assert len(calls) == 3
    assert all(i > calls[2] for i, op in enumerate(ops) if isinstance(op, Collective))


def test_buffers_are_broadcast_before_forward(tmp_path: Path) -> None:
    graph = train(tmp_path, "llama", parallel="dp=2")
    broadcasts = [op for op in reductions(graph) if op.kind == "broadcast"]
    # Llama's two buffers are the rotary frequencies, 4 of 8 dimensions a head in float32 each: flattened, sent, copied.
    assert [op.bytes for op in broadcasts] == [2 * 4 * 4]
    assert isinstance(ops_of(graph)[broadcasts[0].after[0]], Kernel)


def test_bucket_limits_are_pytorchs() -> None:
    assert bucket_limits(None) == [2**20, 25 * 2**20]
    assert bucket_limits(100) == [100 * 2**20]
