"""Kernel costs: hand-worked numbers, the measured curve, and the registry's rules."""

from __future__ import annotations

import pytest

from sim.ops import TensorMeta, Work
from sim.place.curves import kernel_us
from sim.place.kernels import attention_flops, kernel_cost, memory_cost, register
from sim.topology.device import DeviceProfile, load_device


@pytest.fixture(scope="module")
def a5000() -> DeviceProfile:
    return load_device("rtx-a5000")


def half(*shape: int) -> TensorMeta:
    return TensorMeta("float16", shape)


def mm(m: int, n: int, k: int) -> Work:
    return Work("aten::mm", (half(m, k), half(k, n)), (half(m, n),))


def test_between_two_points_a_curve_is_straight_in_logarithms() -> None:
    # Points (1, 10 us), (100, 110 us); floor 10 us, so nothing is taken off. In logarithms 10 is half way between 1
    # and 100: the geometric mean of 10 and 110 is 33.17 us.
    assert kernel_us(10, [1, 100], [10, 110], floor_us=10) == pytest.approx(33.166, abs=1e-3)


def test_the_constant_of_the_smallest_point_is_taken_off() -> None:
    # The smallest call takes 12 us where a kernel takes 2: 10 us are the measurement's own. 110 - 10 = 100 us.
    assert kernel_us(100, [1, 100], [12, 110], floor_us=2) == pytest.approx(100)
    # Beyond the last point the last rate goes on: twice the work, twice the time.
    assert kernel_us(200, [1, 100], [12, 110], floor_us=2) == pytest.approx(200)


def test_a_square_is_on_the_measured_curve(a5000: DeviceProfile) -> None:
    # A measured point: 8008^3 in 12,695.9 us per call; the smallest call shows a constant of 15.3 - 1.5 = 13.8 us.
    cost = kernel_cost(mm(8008, 8008, 8008), a5000)
    assert cost.source == "profile" and cost.bound == "compute" and cost.lender == ""
    assert cost.ns == pytest.approx(12_695_900 - 13_809, rel=0.01)


def test_a_thin_gemm_is_bound_by_its_operands(a5000: DeviceProfile) -> None:
    # One row times 8192 x 8192: 134 MB of weights at 684 GB/s are 196 us; its 0.13 GFLOP would take 2 us.  A40s reach
    # eight tenths to all of that in such products.
    cost = kernel_cost(mm(1, 8192, 8192), a5000)
    assert cost.bound == "memory"
    assert 196_000 < cost.ns < 196_000 / 0.8


def test_bytes_are_moved_at_the_measured_bandwidth(a5000: DeviceProfile) -> None:
    # relu of 16 x 1024 x 8192 halves: 256 MiB read and 256 MiB written are 536.9 MB; at 684 GB/s 785 us.
    relu = Work("aten::relu", (half(16, 1024, 8192),), (half(16, 1024, 8192),))
    assert kernel_cost(relu, a5000).ns == pytest.approx(785_000, rel=0.01)


def test_the_copy_curve_counts_both_copies(a5000: DeviceProfile) -> None:
    # The file's last but three point: two copies of 13,821,294,096 bytes in all take 20,187 us. One copy of half that
    # takes half as long; the 10 us that the measurement itself takes are lost in it.
    assert memory_cost(13_821_294_096 / 2, a5000).ns == pytest.approx(20_186_625 / 2, rel=2e-3)


def test_expanded_dimensions_are_read_once() -> None:
    # A bias of 768 halves expanded over 16 x 1024 rows is still 1,536 bytes.
    assert TensorMeta("float16", (16, 1024, 768), (0, 0, 1)).nbytes == 1536


def test_attention_flops_by_hand() -> None:
    # 2 batches, 3 heads, 5 queries, 7 keys, head size 11: two products of 2 * 2*3*5*7*11 = 4,620 flops, 9,240 in all.
    query, key = half(2, 3, 5, 11), half(2, 3, 7, 11)
    assert attention_flops(query, key, causal=False) == 9240
    assert attention_flops(query, key, causal=True) == 4620


def test_an_op_without_a_formula_is_an_estimate(a5000: DeviceProfile) -> None:
    unknown = Work("aten::something_new", (half(1024, 1024),), (half(1024, 1024),))
    known = Work("aten::relu", unknown.inputs, unknown.outputs)
    assert kernel_cost(unknown, a5000).source == "estimate"
    assert kernel_cost(unknown, a5000).ns == kernel_cost(known, a5000).ns


def test_registering_an_op_twice_is_an_error() -> None:
    with pytest.raises(AssertionError, match="aten::mm has two formulas"):
        register("aten::mm")(kernel_cost)


def test_a_gpu_without_curves_uses_its_data_sheet_and_a_lender() -> None:
    # An RTX A6000 is an A40 with a little more clock: 154.8 against 149.7 TFLOP/s, so its product takes 0.967 as long.
    a40, a6000 = (kernel_cost(mm(8192, 8192, 8192), load_device(name)) for name in ("a40", "rtx-a6000"))
    assert a40.source == "profile"
    assert (a6000.source, a6000.lender) == ("roofline", "a40")
    assert a6000.ns == pytest.approx(a40.ns * 149.7 / 154.8, rel=0.03)
