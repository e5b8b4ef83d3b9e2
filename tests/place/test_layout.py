"""How elementwise kernels walk their tensors: dimensions that merge, conversions, and what both cost."""

from __future__ import annotations

import pytest

from sim.ops import TensorMeta, Work
from sim.place.kernels import kernel_cost, memory_cost
from sim.place.kernels.layout import converts, merged_dims, sm_clocks_us, walking_clocks
from sim.topology.device import load_device

HALF = TensorMeta("float16", (16, 12, 1024, 64))
HEADS_LAST = TensorMeta("float16", (16, 12, 1024, 64), (786432, 64, 768, 1))  # a transposed [16, 1024, 12, 64]


@pytest.mark.parametrize(
    ("operands", "dims"),
    [
        ((HALF, HALF, HALF), 0),  # all dense
        ((HEADS_LAST, HEADS_LAST), 0),  # the same order in both: dense again
        ((HALF, HEADS_LAST), 4),  # heads and positions change places: nothing merges
        # cos of [1, 1, 1024, 64], the same for every head and sequence: 64, heads, positions, sequences
        ((HEADS_LAST, HEADS_LAST, TensorMeta("float16", (1, 1, 1024, 64))), 4),
        # in the dense order heads and sequences merge: neither moves the cos
        ((HALF, HALF, TensorMeta("float16", (1, 1, 1024, 64))), 2),
        # a weight for every column
        ((TensorMeta("float16", (16, 1024, 768)), TensorMeta("float16", (768,))), 2),
        # a scale for every row
        ((TensorMeta("float32", (16, 1024, 768)), TensorMeta("float32", (16, 1024, 1))), 2),
        # half of every head, cut out
        ((TensorMeta("float16", (64, 1024, 32)), TensorMeta("float16", (64, 1024, 32), (65536, 64, 1))), 2),
        ((TensorMeta("float16", (7,), (2,)),), 2),  # every second element
        ((TensorMeta("float16", (1, 1)), TensorMeta("float16", ())), 0),
        ((), 0),
    ],
)
def test_dimensions_merge_as_the_tensor_iterator_merges_them(operands: tuple[TensorMeta, ...], dims: int) -> None:
    assert merged_dims(operands) == dims


def test_a_number_is_no_operand() -> None:
    assert walking_clocks((HALF, HALF, TensorMeta("float64", ()))) == 0.0
    # Four dimensions, two operands: 0.157 + 4 x 0.101 + 2 x 0.0991.
    assert walking_clocks((HALF, HEADS_LAST, TensorMeta("float64", ()))) == pytest.approx(0.7592)


def test_clocks_become_time_by_the_data_sheet_s_rate() -> None:
    # RTX A5000: 27.8 TFLOP/s of 64 SMs with 128 lanes of 2 operations: 1.697 GHz. A100: 64 lanes, 1.41 GHz.
    assert sm_clocks_us(64 * 1697.0, load_device("rtx-a5000")) == pytest.approx(1.0, rel=1e-3)
    assert sm_clocks_us(108 * 1411.0, load_device("a100-pcie-40gb")) == pytest.approx(1.0, rel=1e-3)
    assert sm_clocks_us(1e6, load_device("epyc-7763")) == 0.0


@pytest.mark.parametrize(
    ("op", "read", "written", "converted"),
    [
        ("aten::_to_copy", ("float16",), "float32", True),
        ("aten::_to_copy", ("float32",), "float16", False),  # has a kernel of its own
        ("aten::clone", ("float16",), "float16", False),
        ("aten::mul", ("float16", "float32"), "float32", True),
        ("aten::masked_fill", ("float16", "bool"), "float16", False),
        ("aten::eq", ("float16",), "bool", False),
        ("aten::add", ("float16", "int64"), "float16", True),
    ],
)
def test_what_converts_while_it_loads(op: str, read: tuple[str, ...], written: str, converted: bool) -> None:
    work = Work(op, tuple(TensorMeta(dtype, (1024, 64)) for dtype in read))
    assert converts(work, TensorMeta(written, (1024, 64))) is converted


def test_a_transposing_copy_takes_longer_than_its_bytes() -> None:
    a5000 = load_device("rtx-a5000")
    dense = kernel_cost(Work("aten::clone", (HALF,), (HALF,)), a5000).ns
    transposing = kernel_cost(Work("aten::clone", (HEADS_LAST,), (HALF,)), a5000).ns
    assert dense == memory_cost(2 * HALF.nbytes, a5000).ns
    # 12.6 million elements at 0.7592 clocks of 64 SMs at 1.697 GHz: 88 us beside 73 us of bytes.
    walking = 0.7592 * HALF.elements / (64 * 1.697)
    assert transposing == pytest.approx(1500 + ((dense - 1500) ** 2.58 + walking**2.58) ** (1 / 2.58), rel=1e-3)


def test_a_product_s_output_shows_where_k_is_short() -> None:
    # A40, four fifths of vidur's shapes: 40 % of the output's way to DRAM is not hidden by products.
    a40 = load_device("a40")
    assert a40.calibration.gemm["float16"].store_exposed == pytest.approx(0.4, abs=0.05)
