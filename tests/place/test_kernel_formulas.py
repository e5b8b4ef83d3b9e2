"""Formulas of the registry: what each op reads, computes and writes, by hand; every op that training dispatches."""

from __future__ import annotations

import pytest

from sim.ops import TensorMeta, Work
from sim.place.kernels import is_known, kernel_cost, memory_cost
from sim.place.kernels.memory import l2_bytes
from sim.topology.device import DeviceProfile, load_device


@pytest.fixture(scope="module")
def a5000() -> DeviceProfile:
    return load_device("rtx-a5000")


def single(*shape: int) -> TensorMeta:
    return TensorMeta("float32", shape)


def half(*shape: int) -> TensorMeta:
    return TensorMeta("float16", shape)


def cost_ns(device: DeviceProfile, op: str, *inputs: TensorMeta, outputs: tuple[TensorMeta, ...] = ()) -> int:
    return kernel_cost(Work(f"aten::{op}", inputs, outputs), device).ns


BIG = single(8192, 8192)  # 268 MB
MB = 268_435_456


# Bytes ----------------------------------------


def test_a_trace_without_outputs_costs_what_a_synthesized_op_does(a5000: DeviceProfile) -> None:
    assert cost_ns(a5000, "relu", BIG) == cost_ns(a5000, "relu", BIG, outputs=(BIG,))
    assert cost_ns(a5000, "add_", BIG, single(1)) == cost_ns(a5000, "add_", BIG, single(1), outputs=(BIG,))


def test_a_sum_only_reads(a5000: DeviceProfile) -> None:
    assert cost_ns(a5000, "sum", BIG) == memory_cost(MB, a5000).ns


def test_small_tensors_are_still_in_the_l2(a5000: DeviceProfile) -> None:
    # 2 MB in all on an L2 of 6.3 MB: 2.5 times the 684 GB/s of DRAM, 1.2 us, and the floor of 1.5 us.
    assert memory_cost(2_000_000, a5000).ns == pytest.approx(1500 + 2e6 / (2.5 * 684.3), rel=0.01)
    # An A100's L2 of 40 MiB counts half.
    assert l2_bytes(load_device("a100-sxm4-80gb")) == 20 * 1024 * 1024


def test_fused_adamw_reads_four_lists_and_writes_three(a5000: DeviceProfile) -> None:
    lists = (BIG,) * 4
    assert cost_ns(a5000, "_fused_adamw_", *lists, single()) == memory_cost(7 * MB, a5000).ns


@pytest.mark.parametrize(
    ("op", "inputs", "scalars", "moved"),
    [
        ("_foreach_mul_", (BIG, single(8192)), (("scalar", 0.9),), 2),
        ("_foreach_add_", (BIG, BIG), (("alpha", 1),), 3),
        ("_foreach_addcdiv_", (BIG, BIG, BIG), (), 4),
        ("_foreach_sqrt", (BIG,), (), 2),
        ("_foreach_lerp_", (BIG, BIG), (("weight", 0.1),), 3),
        ("_foreach_norm", (BIG,), (), 1),
        ("_foreach_zero_", (BIG,), (), 1),
        ("_foreach_copy_", (BIG, BIG), (), 2),
    ],
)
def test_foreach_ops_by_their_lists(
    a5000: DeviceProfile, op: str, inputs: tuple[TensorMeta, ...], scalars: tuple[tuple[str, float], ...], moved: int
) -> None:
    cost = kernel_cost(Work(f"aten::{op}", inputs, (), scalars), a5000)
    assert cost.ns == pytest.approx(memory_cost(moved * MB, a5000).ns, rel=1e-3)


def test_an_embedding_reads_what_it_picks_and_finds_each_element_s_row(a5000: DeviceProfile) -> None:
    # 16 x 1024 rows of 2048 halves: 67.1 MB read, as much written, 131 kB of indices: 196 us.  33.6 million elements at
    # 1.43 clocks of one of 64 SMs at 1.697 GHz (27.8 TFLOP/s of 2 x 128 lanes): 442 us.  Joined by a 2.58-norm.
    picked = half(16, 1024, 2048)
    ns = cost_ns(a5000, "embedding", half(50272, 2048), TensorMeta("int64", (16, 1024)), outputs=(picked,))
    moving = memory_cost(2 * picked.nbytes + 16 * 1024 * 8, a5000).ns - 1500
    finding = 1.43 * picked.elements / (64 * 1.697)
    assert ns == pytest.approx(1500 + (moving**2.58 + finding**2.58) ** (1 / 2.58), rel=0.001)


