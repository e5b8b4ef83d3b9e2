"""Kernels by the class of their name, and what a measurement becomes on another device."""

from __future__ import annotations

import pytest

from sim.place.kernels import kernel_cost
from sim.place.named import NameClass, Unexplained, carried_over_ns, class_of, dtype_of, ratio
from sim.place.named import _product as product
from sim.topology.device import load_device

V100, A100, A5000 = (load_device(name) for name in ("v100-sxm2", "a100-sxm4-40gb", "rtx-a5000"))


@pytest.mark.parametrize(
    ("name", "op", "kind", "dtype"),
    [
        ("volta_sgemm_64x64_nt", "aten::mm", "products", "float32"),
        ("volta_sgemm_64x64_nt", "aten::cudnn_convolution", "convolutions", "float32"),
        ("volta_scudnn_winograd_128x128_ldg1_ldg4_relu_tile148t_nt_v1", "", "convolutions", "float32"),
        ("void cudnn::detail::dgrad_engine<float, 512, 6, 5, 3, 3, 3, false>(int)", "", "convolutions", "float32"),
        ("void cutlass::Kernel<cutlass_80_tensorop_s1688gemm_256x64_16x4_nn_align4>", "", "products", "tfloat32"),
        ("sm80_xmma_wgrad_implicit_gemm_indexed_tf32f32_tf32f32_f32_nhwckrsc_nhwc", "", "convolutions", "tfloat32"),
        ("ampere_fp16_s16816gemm_fp16_128x128_ldg8_f2f_stages_32x5_tn", "", "products", "float16"),
        ("volta_h884gemm_128x64_ldg8_nn", "", "products", "float16"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "", "products", "float16"),
        ("void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128>>", "", "attention", ""),
        ("fmha_cutlassF_f16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)", "", "attention", ""),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "", "bytes", ""),
        ("void cudnn::ops::nchwToNhwcKernel<float, float, float>", "aten::cudnn_convolution", "bytes", ""),
        ("void cudnn::winograd_nonfused::winogradForwardData4x4<float>", "aten::cudnn_convolution", "bytes", ""),
        ("void cudnn::cnn::reduce_wgrad_nchw_helper<float, float>", "", "bytes", ""),
        ("void splitKreduce_kernel<32, 16, int, float>", "", "bytes", ""),
        ("void cudnn::bn_bw_1C11_kernel_new<float, float, float2, 128, true, 1>", "", "bytes", ""),
        ("void at_cuda_detail::cub::DeviceRadixSortSingleTileKernel", "", "bytes", ""),
        ("void fbgemm_gpu::permute_2D_lengths_kernel<int>(int, int)", "", "bytes", ""),
        ("void gemmSN_TN_kernel<float, 128, 16, 2, 4, 8, 9, false, cublasGemvTensor>", "", "products", "float32"),
        ("void gemv2T_kernel_val<int, int, float, float, float>", "", "bytes", ""),
        ("void GammaBetaBackwardCUDAKernel_32x32<float>(gamma_grad)", "", "bytes", ""),
        ("somebody_s_own_kernel", "", "bytes", ""),
    ],
)
def test_what_a_name_says(name: str, op: str, kind: NameClass, dtype: str) -> None:
    assert class_of(name, op) == kind
    if dtype:
        assert dtype_of(name) == dtype


def test_bytes_go_by_bandwidth_beyond_the_floor() -> None:
    # V100 900 GB/s at 0.909, lent by the PCIe card; A100 1555 at 0.881: 0.597 of the time. Floors of 1.3 and 1.5 us.
    assert ratio("bytes", "float32", V100, A100) == pytest.approx(900 * 0.909 / (1555 * 0.881), rel=0.01)
    assert carried_over_ns(101_300, "bytes", "float32", V100, A100) == pytest.approx(1500 + 59_700, rel=0.01)
    assert carried_over_ns(1300, "bytes", "float32", V100, A100) == 1500
    assert carried_over_ns(0, "bytes", "float32", V100, A100) == 0


def test_products_go_by_the_model_of_one() -> None:
    there, here = (kernel_cost(product("float32"), device).ns for device in (V100, A5000))
    assert ratio("products", "float32", V100, A5000) == here / there
    # TF32 is done in float32 where there is none.
    tf32, single = kernel_cost(product("tfloat32"), A100).ns, kernel_cost(product("float32"), V100).ns
    assert ratio("products", "tfloat32", A100, V100) == single / tf32


def test_a_convolution_in_float32_runs_in_tf32_where_there_is_any() -> None:
    # 60 ms of ResNet50's convolutions a step on a V100 took 18.7 on an A100, products alone 13 to 14.
    assert 0.18 < ratio("convolutions", "float32", V100, A100) < 0.32
    assert 1 / ratio("convolutions", "tfloat32", A100, V100) < ratio("convolutions", "float32", V100, A100)


def test_unexplained_kernels_are_counted_and_named() -> None:
    unexplained = Unexplained()
    for name in ("void at::native::a", "void at::native::a", "b"):
        unexplained.add("carried over by memory bandwidth", name)
    for i in range(7):
        unexplained.add("carried over by their names as matrix products", f"gemm_{i}")
    assert unexplained.told() == (
        "7 kernels carried over by their names as matrix products: gemm_0 (1), gemm_1 (1), gemm_2 (1), gemm_3 (1), "
        "gemm_4 (1) and 2 names more",
        "3 kernels carried over by memory bandwidth: a (2), b (1)",
    )
