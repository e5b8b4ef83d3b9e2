"""Tensor and sequence parallelism of every family: collectives to the byte, what is split, and real gloo processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sim.errors import UserError
from sim.graph import OpGraph
from sim.ops import Alloc, Collective, Free, Kernel, Op
from sim.workload.synth import SynthSpec, synthesize
from tests.workload import real_tensor_parallel
from tests.workload.tiny_models import IMAGES, LAYERS, model_folder

BATCH, SEQ, HIDDEN = 2, 16, 32
STREAM = BATCH * SEQ * HIDDEN * 4  # what lies between the projections, in float32
IMAGE = BATCH * (1 + 4 * 4) * HIDDEN * 4  # 32 x 32 pixels are 4 x 4 patches, and one token for the class
FAMILIES = ("bert", "gpt2", "llama", "opt", "t5", "vit")
BY_SEQUENCE = ("bert", "gpt2", "llama", "opt")


def train(path: Path, family: str, **options: Any) -> OpGraph:
    folder = model_folder(path / "model", family, **options.pop("config", {}))
    seq = None if family in IMAGES else SEQ
    given = {"model": folder, "batch": BATCH, "seq": seq, "mode": "train", "parallel": "tp=2", **options}
    graph = synthesize(SynthSpec(**given))
    graph.check()
    return graph


def ops_of(graph: OpGraph) -> tuple[Op, ...]:
    return graph.programs[0].ops


def counted(graph: OpGraph, group: str = "tp") -> Counter[tuple[str, int, str]]:
    """Kind, bytes and issuing thread of the collectives of a group."""
    ops, lanes = ops_of(graph), graph.programs[0].lanes
    found = (op for op in ops if isinstance(op, Collective) and op.group == group)
    return Counter((op.kind, op.bytes, lanes[ops[op.launch or 0].lane].name) for op in found)


def parameters(graph: OpGraph) -> int:
    return sum(op.bytes for op in ops_of(graph) if isinstance(op, Alloc) and op.category == "parameter") // 4


def peak(graph: OpGraph, category: str) -> int:
    live, most, sizes = 0, 0, {}
    for op in ops_of(graph):
        if isinstance(op, Alloc) and op.category == category:
            sizes[op.block] = op.bytes
            live += op.bytes
            most = max(most, live)
        elif isinstance(op, Free):
            live -= sizes.pop(op.block, 0)
    return most


# Collectives ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "size"), [("bert", STREAM), ("gpt2", STREAM), ("llama", STREAM), ("vit", IMAGE)])
def test_two_all_reduces_a_layer_forward_and_two_backward(tmp_path: Path, family: str, size: int) -> None:
    graph = train(tmp_path, family)
    assert counted(graph) == {
        ("all_reduce", size, "main"): 2 * LAYERS,
        ("all_reduce", size, "autograd"): 2 * LAYERS,
    }


@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_an_encoder_decoder_reduces_for_its_cross_attention_too(tmp_path: Path, feed_forward: str) -> None:
    graph = train(tmp_path, "t5", config={"feed_forward_proj": feed_forward})
    # Forward two a layer of the encoder, three a layer of the decoder.  Backward the same, and the gradient of the
    # encoder's output, which all cross attentions share, once.
    each = (2 + 3) * LAYERS
    assert counted(graph) == {("all_reduce", STREAM, "main"): each, ("all_reduce", STREAM, "autograd"): each + 1}


@pytest.mark.parametrize("family", BY_SEQUENCE)
def test_sequence_parallelism_scatters_and_gathers_instead(tmp_path: Path, family: str) -> None:
    graph = train(tmp_path, family, sequence_parallel=True, optimizer="none")
    # A layer gathers before attention and MLP and scatters behind them, in backward the other way round.  The head
    # needs the whole once more in forward, the embeddings' gradient in backward.  Sizes are of the whole tensor.
    assert counted(graph) == {
        ("all_gather", STREAM, "main"): 2 * LAYERS + 1,
        ("reduce_scatter", STREAM, "main"): 2 * LAYERS,
        ("reduce_scatter", STREAM, "autograd"): 2 * LAYERS,
        ("all_gather", STREAM, "autograd"): 2 * LAYERS + 1,
    }


def test_a_norms_gradient_is_a_part_until_it_is_used(tmp_path: Path) -> None:
    """Each rank's norms saw its own tokens.  DTensor sums their gradients where an op reads them: SGD's step once,
    AdamW's three times (lerp, and both factors of addcmul); FSDP before it shards them, once."""
    norms = 2 * LAYERS + 1  # a weight each, 32 wide
    for options, times in (({"optimizer": "sgd"}, 1), ({"optimizer": "adamw"}, 3)):
        graph = train(tmp_path, "llama", sequence_parallel=True, **options)
        assert counted(graph)["all_reduce", HIDDEN * 4, "main"] == times * norms
    graph = train(tmp_path, "llama", sequence_parallel=True, parallel="fsdp=2,tp=2")
    assert counted(graph)["all_reduce", HIDDEN * 4, "autograd"] == norms