def test_the_gradient_of_an_embedding_fills_the_whole_table(a5000: DeviceProfile) -> None:
    # The table of 206 MB is written; 67 MB of gradients are read and added: 340 MB at least.
    table = half(50272, 2048)
    ns = cost_ns(
        a5000, "embedding_dense_backward", half(16, 1024, 2048), TensorMeta("int64", (16, 1024)), outputs=(table,)
    )
    assert ns >= memory_cost(table.nbytes + 2 * half(16, 1024, 2048).nbytes, a5000).ns


# Rows ----------------------------------------


def test_long_rows_are_read_again_from_dram_where_the_l2_is_small() -> None:
    # Rows of 16384 floats: an L4 holds all that are in flight in its 48 MiB and moves them twice (in, out); a T4's
    # 4 MiB do not, so it moves them four times.
    rows = single(65536, 16384)
    l4, t4 = load_device("l4"), load_device("t4")
    assert cost_ns(l4, "_softmax", rows) == pytest.approx(memory_cost(2 * rows.nbytes, l4).ns, rel=0.1)
    assert cost_ns(t4, "_softmax", rows) == pytest.approx(memory_cost(4 * rows.nbytes, t4).ns, rel=0.15)


def test_a_backward_takes_longer_than_its_forward(a5000: DeviceProfile) -> None:
    data, weight = half(16384, 2048), half(2048)
    forward = cost_ns(a5000, "native_layer_norm", data, weight, weight, outputs=(data,))
    backward = cost_ns(a5000, "native_layer_norm_backward", data, data, single(16384, 1), single(16384, 1), weight)
    assert backward > 1.5 * forward


def test_softmax_over_another_dim_moves_its_bytes(a5000: DeviceProfile) -> None:
    work = Work("aten::_softmax", (BIG,), (BIG,), (("dim", 0),))
    assert kernel_cost(work, a5000).ns == memory_cost(2 * MB, a5000).ns


# Products ----------------------------------------


def test_a_convolution_is_the_product_it_does(a5000: DeviceProfile) -> None:
    # 32 images, 3x3 over 256 channels of 28 x 28 to 256: a product [25088, 2304] x [2304, 256], but it moves the
    # tensors, not the unrolled windows. Bound by arithmetic both take the same time.
    weight = half(256, 256, 3, 3)
    data = TensorMeta("float16", (32, 256, 28, 28), (200704, 1, 7168, 256))  # channels last
    convolution = cost_ns(a5000, "convolution", data, weight, outputs=(data,))
    product = cost_ns(a5000, "mm", half(25088, 2304), half(2304, 256))
    # cuDNN's kernels reach 85 % of a product's speed forward, 74 % backward.
    # It moves 27 MB, the unrolled product 142 MB.
    assert product < convolution < product / 0.85
    both = cost_ns(a5000, "convolution_backward", data, data, weight, outputs=(data, weight))
    assert both == pytest.approx(2 * convolution * 0.85 / 0.74, rel=1e-3)


def test_tensor_cores_want_channels_last(a5000: DeviceProfile) -> None:
    # Other tensors are read and written once more each: 12.8 MB of data, as much of output, 1.2 MB of weight.
    weight, data = half(256, 256, 3, 3), half(32, 256, 28, 28)
    last = TensorMeta("float16", data.shape, (200704, 1, 7168, 256))
    turned = sum(memory_cost(2 * t.nbytes, a5000).ns for t in (data, weight, data))
    apart = cost_ns(a5000, "convolution", data, weight, outputs=(data,)) - cost_ns(
        a5000, "convolution", last, weight, outputs=(last,)
    )
    assert apart == turned
    # A window of one place is a plain product, and float32 lanes take any order.
    small = half(512, 256, 1, 1)
    out = half(32, 512, 28, 28)
    assert cost_ns(a5000, "convolution", data, small, outputs=(out,)) == cost_ns(
        a5000, "convolution", last, small, outputs=(out,)
    )


