"""synth: the graph that a CUDA run of a real transformers model has, checked by counts worked out by hand."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from sim.errors import UserError
from sim.graph import OpGraph
from sim.graph import read as read_graph
from sim.graph import write as write_graph
from sim.ops import Alloc, Collective, Free, Kernel
from sim.place.kernels import attention_flops
from sim.workload.cards import shipped_cards
from sim.workload.synth import SynthSpec, synthesize

TINY_LLAMA = {
    "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4, "intermediate_size": 160, "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
TINY_OPT = {
    "model_type": "opt", "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8,
    "ffn_dim": 256, "word_embed_proj_dim": 64, "max_position_embeddings": 128, "do_layer_norm_before": True,
}  # fmt: skip
LAYERS = 3


def model_folder(path: Path, config: dict[str, object]) -> str:
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


@pytest.fixture
def llama(tmp_path: Path) -> str:
    return model_folder(tmp_path, TINY_LLAMA)


@pytest.fixture
def opt(tmp_path: Path) -> str:
    return model_folder(tmp_path, TINY_OPT)


def kernels(graph: OpGraph) -> Counter[str]:
    return Counter(op.name for op in graph.programs[0].ops if isinstance(op, Kernel))


def gemm_flops(graph: OpGraph) -> int:
    flops = 0
    for op in graph.programs[0].ops:
        if isinstance(op, Kernel) and op.name in ("aten::mm", "aten::addmm"):
            left, right = graph.works[op.work or 0].inputs[-2:]
            flops += 2 * left.elements * right.shape[-1]
    return flops


def peak(graph: OpGraph, category: str | None = None) -> int:
    live, most, size = 0, 0, {}
    for op in graph.programs[0].ops:
        if isinstance(op, Alloc) and category in (None, op.category):
            size[op.block] = op.bytes
            live += op.bytes
        elif isinstance(op, Free) and op.block in size:
            live -= size.pop(op.block)
        most = max(most, live)
    return most


def test_a_llama_block_is_its_projections_and_one_fused_attention(llama: str) -> None:
    graph = synthesize(SynthSpec(model=llama, batch=2, seq=32))
    counted = kernels(graph)
    # Per layer q, k, v, o, gate, up, down; and the head. One flash kernel a layer, none of the CPU's own.
    assert counted["aten::mm"] == 7 * LAYERS + 1
    assert counted["aten::_scaled_dot_product_flash_attention"] == LAYERS
    assert not [name for name in counted if "cpu" in name or "mkldnn" in name]
    # 2 flops a multiply-add, 64 tokens; a layer: q and o 64 x 64, k and v 64 x 32, three of 64 x 160; head 64 x 1000.
    tokens = 2 * 32
    assert gemm_flops(graph) == 2 * tokens * (LAYERS * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160) + 64 * 1000)


def test_views_factories_and_metadata_cost_the_device_nothing(llama: str) -> None:
    counted = kernels(synthesize(SynthSpec(model=llama, batch=2, seq=32)))
    free = {"aten::view", "aten::t", "aten::transpose", "aten::slice", "aten::empty", "aten::ones", "aten::arange"}
    assert not free & set(counted)


def test_a_mask_takes_the_memory_efficient_kernel(tmp_path: Path) -> None:
    # Mistral's window of 16 tokens needs a mask at sequence 32: flash attention cannot take one.
    config = {**TINY_LLAMA, "model_type": "mistral", "sliding_window": 16}
    counted = kernels(synthesize(SynthSpec(model=model_folder(tmp_path, config), batch=2, seq=32)))
    assert counted["aten::_scaled_dot_product_efficient_attention"] == LAYERS
    assert counted["aten::_scaled_dot_product_flash_attention"] == 0


def test_float32_takes_the_memory_efficient_kernel(llama: str) -> None:
    counted = kernels(synthesize(SynthSpec(model=llama, batch=2, seq=32, dtype="float32")))
    assert counted["aten::_scaled_dot_product_efficient_attention"] == LAYERS


def test_every_block_that_is_not_a_parameter_or_input_is_freed(llama: str) -> None:
    for liveness in ("eager", "export"):
        graph = synthesize(SynthSpec(model=llama, batch=2, seq=32, liveness=liveness))
        graph.check()
        ops = graph.programs[0].ops
        freed = {op.block for op in ops if isinstance(op, Free)}
        alive = [op for op in ops if isinstance(op, Alloc) and op.block not in freed]
        assert {op.category for op in alive} <= {"parameter", "input"}


def test_export_frees_no_later_than_eager(llama: str) -> None:
    eager = synthesize(SynthSpec(model=llama, batch=2, seq=32))
    export = synthesize(SynthSpec(model=llama, batch=2, seq=32, liveness="export"))
    assert kernels(eager) == kernels(export)
    assert peak(export) < peak(eager)


def test_export_peak_is_the_closed_form(llama: str) -> None:
    # At log_softmax the logits are alive in float32 twice (upcast, result), 8 bytes each; labels padded and shifted
    # are small change: 2 x 32 int64 and its padded copy. Head and embedding dominate the parameters.
    graph = synthesize(SynthSpec(model=llama, batch=4, seq=128, liveness="export"))
    logits = 4 * 128 * 1000 * 8
    labels = 4 * 128 * 8 * 3
    assert peak(graph) - peak(graph, "parameter") == pytest.approx(logits, abs=labels)


def test_tensor_parallel_splits_the_work_and_reduces_twice_a_layer(opt: str) -> None:
    whole = synthesize(SynthSpec(model=opt, batch=2, seq=32))
    split = synthesize(SynthSpec(model=opt, batch=2, seq=32, parallel="tp=4"))
    reduces = [op for op in split.programs[0].ops if isinstance(op, Collective)]
    # Two all-reduces a layer of the [2, 32, 64] halves that leave attention and MLP: 8,192 bytes each.
    assert [(r.kind, r.bytes, r.group) for r in reduces] == [("all_reduce", 2 * 32 * 64 * 2, "tp")] * (2 * LAYERS)
    assert [r.seq for r in reduces] == list(range(2 * LAYERS))
    # All products but the head's (64 x 1000) are split in four.
    head = 2 * 2 * 32 * 64 * 1000
    assert (gemm_flops(whole) - head) == 4 * (gemm_flops(split) - head)
    # Attention runs over the same sequence with a quarter of the heads.
    flash = "aten::_scaled_dot_product_flash_attention"
    (attention,) = {w for w in split.works if w.op == flash}
    assert attention.inputs[0].shape == (2, 2, 32, 8)
    (undivided,) = {w for w in whole.works if w.op == flash}
    assert attention_flops(*attention.inputs[:2], True) * 4 == attention_flops(*undivided.inputs[:2], True)


def test_grouped_heads_are_split_too(llama: str) -> None:
    split = synthesize(SynthSpec(model=llama, batch=2, seq=32, parallel="tp=4"))
    (attention,) = {w for w in split.works if "flash" in w.op}
    assert [t.shape for t in attention.inputs[:2]] == [(2, 2, 32, 8), (2, 1, 32, 8)]


def test_a_collective_follows_compute_and_is_followed_by_it(opt: str) -> None:
    ops = synthesize(SynthSpec(model=opt, batch=2, seq=32, parallel="tp=2")).programs[0].ops
    first = next(i for i, op in enumerate(ops) if isinstance(op, Collective))
    # Out of place: the partial sums are cloned first, and the reduce waits for that clone's kernel.
    (before,) = ops[first].after
    assert isinstance(ops[before], Kernel) and ops[before].name == "aten::clone"
    follower = next(op for op in ops[first + 1 :] if isinstance(op, Kernel))
    assert first in follower.after


def test_a_product_of_axes_numbers_the_last_axis_fastest(opt: str) -> None:
    graph = synthesize(SynthSpec(model=opt, batch=2, seq=32, parallel="dp=2,tp=2"))
    assert graph.groups == {"dp": ((0, 2), (1, 3)), "tp": ((0, 1), (2, 3))}
    assert [r.program for r in graph.ranks] == [0, 0, 0, 0]


def test_the_same_spec_gives_the_same_bytes(llama: str, tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.workload.json.gz" for i in range(2)]
    for file in files:
        write_graph(synthesize(SynthSpec(model=llama, batch=2, seq=32)), file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert read_graph(files[0]) == synthesize(SynthSpec(model=llama, batch=2, seq=32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "--batch 0: must be at least 1"),
        ({"batch": 9999999999999}, "--batch 9999999999999: must be at most"),
        ({"seq": 129}, "--seq 129: .* has positions for 128 tokens"),
        ({"parallel": "tp=3"}, "tp=3 does not divide the 8 attention heads"),
        ({"parallel": "tp=8"}, "tp=8 does not divide the 4 key and value heads"),
        ({"parallel": "ep=2"}, "unknown axis in --parallel 'ep'"),
        ({"parallel": "tp=x"}, "the size of an axis is a whole number"),
        ({"parallel": "tp=2,tp=2"}, "axis 'tp' is named twice"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(llama: str, change: dict[str, object], message: str) -> None:
    spec = SynthSpec(**{"model": llama, "batch": 2, "seq": 32, **change})
    with pytest.raises(UserError, match=message) as error:
        synthesize(spec)
    assert "\n" not in str(error.value)


def test_the_cards_that_are_promised_are_there() -> None:
    sizes = {
        "opt": "125m 350m 1.3b 2.7b 6.7b 13b 30b 66b", "llama-2": "7b 13b 70b", "llama-3.1": "8b 70b",
        "mistral": "7b", "qwen2.5": "0.5b 1.5b 3b 7b 14b 32b 72b", "clm": "60m 200m 400m 1.1b",
        "bert": "base large", "t5": "small base large 3b 11b", "vit": "base large huge", "resnet": "50",
        "gpt2": "medium large xl",
    }  # fmt: skip
    promised = {f"{family}-{size}" for family, all_sizes in sizes.items() for size in all_sizes.split()} | {"gpt2"}
    cards = shipped_cards()
    assert promised <= set(cards)
    assert all(card.source and card.parameters for card in cards.values())


def test_a_model_that_does_not_exist_offers_the_nearest() -> None:
    with pytest.raises(UserError, match=r"did you mean 'opt-1\.3b'"):
        synthesize(SynthSpec(model="opt-1.3", batch=1, seq=8))


def test_where_no_model_is_near_all_are_named_with_their_whole_names() -> None:
    with pytest.raises(UserError, match=r"known are bert-base, .*, llama-3\.1-8b, .*, vit-large; or give a folder"):
        synthesize(SynthSpec(model="nothing-like-it", batch=1, seq=8))


def test_a_head_that_a_model_cannot_have_is_told_without_the_list_of_all_that_can(tmp_path: Path) -> None:
    spec = SynthSpec(model=model_folder(tmp_path, {"model_type": "bert"}), batch=1, seq=8, task="seq2seq-lm")
    with pytest.raises(UserError, match=r"as a sequence-to-sequence language model: Unrecognized .*BertConfig'>$"):
        synthesize(spec)


@pytest.mark.parametrize("name", shipped_cards())
def test_model_cards_have_the_parameters_they_say(name: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from sim.workload.cards import find_config
    from sim.workload.tasks import build_model, task_of

    spec, config = SynthSpec(model=name, batch=1), find_config(name)
    with FakeTensorMode():
        model = build_model(spec, config, task_of(spec, config))
    assert sum(p.numel() for p in model.parameters()) == shipped_cards()[name].parameters