def test_opt_without_a_last_norm_is_gathered_behind_its_last_block(tmp_path: Path) -> None:
    config = {"do_layer_norm_before": False}
    graph = train(tmp_path, "opt", sequence_parallel=True, optimizer="none", config=config)
    assert counted(graph)["all_gather", STREAM, "main"] == 2 * LAYERS + 1


def test_sequence_parallelism_runs_forward_too(tmp_path: Path) -> None:
    graph = train(tmp_path, "llama", mode="forward", dtype="float32", sequence_parallel=True)
    whole = {("all_gather", STREAM, "main"): 2 * LAYERS + 1, ("reduce_scatter", STREAM, "main"): 2 * LAYERS}
    assert counted(graph) == whole


@pytest.mark.parametrize(("family", "by_sequence"), [("t5", False), ("gpt2", True)])
def test_a_collective_is_waited_for_where_its_result_is_used_first(
    tmp_path: Path, family: str, by_sequence: bool
) -> None:
    """DTensor's styles redistribute asynchronously and wait at the first use, which is always the next kernel."""
    ops = ops_of(train(tmp_path, family, sequence_parallel=by_sequence))
    for index, op in enumerate(ops):
        if isinstance(op, Collective):
            following = next(o for o in ops[index + 1 :] if isinstance(o, Kernel))
            assert index in following.after


# What is split --------------------------------------------------------------------------------------------------------

# Elements of a layer that are split in two: all weights of projections, the biases of those by columns.
SPLIT = {
    "bert": LAYERS * (4 * 32 * 32 + 2 * 32 * 64 + 3 * 32 + 64),
    "gpt2": LAYERS * (4 * 32 * 32 + 2 * 32 * 128 + 3 * 32 + 128),
    "vit": LAYERS * (4 * 32 * 32 + 2 * 32 * 64 + 3 * 32 + 64),
    # Encoder layers have 4 projections of attention, decoder layers 8; the first of each 32 buckets for 4 heads.
    "t5": LAYERS * (12 * 32 * 32 + 2 * 2 * 32 * 64) + 2 * 32 * 4,
}


@pytest.mark.parametrize("family", SPLIT)
def test_each_rank_holds_its_part_of_the_projections(tmp_path: Path, family: str) -> None:
    whole, split = (train(tmp_path, family, parallel=plan) for plan in ("", "tp=2"))
    assert parameters(whole) - parameters(split) == SPLIT[family] // 2


