"""synth --mode train: the graph of a training step against real steps on this CPU and counts worked out by hand."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from sim.errors import UserError
from sim.graph import OpGraph
from sim.ops import Alloc, Copy, Free, HostCall, Kernel, Op
from sim.workload.cards import find_config
from sim.workload.foreach import launches
from sim.workload.synth import SynthSpec, synthesize
from sim.workload.tasks import build_model, no_cache, task_of
from tests.workload.real_step import kernels_of, peak_bytes, profiled_step
from tests.workload.tiny_models import IMAGES, LAYERS, TINY, model_folder

BATCH, SEQ = 2, 16


def train(path: Path, family: str = "gpt2", **options: Any) -> OpGraph:
    return synthesize(spec_of(path, family, **options))


def spec_of(path: Path, family: str, **options: Any) -> SynthSpec:
    changes = options.pop("config", {})
    folder = model_folder(path / "model", family, **changes)
    seq = None if family in IMAGES else SEQ
    return SynthSpec(**{"model": folder, "batch": BATCH, "seq": seq, "mode": "train", **options})


def ops_of(graph: OpGraph) -> tuple[Op, ...]:
    return graph.programs[0].ops


def kernels(graph: OpGraph) -> list[str]:
    return [op.name for op in ops_of(graph) if isinstance(op, Kernel)]


def parameters(graph: OpGraph) -> int:
    return sum(op.bytes for op in ops_of(graph) if isinstance(op, Alloc) and op.category == "parameter")


def live_by_category(graph: OpGraph, end: int) -> Counter[str]:
    live: dict[int, Alloc] = {}
    for op in ops_of(graph)[:end]:
        if isinstance(op, Alloc):
            live[op.block] = op
        elif isinstance(op, Free):
            live.pop(op.block)
    total: Counter[str] = Counter()
    for op in live.values():
        total[op.category] += op.bytes
    return total


def position(graph: OpGraph, name: str, last: bool = False) -> int:
    found = [i for i, op in enumerate(ops_of(graph)) if isinstance(op, Kernel | HostCall) and op.name == name]
    return found[-1 if last else 0]


# The same ops as a real step -----------------------------------------------------------------------------------------

# What the CPU does otherwise, and why: foreach adds the steps in one op that a CUDA run does on the host, where the
# profiler still sees it; the fill of a scalar_tensor is inside its allocation on the CPU; and the op that
# recomputation stops at is begun (and seen) but not run.
HOST_STEPS, STOPPED_AT = "aten::_foreach_add_", "aten::mm"


def dropped(names: list[str], name: str) -> list[str]:
    return [n for n in names if n != name]


def without_scalar_fills(names: list[str]) -> list[str]:
    """Without the second of two fills before a ``where``: its scalar."""
    fill, where = "aten::fill_", "aten::where"
    return [n for i, n in enumerate(names) if not (n == fill and names[i - 1 : i + 2] == [fill, fill, where])]


@pytest.mark.parametrize("family", TINY)
def test_a_step_has_the_ops_of_a_real_step_in_their_order(tmp_path: Path, family: str) -> None:
    # SGD has no step counters: the scalar of a mask is all there is to except.
    spec = spec_of(tmp_path, family, attention="eager", optimizer="sgd", momentum=0.9, max_grad_norm=1.0)
    made = kernels(synthesize(spec))
    real = kernels_of(profiled_step(spec), set(made))
    assert without_scalar_fills(made) == real


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer_kernels": "fused", "micro_batches": 2},
        {"optimizer_kernels": "for-loop"},
        {"autocast": "bfloat16", "max_grad_norm": 1.0},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "master_weights": True, "optimizer_kernels": "fused", "max_grad_norm": 1.0},
    ],
    ids=str,
)
def test_options_have_the_ops_of_a_real_step_too(tmp_path: Path, options: dict[str, Any]) -> None:
    spec = spec_of(tmp_path, "bert", attention="eager", **options)
    graph = synthesize(spec)
    real = kernels_of(profiled_step(spec), set(kernels(graph)))
    made = kernels(graph)
    if spec.optimizer_kernels == "foreach":
        made.insert(len(made) - 8, HOST_STEPS)  # before AdamW's eight ops over lists
    if spec.optimizer_kernels == "for-loop":
        made, real = (dropped(names, "aten::add_") for names in (made, real))  # a parameter's step, on the host
    if spec.autocast:
        made, real = (dropped(names, "aten::_to_copy") for names in (made, real))  # CUDA's softmax is in float32
    assert made == real


def test_checkpointing_recomputes_the_ops_that_a_real_step_recomputes(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "llama", attention="eager", optimizer="sgd", checkpoint="full")
    made = kernels(synthesize(spec))
    real = kernels_of(profiled_step(spec), set(made))
    assert Counter(without_scalar_fills(made)) + Counter({STOPPED_AT: LAYERS}) == Counter(real)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_the_peak_is_that_of_a_real_step(tmp_path: Path, family: str) -> None:
    spec = spec_of(tmp_path, family, attention="eager")
    graph = synthesize(spec)
    live = most = 0
    sizes = {op.block: op for op in ops_of(graph) if isinstance(op, Alloc)}
    for op in ops_of(graph):
        if isinstance(op, Alloc) and op.category not in ("parameter", "optimizer", "input"):
            live += op.bytes
            most = max(most, live)
        elif isinstance(op, Free):
            live -= sizes[op.block].bytes
    # The CPU's kernels allocate a few scalars and small buffers of their own.
    assert most == pytest.approx(peak_bytes(profiled_step(spec)), rel=0.01)


# Threads, memory, counts ---------------------------------------------------------------------------------------------


def test_backward_runs_on_the_engines_thread_and_the_main_thread_waits(tmp_path: Path) -> None:
    graph = train(tmp_path)
    ops, lanes = ops_of(graph), graph.programs[0].lanes
    assert [lane.name for lane in lanes] == ["main", "compute", "autograd"]
    first = next(i for i, op in enumerate(ops) if op.lane == 2)
    last = max(i for i, op in enumerate(ops) if op.lane == 2)
    (call,) = ops[first].after
    assert isinstance(ops[call], HostCall) and ops[call].name == "autograd::Engine::execute" and ops[call].lane == 0
    assert not any(op.lane == 0 for op in ops[first:last])
    after = next(op for op in ops[last + 1 :] if op.lane == 0)
    assert after.after == (last,)
    # Which ops run where: every product of backward on the engine's thread, the optimizer on the main one.
    launchers = {op.name: ops[op.launch].lane for op in ops if isinstance(op, Kernel) and op.launch is not None}
    assert launchers["aten::native_layer_norm_backward"] == 2
    assert launchers["aten::_foreach_addcdiv_"] == 0


def test_adamw_in_float32_holds_sixteen_bytes_a_parameter(tmp_path: Path) -> None:
    graph = train(tmp_path)
    count = parameters(graph) // 4
    # While the optimizer runs, parameters, gradients and two states are there: 4 x 4 bytes; and foreach's square
    # roots of the second states, 4 more, which are temporary.
    at_update = live_by_category(graph, position(graph, "aten::_foreach_addcdiv_"))
    assert at_update["parameter"] == at_update["gradient"] == 4 * count
    assert at_update["optimizer"] == 8 * count
    assert at_update["temporary"] == 4 * count
    assert "activation" not in at_update


def test_fused_adamw_needs_no_temporaries(tmp_path: Path) -> None:
    graph = train(tmp_path, optimizer_kernels="fused")
    at_update = live_by_category(graph, position(graph, "aten::_fused_adamw_"))
    # Fused keeps a step counter of 4 bytes a tensor on the device: gpt2 has 2 embeddings, 12 tensors a block, 2 last.
    tensors = 2 + 12 * LAYERS + 2
    assert at_update["optimizer"] == 2 * parameters(graph) + 4 * tensors
    assert "temporary" not in at_update


def test_what_is_left_after_a_step_is_what_was_there_before(tmp_path: Path) -> None:
    for options in ({}, {"optimizer": "sgd"}, {"optimizer": "none"}, {"checkpoint": "full", "micro_batches": 2}):
        graph = train(tmp_path, **options)
        begin = next(i for i, op in enumerate(ops_of(graph)) if type(op).__name__ == "Mark")
        assert live_by_category(graph, len(ops_of(graph))) == live_by_category(graph, begin)


def test_activations_are_what_backward_needs(tmp_path: Path) -> None:
    # A linear layer's input, for one: [2, 16, 32] float32 before each of q, k, v (one tensor), out, fc1; [2, 16, 64]
    # before fc2. So at least 4 KiB x 3 + 8 KiB a block are activations when backward begins; with checkpointing only
    # the block's own input, 4 KiB, is.
    kept = train(tmp_path, "opt")
    recomputed = train(tmp_path, "opt", checkpoint="full")
    at = [live_by_category(g, position(g, "autograd::Engine::execute"))["activation"] for g in (kept, recomputed)]
    token = 32 * 4
    assert at[0] - at[1] >= LAYERS * BATCH * SEQ * (2 * token + 2 * token)
    assert at[1] >= LAYERS * BATCH * SEQ * token


def test_backward_has_two_products_for_each_of_forward(tmp_path: Path) -> None:
    counted = Counter(kernels(train(tmp_path, "llama")))
    # Seven projections a block and the head: forward once, backward for the weight and for the input.
    assert counted["aten::mm"] == 3 * (7 * LAYERS + 1)
    assert counted["aten::_scaled_dot_product_efficient_attention_backward"] == LAYERS


@pytest.mark.parametrize("family", TINY)
def test_every_family_has_a_forward_step_too(tmp_path: Path, family: str) -> None:
    graph = synthesize(spec_of(tmp_path, family, mode="forward"))
    assert [lane.name for lane in graph.programs[0].lanes] == ["main", "compute"]
    assert not [name for name in kernels(graph) if "backward" in name]


def product_flops(graph: OpGraph) -> int:
    """Two for each multiply-add of matrix products and convolutions."""
    flops = 0
    for op in ops_of(graph):
        work = graph.works[op.work or 0] if isinstance(op, Kernel) else None
        if work is not None and work.op in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"):
            left, right = work.inputs[-2:]
            flops += 2 * left.elements * right.shape[-1]
        elif work is not None and work.op == "aten::convolution":
            flops += 2 * work.outputs[0].elements * math.prod(work.inputs[1].shape[1:])
    return flops


@pytest.mark.parametrize("family", TINY)
def test_forward_flops_are_pytorchs_own_count(tmp_path: Path, family: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    spec = spec_of(tmp_path, family, attention="eager", mode="forward", dtype="float32")
    config = find_config(spec.model)
    task = task_of(spec, config)
    model = build_model(spec, config, task)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**task.batch(spec, config), **no_cache(model))
    assert product_flops(synthesize(spec)) == counter.get_total_flops() > 0


def test_dropout_is_one_kernel_as_on_a_gpu(tmp_path: Path) -> None:
    counted = Counter(kernels(train(tmp_path, "opt", config={"dropout": 0.1})))
    # After attention and after the MLP of each block; OPT drops nothing from its embeddings.
    assert counted["aten::native_dropout"] == counted["aten::native_dropout_backward"] == 2 * LAYERS
    assert counted["aten::bernoulli_"] == 0


def test_a_mask_in_half_precision_is_softmaxed_in_one_kernel(tmp_path: Path) -> None:
    graph = train(tmp_path, "llama", attention="eager", dtype="float16")
    softmax = [
        graph.works[op.work or 0] for op in ops_of(graph) if isinstance(op, Kernel) and op.name == "aten::_softmax"
    ]
    assert {(w.inputs[0].dtype, w.outputs[0].dtype) for w in softmax} == {("float16", "float32")}


def test_flash_attention_takes_no_mask_and_wants_half_precision(tmp_path: Path) -> None:
    config = {"model_type": "mistral", "sliding_window": 4}
    counted = Counter(kernels(train(tmp_path, "llama", attention="flash", dtype="bfloat16", config=config)))
    assert counted["aten::_scaled_dot_product_flash_attention"] == LAYERS
    assert counted["aten::_scaled_dot_product_flash_attention_backward"] == LAYERS


def test_autocast_runs_products_in_half_and_norms_in_float32(tmp_path: Path) -> None:
    graph = train(tmp_path, "bert", autocast="float16")
    dtypes = {op.name: graph.works[op.work or 0].inputs[-1].dtype for op in ops_of(graph) if isinstance(op, Kernel)}
    assert dtypes["aten::addmm"] == "float16"
    assert dtypes["aten::native_layer_norm"] == "float32"
    assert dtypes["aten::_foreach_addcdiv_"] == "float32"
    # Each weight is cast once in forward, and its gradient back in backward; [64, 32] is the first layer of an MLP.
    names = [op for op in ops_of(graph) if isinstance(op, Kernel) and op.name == "aten::_to_copy"]
    shapes = Counter(graph.works[op.work or 0].inputs[0].shape for op in names)
    assert shapes[(64, 32)] == 2 * LAYERS


def test_loss_scaling_asks_the_device_whether_gradients_overflowed(tmp_path: Path) -> None:
    graph = train(tmp_path, "bert", autocast="float16", loss_scaling=True)
    counted = Counter(kernels(graph))
    assert counted["aten::_amp_foreach_non_finite_check_and_unscale_"] == 1
    assert counted["aten::_amp_update_scale_"] == 1
    # The host waits for the answer before the optimizer starts; the other question is the mask's.
    reads = [op for op in ops_of(graph) if isinstance(op, Copy) and op.kind == "d2h"]
    assert len(reads) == 2


def test_accumulating_adds_into_the_gradients_in_place(tmp_path: Path) -> None:
    once, twice = (Counter(kernels(train(tmp_path, "llama", micro_batches=n))) for n in (1, 2))
    # Each of 9 tensors a block, embedding, head and last norm gets its second gradient added in place.
    assert twice["aten::add_"] - 2 * once["aten::add_"] == 9 * LAYERS + 3
    assert twice["aten::_foreach_addcdiv_"] == 1


def test_modules_are_known_in_forward_and_in_backward(tmp_path: Path) -> None:
    ops = [op for op in ops_of(train(tmp_path, "llama")) if isinstance(op, Kernel) and op.name == "aten::mm"]
    down = [i for i, op in enumerate(ops) if op.module == "LlamaForCausalLM.model.layers.1.mlp.down_proj"]
    # Forward: 14 block products, the head; backward begins with the head's two, then this one's two.
    assert down == [13, 17, 18]


@pytest.mark.parametrize(
    ("options", "states"),
    [
        ({}, 2),
        ({"dtype": "bfloat16", "master_weights": True}, 6),
        ({"parallel": "fsdp=2"}, 2),
        ({"parallel": "tp=2"}, 2),
    ],
    ids=str,
)
def test_memory_is_of_one_module_as_parameter_gradient_and_state(
    tmp_path: Path, options: dict[str, Any], states: int
) -> None:
    total: Counter[tuple[str, str]] = Counter()
    for op in ops_of(train(tmp_path, "llama", **options)):
        if isinstance(op, Alloc) and op.name != "unsharded_parameter":
            total[op.category, op.module] += op.bytes
    of_parameters = {module: held for (category, module), held in total.items() if category == "parameter"}
    root = "FSDPLlamaForCausalLM" if "fsdp" in str(options) else "LlamaForCausalLM"
    blocks = ("input_layernorm", "post_attention_layernorm", *(f"self_attn.{n}_proj" for n in "qkvo"))
    blocks += tuple(f"mlp.{n}_proj" for n in ("gate", "up", "down"))
    trained = {f"{root}.model.layers.{i}.{name}" for i in range(LAYERS) for name in blocks}
    trained |= {f"{root}.lm_head", f"{root}.model.embed_tokens", f"{root}.model.norm"}
    assert trained | {f"{root}.model.rotary_emb"} == set(of_parameters)  # which has buffers alone
    for module in trained:
        # AdamW keeps two values a parameter, master weights a third, each twice the bytes of bfloat16.
        assert total["optimizer", module] == states * of_parameters[module]
        if not options:
            assert total["gradient", module] == of_parameters[module]


def test_the_same_spec_gives_the_same_graph(tmp_path: Path) -> None:
    assert train(tmp_path, "llama", checkpoint="full") == train(tmp_path, "llama", checkpoint="full")


def test_multi_tensor_kernels_are_counted_as_they_are_launched() -> None:
    chunk = 65536
    assert launches([10], 1) == 1
    assert launches([chunk * 2240], 1) == 1
    assert launches([chunk * 2240 + 1], 1) == 2
    # With four lists 252 tensors fit: 253 small ones take two launches, and empty tensors none.
    assert launches([1] * 252, 4) == 1
    assert launches([1] * 253 + [0] * 5, 4) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0, "micro_batches": 0}, "--batch 0: must be at least 1; --micro-batches 0: must be at least 1"),
        ({"seq": None}, "--seq is missing"),
        ({"liveness": "export"}, "--liveness export: an exported module runs forward only"),
        ({"momentum": 0.9}, "--momentum 0.9: is an option of --optimizer sgd"),
        ({"autocast": "float16", "dtype": "float16"}, "--autocast float16: keeps parameters in float32"),
        ({"attention": "flash"}, "--attention flash: computes in half precision"),
        ({"mode": "forward", "optimizer": "sgd"}, "--optimizer: is an option of --mode train"),
        ({"max_grad_norm": -1.0}, "--max-grad-norm -1: must be more than 0"),
        ({"task": "image-classification", "seq": None}, "cannot build it as an image classifier"),
        ({"batch": "many"}, "--batch: Expected `int`, got `str`"),
    ],
)
def test_what_cannot_be_trained_is_said_in_one_line(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        train(tmp_path, "llama", **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_images_have_no_sequence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--seq 16: .* reads images, not sequences"):
        train(tmp_path, "vit", seq=16)


def test_flash_attention_is_refused_where_the_model_has_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--attention flash: transformers has no flash attention for T5"):
        train(tmp_path, "t5", attention="flash", dtype="bfloat16")


def test_a_model_that_fails_is_told_with_its_place(tmp_path: Path) -> None:
    config = {"decoder_start_token_id": None}
    with pytest.raises(UserError, match=r"fails under fake tensors at .*modeling_t5.py:\d+: ValueError"):
        train(tmp_path, "t5", config=config)