def test_a_convolution_in_float32_runs_in_tf32_where_there_is_any(a5000: DeviceProfile) -> None:
    # 55.6 TFLOP/s in TF32 of 111.1 in half precision, for the same products; a V100 has none, its float32 takes longer.
    shapes = ((32, 256, 28, 28), (512, 256, 1, 1), (32, 512, 28, 28))
    data, weight, out = (single(*shape) for shape in shapes)
    ns = cost_ns(a5000, "convolution", data, weight, outputs=(out,))
    narrow = cost_ns(a5000, "convolution", *(half(*shape) for shape in shapes[:2]), outputs=(half(*shapes[2]),))
    assert ns == pytest.approx(2 * narrow, rel=0.25)
    assert cost_ns(load_device("v100-sxm2"), "convolution", data, weight, outputs=(out,)) > 1.5 * ns


def test_a_depthwise_convolution_moves_bytes(a5000: DeviceProfile) -> None:
    data, weight = half(32, 512, 56, 56), half(512, 1, 3, 3)
    moved = 2 * data.nbytes + weight.nbytes
    assert cost_ns(a5000, "convolution", data, weight, outputs=(data,)) == memory_cost(moved, a5000).ns


def test_attention_backward_is_five_products_to_two(a5000: DeviceProfile) -> None:
    # Forward at 73 % of the rate, backward at 56 % with 2.5 times the operations: 3.3 times as long.
    heads = half(16, 32, 1024, 64)
    forward = cost_ns(a5000, "_scaled_dot_product_flash_attention", heads, heads, heads, outputs=(heads,))
    backward = cost_ns(a5000, "_scaled_dot_product_flash_attention_backward", heads, heads, heads, heads, heads)
    assert backward / forward == pytest.approx(2.5 * 0.73 / 0.56, rel=0.01)


def test_larger_heads_keep_the_tensor_cores_busier(a5000: DeviceProfile) -> None:
    # Heads of 64 reach 73 %: a score costs 0.37 products beside its own. Heads of 128: 0.37 x (1/2 + 1/4), 78 %.
    heads, wide = half(16, 32, 1024, 64), half(16, 32, 1024, 128)
    small = cost_ns(a5000, "_scaled_dot_product_flash_attention", heads, heads, heads, outputs=(heads,)) - 1500
    large = cost_ns(a5000, "_scaled_dot_product_flash_attention", wide, wide, wide, outputs=(wide,)) - 1500
    beside = 1 / 0.73 - 1
    assert large / small == pytest.approx(2 * (1 + 0.75 * beside) / (1 + beside), rel=0.001)


def test_sequences_take_whole_tiles(a5000: DeviceProfile) -> None:
    # 1025 queries take nine tiles of 128, 1025 keys seventeen of 64.
    def ns(queries: int, keys: int) -> int:
        query, key = half(64, 32, queries, 64), half(64, 32, keys, 64)
        return cost_ns(a5000, "_scaled_dot_product_flash_attention", query, key, key, outputs=(query,))

    assert ns(1025, 1025) == ns(9 * 128, 17 * 64) > ns(1024, 1024)


def test_a_mask_costs_arithmetic_for_every_score(a5000: DeviceProfile) -> None:
    # 16 x 32 heads of 1024 x 1024 scores at 10 of the 128 instructions that an SM issues a clock, 64 SMs at 1.697 GHz.
    heads = half(16, 32, 1024, 64)
    mask = TensorMeta("float16", (16, 32, 1024, 1024), (1 << 20, 0, 1024, 1))
    plain = cost_ns(a5000, "_scaled_dot_product_efficient_attention", heads, heads, heads, outputs=(heads,))
    masked = cost_ns(a5000, "_scaled_dot_product_efficient_attention", heads, heads, heads, mask, outputs=(heads,))
    assert masked - plain == pytest.approx(16 * 32 * 2**20 * 10 / 128 / (64 * 1.697), rel=0.001)


def test_a_loss_is_picked_by_one_block(a5000: DeviceProfile) -> None:
    # 16368 rows by 1024 threads: 16 rounds of two waits of 0.6 us, behind the floor of 1.5 us.
    ns = cost_ns(a5000, "nll_loss_forward", single(16368, 49152), TensorMeta("int64", (16368,)), outputs=(single(),))
    assert ns == 1500 + 16 * 2 * 600


def test_attention_by_math_is_slower_than_fused(a5000: DeviceProfile) -> None:
    heads = half(16, 32, 1024, 64)
    names = ("_flash_attention", "_efficient_attention", "_attention_math")
    times = [cost_ns(a5000, f"_scaled_dot_product{name}", heads, heads, heads, outputs=(heads,)) for name in names]
    assert times == sorted(times)


