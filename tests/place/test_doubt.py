"""What may be wrong with an operation: the class of its kernel, whose intervals count, what nobody doubts."""

from __future__ import annotations

from pathlib import Path

import pytest

import sim
from sim.ops import Collective, HostCall, Kernel, TensorMeta, Work
from sim.place.doubt import CARD, COMMON, ESTIMATE, NAMES, UNMEASURED, op_class
from sim.place.placement import NONE, Kind, Placement
from sim.topology.device import load_device
from tests.whatif.layers import layered


def work(op: str, dtype: str = "float16") -> Work:
    tensor = TensorMeta(dtype, (8, 8))
    return Work(f"aten::{op}", (tensor, tensor), (tensor,))


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("addmm", "gemm_float16"),
        ("bmm", "gemm_float16"),
        ("_scaled_dot_product_attention_math", "gemm_float16"),
        ("_scaled_dot_product_flash_attention_backward", "attention"),
        ("convolution_backward", "convolution"),
        ("cudnn_batch_norm", "other"),
        ("embedding_dense_backward", "other"),
        ("_foreach_addcdiv_", "other"),
        ("_log_softmax", "softmax"),
        ("_log_softmax_backward_data", "other"),
        ("native_layer_norm_backward", "other"),
        ("sum", "other"),
        ("native_dropout", "other"),
        ("native_layer_norm", "layer_norm"),
        ("_fused_rms_norm", "layer_norm"),
        ("linalg_vector_norm", "other"),
        ("gelu", "elementwise"),
    ],
)
def test_the_class_of_an_op(op: str, name: str) -> None:
    assert op_class(work(op)) == name
    assert name in NAMES and (name in COMMON or name in UNMEASURED)


def test_products_by_the_units_that_run_them() -> None:
    assert op_class(work("mm", "bfloat16")) == "gemm_float16"
    assert op_class(work("mm", "float32")) == "gemm_float32"
    assert op_class(None) == "elementwise"


def test_an_elementwise_kernel_is_one_that_was_measured_where_all_is_dense() -> None:
    dense, turned = TensorMeta("float16", (8, 64)), TensorMeta("float16", (8, 64), (1, 8))
    one_row, wide = TensorMeta("float16", (1, 64)), TensorMeta("float32", (8, 64))
    classes = {
        op_class(Work("aten::add", inputs, (dense,))) for inputs in ((dense, turned), (dense, one_row), (dense, wide))
    }
    assert classes == {"strided"} and op_class(Work("aten::add", (dense, dense), (dense,))) == "elementwise"


def kinds(placement: Placement, kind: type) -> list[Kind]:
    """The doubts of the operations of one type on rank 0, in order."""
    ops = placement.graph.programs[placement.ranks[0].program].ops
    of = placement.doubts.ranks[placement.ranks[0].rank].kind
    return [placement.doubts.kinds[of[i]] for i, op in enumerate(ops) if isinstance(op, kind) and of[i] != NONE]


def test_a_measured_kernel_on_the_same_gpu_is_in_doubt_by_the_card_alone() -> None:
    # The layers' kernels were measured on an A5000.
    placement = sim.place(layered(2), sim.load_topology("a5000x2"))
    assert {tuple(part.interval for part in kind) for kind in kinds(placement, Kernel)} == {(CARD,)}
    assert len(kinds(placement, Collective)) == 24 and not kinds(placement, HostCall)


def test_on_another_gpu_the_model_is_in_doubt_on_both() -> None:
    placement = sim.place(layered(2), sim.load_topology("a6000x8"), (0, 1))
    here, there, card = kinds(placement, Kernel)[0]
    # No shapes, and a name that says nothing: bytes, whose interval is that of devices left out, turned round there.
    spread = load_device("t4").calibration.spread["elementwise"]
    assert here.interval[:2] == (spread.borrowed_p10, spread.borrowed_p90)
    assert there.interval[:2] == (1 / spread.borrowed_p90, 1 / spread.borrowed_p10)
    assert (here.source.name, there.source.name) == (
        "elementwise kernels on NVIDIA RTX A6000",
        "elementwise kernels on NVIDIA RTX A5000",
    )
    assert card.interval == CARD


def test_a_device_with_shapes_left_out_has_its_own_interval(root: Path) -> None:
    graph = sim.read(root / "traces" / "seed" / "clm-60m-x1.workload.json.gz").graph
    intervals = {}
    for device in ("a40", "h100-pcie"):
        placement = sim.place(graph, sim.load_topology("a5000x1", {"devices.profile": device}))
        parts = {kind[0].source.name: kind[0].interval for kind in kinds(placement, Kernel)}
        (name,) = (name for name in parts if name.startswith("matrix products in half"))
        intervals[device] = parts[name]
    spread = load_device("a40").calibration.spread["gemm_float16"]
    assert intervals["a40"] == (spread.p10, spread.p90, COMMON["gemm_float16"][0])
    assert intervals["h100-pcie"] == (spread.borrowed_p10, spread.borrowed_p90, COMMON["gemm_float16"][1])
    assert ESTIMATE not in intervals.values()


def test_as_captured_nothing_is_in_doubt() -> None:
    assert sim.place(layered(1, nbytes=0), None).doubts.kinds == ()