def test_each_rank_attends_with_its_own_heads(tmp_path: Path) -> None:
    for family in ("bert", "gpt2", "t5"):
        graph = train(tmp_path, family, parallel="tp=4")
        queries = {w.inputs[0].shape for w in graph.works if w.op.endswith("efficient_attention")}
        assert {shape[1] for shape in queries} == {1}, family


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_sequence_parallelism_keeps_less_for_backward(tmp_path: Path, family: str) -> None:
    plain, by_sequence = (train(tmp_path, family, sequence_parallel=on, optimizer="none") for on in (False, True))
    # At least the inputs of a layer's two norms, [2, 16, 32] each, are kept in halves.
    assert peak(plain, "activation") - peak(by_sequence, "activation") >= LAYERS * 2 * STREAM // 2


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.parametrize("plan", ["dp=2,tp=2", "fsdp=2,tp=2"])
def test_products_with_data_parallelism(tmp_path: Path, family: str, plan: str) -> None:
    graph = train(tmp_path, family, parallel=plan)
    alone = train(tmp_path, family)
    assert counted(graph) == counted(alone)
    outer = plan.partition("=")[0]
    assert graph.groups == {outer: ((0, 2), (1, 3)), "tp": ((0, 1), (2, 3))}
    assert [rank.program for rank in graph.ranks] == [0, 0, 0, 0]
    if outer == "dp":  # every rank's own part of every gradient is reduced once
        reduced = sum(size * n for (kind, size, _), n in counted(graph, "dp").items() if kind == "all_reduce")
        assert reduced == gradients(graph)
    else:
        kinds = Counter(kind for kind, _, _ in counted(graph, "fsdp").elements())
        blocks = 2 * LAYERS if family == "t5" else LAYERS
        assert kinds == {"all_gather": 2 * blocks + 1, "reduce_scatter": blocks + 1}


def gradients(graph: OpGraph) -> int:
    return sum(op.bytes for op in ops_of(graph) if isinstance(op, Alloc) and op.category == "gradient")


# What cannot be -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("gpt2", {"parallel": "tp=8"}, "tp=8 does not divide the 4 attention heads"),
        ("llama", {"parallel": "tp=4"}, "tp=4 does not divide the 2 key and value heads"),
        ("bert", {"config": {"intermediate_size": 65}}, "tp=2 does not divide the 65 feed-forward columns"),
        ("gpt2", {"config": {"n_inner": 127}}, "tp=2 does not divide the 127 feed-forward columns"),
        ("t5", {"config": {"d_ff": 63}}, "tp=2 does not divide the 63 feed-forward columns"),
        ("resnet", {}, "there is one for bert, gpt2, llama, mistral, opt, qwen2, t5, vit"),
        ("t5", {"sequence_parallel": True}, "there is one for bert, gpt2, llama, mistral, opt, qwen2"),
        ("vit", {"sequence_parallel": True}, "--sequence-parallel: no plan for"),
        ("llama", {"sequence_parallel": True, "seq": 15}, "--parallel tp=2 does not divide --seq 15"),
        ("llama", {"sequence_parallel": True, "parallel": "dp=2"}, "--sequence-parallel: needs a tp axis"),
    ],
)
def test_what_cannot_be_split_is_said_in_one_line(
    tmp_path: Path, family: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        train(tmp_path, family, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_sizes_that_do_divide_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"4 attention heads of .*; 2, 4 would do"):
        train(tmp_path, "gpt2", parallel="tp=8")
    with pytest.raises(UserError, match=r"65 feed-forward columns of .*; no number would: leave tp out"):
        train(tmp_path, "bert", config={"intermediate_size": 65})


# Two real processes ---------------------------------------------------------------------------------------------------

CASES = [*FAMILIES, *(f"{family}+sequence" for family in BY_SEQUENCE)]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two gloo processes found that ran each family whole and split, with numbers in it."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "0").mkdir()
    (folder / "1").mkdir()
    command = [sys.executable, "-m", "tests.workload.real_tensor_parallel"]
    ranks = [
        subprocess.Popen([*command, str(rank), str(folder / "store"), str(folder), *CASES], stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    found, _ = (process.communicate(timeout=240)[0] for process in ranks)
    return dict(json.loads(found.splitlines()[-1]))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_split_model_computes_the_same(case: str, real: dict[str, Any]) -> None:
    assert real[case]["split_loss"] == pytest.approx(real[case]["loss"], rel=1e-6)
    assert real[case]["off"] < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_real_processes_issue_the_same_collectives(case: str, real: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    graph = synthesize(real_tensor_parallel.spec_of(case, tmp_path / "models", parallel="tp=2"))
    issued = [[op.kind, op.bytes] for op in ops_of(graph) if isinstance(op, Collective)]
    assert issued == real[case]["collectives"]