def test_ops_under_the_fused_ones_have_sequence_before_heads(a5000: DeviceProfile) -> None:
    heads, under = half(16, 32, 1024, 64), half(16, 1024, 32, 64)
    above = cost_ns(a5000, "_scaled_dot_product_flash_attention", heads, heads, heads)
    assert cost_ns(a5000, "_flash_attention_forward", under, under, under) == above


def test_transposed_operands_are_rows_of_16_bytes_too(a5000: DeviceProfile) -> None:
    # x [1024, 1000] times the transpose of W [1024, 1000]: rows of 1000 halves are 2000 bytes, 125 x 16: aligned.
    # Of W [1024, 1001] they are 2002 bytes.
    left, right = half(1024, 1000), TensorMeta("float16", (1000, 1024), (1, 1000))
    odd_left, odd = half(1024, 1001), TensorMeta("float16", (1001, 1024), (1, 1001))
    assert cost_ns(a5000, "mm", odd_left, odd) > 1.05 * cost_ns(a5000, "mm", left, right)


# Works that traces have ----------------------------------------


@pytest.mark.parametrize("op", ["mm", "convolution", "_softmax", "_flash_attention_forward", "embedding", "relu"])
def test_a_work_without_shapes_is_an_estimate_or_nothing(a5000: DeviceProfile, op: str) -> None:
    assert kernel_cost(Work(f"aten::{op}"), a5000).ns <= 1500


def test_a_formula_that_cannot_read_its_work_falls_back_to_bytes(a5000: DeviceProfile) -> None:
    cost = kernel_cost(Work("aten::cudnn_convolution_backward_input", (BIG, single())), a5000)
    assert cost.source == "estimate"
    assert cost.ns == memory_cost(MB + 4, a5000).ns


# What eager training of OPT, GPT-2, Llama, BERT, T5, ViT and ResNet dispatches to a GPU (forward, loss, backward,
# gradient clipping, foreach and fused optimizers), views and factories aside; PyTorch 2.13's native_functions.yaml.
TRAINING = """
addmm mm bmm baddbmm convolution convolution_backward cudnn_convolution
_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_backward
_scaled_dot_product_efficient_attention _scaled_dot_product_efficient_attention_backward
_scaled_dot_product_cudnn_attention _scaled_dot_product_cudnn_attention_backward
_flash_attention_forward _flash_attention_backward _efficient_attention_forward _efficient_attention_backward
native_layer_norm native_layer_norm_backward _fused_rms_norm _fused_rms_norm_backward
native_batch_norm native_batch_norm_backward cudnn_batch_norm cudnn_batch_norm_backward native_group_norm
native_group_norm_backward _softmax _softmax_backward_data _log_softmax _log_softmax_backward_data
nll_loss_forward nll_loss_backward nll_loss2d_forward nll_loss2d_backward mse_loss mse_loss_backward
embedding embedding_dense_backward index_select gather index index_put_ scatter scatter_add scatter_add_ topk sort
add add_ sub mul mul_ div div_ neg pow sqrt rsqrt exp log sin cos tanh tanh_backward relu relu_ threshold_backward
gelu gelu_backward silu silu_backward sigmoid sigmoid_backward clamp clamp_min clamp_min_ where masked_fill
masked_fill_ maximum minimum eq ne lt le gt ge logical_and logical_not bitwise_and bitwise_not isnan isinf abs sign
reciprocal erf lerp_ addcmul_ addcdiv_ rsub
clone _to_copy copy_ cat stack constant_pad_nd tril triu cumsum roll flip repeat fill_ zero_ select_backward
slice_backward sum mean amax max argmax any all var_mean linalg_vector_norm norm
native_dropout native_dropout_backward bernoulli_ uniform_ normal_
max_pool2d_with_indices max_pool2d_with_indices_backward avg_pool2d avg_pool2d_backward _adaptive_avg_pool2d
_adaptive_avg_pool2d_backward upsample_bicubic2d upsample_bilinear2d
_foreach_add_ _foreach_mul_ _foreach_div_ _foreach_addcmul_ _foreach_addcdiv_ _foreach_lerp_ _foreach_sqrt
_foreach_sqrt_ _foreach_div _foreach_norm _foreach_neg _foreach_copy_ _foreach_zero_ _foreach_maximum_
_fused_adam_ _fused_adamw_ _fused_sgd_ _amp_foreach_non_finite_check_and_unscale_
"""


def test_everything_that_training_dispatches_has_a_formula() -> None:
    assert [op for op in TRAINING.split() if not is_known(f"aten::{op}")] == []
