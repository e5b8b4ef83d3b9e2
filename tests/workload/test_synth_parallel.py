"""FSDP2, tensor parallelism and their products in training: collectives, streams and shards worked out by hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sim.errors import UserError
from sim.graph import OpGraph
from sim.ops import Alloc, Collective, Free, HostCall, Kernel, Op
from sim.workload.synth import SynthSpec, synthesize
from tests.workload.tiny_models import LAYERS, model_folder

BATCH, SEQ, HIDDEN = 2, 16, 32
# OPT, one block: four projections 32 x 32, 32 x 64 and 64 x 32, their biases 5 x 32 + 64, two norms 4 x 32.
BLOCK = 4 * 32 * 32 + 2 * 32 * 64 + 5 * 32 + 64 + 4 * 32
# The rest: 100 words, 64 + 2 positions, of 32 each, as below; the last norm. The head is the embedding.
LAST_NORM = 2 * 32


def train(path: Path, family: str = "opt", **options: Any) -> OpGraph:
    folder = model_folder(path / "model", family, **options.pop("config", {}))
    graph = synthesize(SynthSpec(**{"model": folder, "batch": BATCH, "seq": SEQ, "mode": "train", **options}))
    graph.check()
    return graph


def ops_of(graph: OpGraph) -> tuple[Op, ...]:
    return graph.programs[0].ops


def collectives(graph: OpGraph, kind: str = "") -> list[Collective]:
    return [op for op in ops_of(graph) if isinstance(op, Collective) and kind in ("", op.kind)]


def resident(graph: OpGraph, category: str) -> int:
    """Bytes that are there when the step begins."""
    begin = next(i for i, op in enumerate(ops_of(graph)) if type(op).__name__ == "Mark")
    return sum(op.bytes for op in ops_of(graph)[:begin] if isinstance(op, Alloc) and op.category == category)


def lane_name(graph: OpGraph, op: Op) -> str:
    return graph.programs[0].lanes[op.lane].name


# FSDP ----------------------------------------------------------------------------------------------------------------


def test_fsdp_gathers_a_block_twice_and_scatters_it_once(tmp_path: Path) -> None:
    graph = train(tmp_path, parallel="fsdp=8")
    # Rows are dealt out in equal parts, the last one padded: 100 words are 8 x 13 rows, 66 positions 8 x 9.
    root = (8 * 13 + 8 * 9) * 32 + LAST_NORM
    gathered = Counter(op.bytes for op in collectives(graph, "all_gather"))
    # The root's own parameters stay after forward, as fully_shard decides, and are gathered once.
    assert gathered == Counter({4 * BLOCK: 2 * LAYERS, 4 * root: 1})
    scattered = [op.bytes for op in collectives(graph, "reduce_scatter")]
    assert scattered == [4 * BLOCK] * LAYERS + [4 * root]
    assert {op.group for op in collectives(graph)} == {"fsdp"}


def test_fsdp_gathers_a_block_once_where_it_keeps_it(tmp_path: Path) -> None:
    graph = train(tmp_path, parallel="fsdp=8", reshard_after_forward=False)
    assert len(collectives(graph, "all_gather")) == LAYERS + 1


def test_fsdp_holds_an_eighth_of_everything(tmp_path: Path) -> None:
    graph = train(tmp_path, parallel="fsdp=8")
    # Rank 0's share: 13 of 100 words, 9 of 66 positions, an eighth of the rest.
    share = BLOCK * LAYERS // 8 + (13 + 9) * 32 + LAST_NORM // 8
    assert resident(graph, "parameter") == 4 * share
    assert resident(graph, "optimizer") == 8 * share


def test_fsdp_mixed_precision_gathers_in_one_dtype_and_reduces_in_another(tmp_path: Path) -> None:
    graph = train(tmp_path, parallel="fsdp=8", fsdp_dtype="bfloat16", fsdp_reduce_dtype="float32")
    root = (8 * 13 + 8 * 9) * 32 + LAST_NORM
    gathered = {(op.dtype, op.bytes) for op in collectives(graph, "all_gather")}
    assert gathered == {("bfloat16", 2 * BLOCK), ("bfloat16", 2 * root)}
    assert {op.dtype for op in collectives(graph, "reduce_scatter")} == {"float32"}
    products = [op for op in ops_of(graph) if isinstance(op, Kernel) and op.name == "aten::addmm"]
    assert {graph.works[op.work or 0].inputs[-1].dtype for op in products} == {"bfloat16"}


def test_fsdp_uses_its_own_streams_and_waits_as_its_code_says(tmp_path: Path) -> None:
    graph = train(tmp_path, parallel="fsdp=4")
    ops = ops_of(graph)
    where = {op.name: lane_name(graph, op) for op in ops if isinstance(op, Kernel | Collective)}
    assert where["ncclDevKernel_all_gather"] == "fsdp:all-gather"
    assert where["ncclDevKernel_reduce_scatter"] == "fsdp:reduce-scatter"
    assert where["fsdp::split_with_sizes_copy"] == where["fsdp::chunk_cat"] == "compute"
    copied_in = [op for op in ops if isinstance(op, Kernel) and op.name == "fsdp::all_gather_copy_in"]
    assert {lane_name(graph, op) for op in copied_in} == {"fsdp:all-gather-copy-in"}
    # The gather waits for its copy-in, the copy-out for the gather, the scatter for the gradients' copy-in.
    assert awaited(graph, "ncclDevKernel_all_gather") == "fsdp::all_gather_copy_in"
    assert awaited(graph, "fsdp::split_with_sizes_copy") == "ncclDevKernel_all_gather"
    assert awaited(graph, "ncclDevKernel_reduce_scatter") == "fsdp::chunk_cat"
    # The optimizer, first kernel on the main thread after backward, waits for the last scatter.
    last = max(i for i, op in enumerate(ops) if isinstance(op, Collective))
    step = next(op for op in ops[last:] if isinstance(op, Kernel) and op.name == "aten::_foreach_mul_")
    assert last in step.after


def awaited(graph: OpGraph, name: str) -> str:
    """The last thing that the first operation of that name waits for."""
    ops = ops_of(graph)
    first = next(op for op in ops if isinstance(op, Kernel | Collective) and op.name == name)
    return getattr(ops[max(first.after)], "name", "")


def test_fsdp_prefetches_the_next_block_in_backward(tmp_path: Path) -> None:
    ops = ops_of(train(tmp_path, parallel="fsdp=4"))
    backward = next(
        i for i, op in enumerate(ops) if isinstance(op, HostCall) and op.name == "autograd::Engine::execute"
    )
    names = [op.name for op in ops[backward:] if isinstance(op, Kernel | Collective)]
    gathers = [i for i, name in enumerate(names) if name == "ncclDevKernel_all_gather"]
    # Each of two blocks has two products for each of six layers in backward. The last block's gather is issued when
    # the loss is; the first block's before any product of the last: it is prefetched.
    assert len(gathers) == LAYERS
    assert names[gathers[1] :].count("aten::mm") == LAYERS * 2 * 6


def test_a_block_that_is_resharded_gives_its_memory_back(tmp_path: Path) -> None:
    graph = train(tmp_path, parallel="fsdp=8")
    ops = ops_of(graph)
    live: dict[int, Alloc] = {}
    whole = []
    for op in ops:
        if isinstance(op, Alloc) and op.name == "unsharded_parameter":
            live[op.block] = op
        elif isinstance(op, Free):
            live.pop(op.block, None)
        whole.append(sum(alloc.bytes for alloc in live.values()))
    assert whole[-1] == 0
    # The root's (padded) and no more than two blocks at a time.
    assert max(whole) <= 4 * ((104 + 72) * 32 + LAST_NORM + 2 * BLOCK)


def test_hybrid_sharding_reduces_the_shards_over_the_outer_axis(tmp_path: Path) -> None:
    graph = train(tmp_path, parallel="dp=2,fsdp=4")
    reduces = collectives(graph, "all_reduce")
    root = (4 * 25 + 4 * 17) * 32 + LAST_NORM  # 100 words are 4 x 25 rows, 66 positions 4 x 17
    assert [(op.group, op.bytes) for op in reduces] == [("dp", BLOCK)] * LAYERS + [("dp", root)]
    assert graph.groups == {"dp": ((0, 4), (1, 5), (2, 6), (3, 7)), "fsdp": ((0, 1, 2, 3), (4, 5, 6, 7))}


def test_fsdp_checkpointing_gathers_no_more(tmp_path: Path) -> None:
    graph = train(tmp_path, parallel="fsdp=8", checkpoint="full")
    assert len(collectives(graph, "all_gather")) == 2 * LAYERS + 1


# Tensor parallelism --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_tensor_parallelism_reduces_twice_a_layer_each_way(tmp_path: Path, family: str) -> None:
    graph = train(tmp_path, family, parallel="tp=2", optimizer="sgd")
    reduces = collectives(graph)
    # [2, 16, 32] float32 in forward after attention and MLP, in backward before them.
    assert [(op.kind, op.bytes, op.group) for op in reduces] == [("all_reduce", BATCH * SEQ * HIDDEN * 4, "tp")] * (
        4 * LAYERS
    )
    threads = Counter(lane_name(graph, ops_of(graph)[op.launch or 0]) for op in reduces)
    assert threads == {"main": 2 * LAYERS, "autograd": 2 * LAYERS}


def test_tensor_parallelism_halves_what_it_splits(tmp_path: Path) -> None:
    whole, split = train(tmp_path), train(tmp_path, parallel="tp=2")
    # Weights of all projections and the biases of those by columns (q, k, v: 3 x 32; fc1: 64) are split.
    split_away = LAYERS * (4 * 32 * 32 + 2 * 32 * 64 + 3 * 32 + 64) * 4 // 2
    assert resident(whole, "parameter") - resident(split, "parameter") == split_away
    # AdamW has a group for DTensors and one for plain tensors: the same state.
    assert resident(whole, "optimizer") - resident(split, "optimizer") == 2 * split_away
    updates = [op for op in ops_of(split) if isinstance(op, Kernel) and op.name == "aten::_foreach_addcdiv_"]
    assert len(updates) == 2


def test_clipping_under_tensor_parallelism_reduces_the_norms(tmp_path: Path) -> None:
    plain, clipped = (train(tmp_path, parallel="tp=2", max_grad_norm=n) for n in (None, 1.0))
    extra = Counter(collectives(clipped)[i].kind for i in range(len(collectives(plain)), len(collectives(clipped))))
    assert extra == {"all_reduce": 1}


def test_fsdp_and_tensor_parallelism_together(tmp_path: Path) -> None:
    graph = train(tmp_path, parallel="fsdp=4,tp=2")
    counted = Counter((op.kind, op.group) for op in collectives(graph))
    assert counted == {
        ("all_gather", "fsdp"): 2 * LAYERS + 1,
        ("reduce_scatter", "fsdp"): LAYERS + 1,
        ("all_reduce", "tp"): 4 * LAYERS,
    }
    # A block's tensor-parallel half of the split weights, and the whole of what is not split.
    split = 4 * 32 * 32 + 2 * 32 * 64 + 3 * 32 + 64
    assert max(Counter(op.bytes for op in collectives(graph, "reduce_scatter")).items(), key=lambda i: i[1])[0] == 4 * (
        split // 2 + BLOCK - split
    )


def test_data_and_tensor_parallelism_reduce_each_ranks_shards(tmp_path: Path) -> None:
    graph = train(tmp_path, parallel="dp=2,tp=2")
    assert sum(op.bytes for op in collectives(graph, "all_reduce") if op.group == "dp") == resident(graph, "parameter")
    assert graph.groups == {"dp": ((0, 2), (1, 3)), "tp": ((0, 1), (2, 3))}


def test_three_axes(tmp_path: Path) -> None:
    graph = train(tmp_path, parallel="dp=2,fsdp=2,tp=2")
    assert len(graph.ranks) == 8
    assert {op.group for op in collectives(graph)} == {"dp", "fsdp", "tp"}


@pytest.mark.parametrize("plan", ["fsdp=4", "tp=2", "dp=4", "fsdp=2,tp=2"])
def test_the_same_plan_gives_the_same_graph_and_leaves_nothing_behind(tmp_path: Path, plan: str) -> None:
    first, second = (train(tmp_path, parallel=plan, max_grad_norm=1.0) for _ in range(2))
    assert first == second
    freed = {op.block for op in ops_of(first) if isinstance(op, Free)}
    left = {op.category for op in ops_of(first) if isinstance(op, Alloc) and op.block not in freed}
    assert left <= {"parameter", "optimizer", "input", "communication"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parallel": "tp=3"}, "tp=3 does not divide the 4 attention heads"),
        ({"parallel": "tp=2,fsdp=4"}, "outermost first: write fsdp=4,tp=2"),
        ({"parallel": "fsdp=1000000000"}, "has 1000000000 ranks; 999999 at most"),
        ({"parallel": "dp=\N{SUPERSCRIPT TWO}"}, "is a whole number of at least 1"),
        ({"parallel": "fsdp=4", "mode": "forward"}, "fsdp"),
        ({"fsdp_dtype": "bfloat16"}, "--fsdp-dtype"),
        ({"parallel": "fsdp=2", "bucket_mib": 4.0}, "--bucket-mib: is DistributedDataParallel's"),
        ({"parallel": "tp=2", "loss_scaling": True, "autocast": "float16"}, "--loss-scaling"),
    ],
)
def test_what_cannot_be_parallel_is_said_in_one_line(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        train(tmp_path, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
