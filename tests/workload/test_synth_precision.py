"""TF32 products, master weights and the memory format of images: what they change in a step, by hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sim.errors import UserError
from sim.graph import OpGraph
from sim.ops import Alloc, Free, Kernel, TensorMeta, Work
from sim.place.kernels import kernel_cost
from sim.topology.device import load_device
from sim.workload.builder import ProgramBuilder
from sim.workload.record import Recorder
from sim.workload.synth import SynthSpec, synthesize
from tests.workload.tiny_models import IMAGES, LAYERS, model_folder


def train(path: Path, family: str = "llama", **options: Any) -> OpGraph:
    folder = model_folder(path / "model", family, **options.pop("config", {}))
    seq = None if family in IMAGES else 16
    return synthesize(SynthSpec(**{"model": folder, "batch": 2, "seq": seq, "mode": "train", **options}))


def kernels(graph: OpGraph) -> list[tuple[str, Work]]:
    ops = (op for op in graph.programs[0].ops if isinstance(op, Kernel))
    return [(op.name, graph.works[op.work or 0]) for op in ops]


# TF32 ----------------------------------------------------------------------------------------------------------------


def test_products_of_float32_may_run_in_tf32_and_nothing_else(tmp_path: Path) -> None:
    allowed = Counter(name for name, work in kernels(train(tmp_path, tf32=True)) if work.scalar("allow_tf32"))
    # Seven projections a layer and the head, each three times.
    assert allowed == {"aten::mm": 3 * (7 * LAYERS + 1)}
    half = train(tmp_path, tf32=True, autocast="bfloat16", attention="flash")
    assert not [name for name, work in kernels(half) if work.scalar("allow_tf32")]


def product(dtype: str, *scalars: tuple[str, bool]) -> Work:
    square = TensorMeta(dtype, (4096, 4096))
    return Work("aten::mm", (square, square), (square,), scalars)


def test_options_that_would_change_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--tf32: no product of --dtype bfloat16 is in float32; choose --dtype float32"):
        train(tmp_path, tf32=True, dtype="bfloat16")
    with pytest.raises(UserError, match="--optimizer-kernels fused: is an option of an optimizer; choose one"):
        train(tmp_path, optimizer="none", optimizer_kernels="fused")


def test_a_product_in_tf32_is_as_fast_as_the_device_is_in_it() -> None:
    allowed, plain = product("float32", ("allow_tf32", True)), product("float32")
    a5000, v100 = load_device("rtx-a5000"), load_device("v100-pcie")
    # 2 x 4096^3 flops at 55.6 TFLOP/s and at 27.8 take no less than 2.47 and 4.94 ms.
    assert 2.47e6 < kernel_cost(allowed, a5000).ns < 4.94e6 < kernel_cost(plain, a5000).ns
    assert kernel_cost(allowed, a5000) == kernel_cost(product("tfloat32"), a5000)
    # A V100 has none.
    assert kernel_cost(allowed, v100) == kernel_cost(plain, v100)


# Autocast ------------------------------------------------------------------------------------------------------------


def test_what_autocast_lets_go_of_at_its_end_is_freed_in_the_order_it_was_made() -> None:
    builder = ProgramBuilder()
    with FakeTensorMode():
        layers, given = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(16))), torch.zeros(2, 4)
        recorder = Recorder(builder, training=True)
        with recorder:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                made = layers(given)
                before = len(builder.ops)
            after = len(builder.ops)
            recorder.stopped = True
    assert made.dtype == torch.bfloat16
    freed = [op.block for op in builder.ops[before:after] if isinstance(op, Free)]
    # The casts of 16 biases and of the first weight; the others backward needs, for the gradients of what came in.
    assert len(freed) == 16 + 1
    assert freed == sorted(freed)


# Master weights ------------------------------------------------------------------------------------------------------


def live_at(graph: OpGraph, name: str) -> Counter[str]:
    """Bytes by category when the first kernel of that name runs."""
    live: dict[int, Alloc] = {}
    for op in graph.programs[0].ops:
        if isinstance(op, Alloc):
            live[op.block] = op
        elif isinstance(op, Free):
            live.pop(op.block)
        elif isinstance(op, Kernel) and op.name == name:
            break
    total: Counter[str] = Counter()
    for alloc in live.values():
        total[alloc.category] += alloc.bytes
    return total


def test_an_optimizer_with_master_weights_works_on_float32_copies(tmp_path: Path) -> None:
    graph = train(tmp_path, "gpt2", dtype="float16", master_weights=True, max_grad_norm=1.0)
    at_update = live_at(graph, "aten::_foreach_addcdiv_")
    count = at_update["parameter"] // 2
    # float16 parameters; gradients in float32 alone; master weights and AdamW's two states in float32.
    assert at_update["gradient"] == 4 * count
    assert at_update["optimizer"] == 12 * count
    copies = [work for name, work in kernels(graph) if name == "aten::_foreach_copy_"]
    names = [name for name, _ in kernels(graph)]
    assert len(copies) == 2
    # Gradients go up before they are clipped, weights come down after the update.
    assert names.index("aten::_foreach_copy_") < names.index("aten::_foreach_norm")
    assert names[-1] == "aten::_foreach_copy_"


def test_master_weights_are_each_ranks_own_under_data_and_tensor_parallelism(tmp_path: Path) -> None:
    for plan in ("dp=2", "tp=2"):
        graph = train(tmp_path, "gpt2", dtype="bfloat16", master_weights=True, parallel=plan, max_grad_norm=1.0)
        at_update = live_at(graph, "aten::_foreach_addcdiv_")
        assert at_update["optimizer"] == 6 * at_update["parameter"]


# Channels last -------------------------------------------------------------------------------------------------------


def test_images_may_lie_channels_last(tmp_path: Path) -> None:
    plain, last = (train(tmp_path, "resnet", channels_last=on) for on in (False, True))

    def innermost(graph: OpGraph) -> set[bool]:
        convolved = (work.inputs[:2] for name, work in kernels(graph) if name == "aten::convolution")
        # A window of one place, or one channel in, lies both ways.
        return {t.stride is not None and t.stride[1] == 1 for pair in convolved for t in pair if t.shape[2] > 1}

    assert innermost(plain) == {False}
    assert innermost(last) == {True}
    counts = [Counter(name for name, _ in kernels(graph) if "convolution" in name) for graph in (plain, last)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels_last": True}, "--channels-last: is a memory format of images"),
        ({"master_weights": True}, "--master-weights: are float32 copies of parameters in half precision"),
        ({"master_weights": True, "dtype": "float16", "parallel": "fsdp=2"}, "--master-weights: fsdp keeps float32"),
        ({"master_weights": True, "dtype": "float16", "optimizer": "none"}, "--master-weights: is an option of"),
        ({"master_weights": True, "mode": "forward"}, "--master-weights: is an option of --mode train"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        train(tmp_path, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
