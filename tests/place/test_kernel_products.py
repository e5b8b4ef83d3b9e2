"""Matrix products: tiles, waves, alignment, power and lenders, each worked out on a device made for it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.place.kernels.gemm import products, products_us
from sim.place.kernels.memory import memory_us
from sim.topology.abilities import Abilities, abilities_of, resolve
from sim.topology.calibration import Calibration
from sim.topology.device import DeviceProfile, load_device, shipped_devices
from sim.topology.load import load_topology

SAID = {"source": "a test", "data": "none"}
GEMM = {
    **SAID,
    "efficiency": 1.0,
    "operand_elements": 0.0,
    "prologue_k": 0.0,
    "tail": 0.0,
    "split_us": 0.0,
    "fixed_us": 0.0,
    "memory_efficiency": 1.0,
    "overlap": 100.0,
    "tiles": [[128, 128]],
    "splits": [1],
}
REST = {
    "memory": {**SAID, "efficiency": 1.0},
    "attention": {**SAID, "flash": 0.5, "flash_backward": 0.4, "efficient": 0.3, "efficient_backward": 0.2},
    "call": {**SAID, "elementwise": 10.0, "softmax": 20.0, "layer_norm": 30.0},
}


def ten_sms(power: dict[str, object] | None = None, **gemm: object) -> Abilities:
    """10 SMs of 1 TFLOP/s each, 1000 GB/s, 100 W: 1 us is 1 million operations of an SM, or 1 MB."""
    sections = {**REST, "gemm": {"float32": {**GEMM, **gemm}}}
    if power:
        sections["power"] = {"float32": {**SAID, **power}}
    profile = DeviceProfile.model_validate(
        {
            "name": "ten",
            "full_name": "Ten SMs",
            "architecture": "Test",
            "chip": "T10",
            "source": "a test",
            "sms": 10,
            "memory_gib": 16,
            "memory_bandwidth_gb_s": 1000,
            "l2_mib": 1,
            "tflops": {"float32": 10.0},
            "tdp_w": 100,
            "calibration": sections,
        }
    )
    return resolve(profile, [])


def one(
    abilities: Abilities, m: int, n: int, k: int, batch: int = 1, aligned: bool = True, alone: bool = False
) -> float:
    return float(products_us(products(batch, m, n, k, "float32", aligned=aligned), "float32", abilities, alone).us[0])


def test_eleven_tiles_take_two_turns_on_ten_sms() -> None:
    # A tile: 2 * 128 * 128 * 1000 = 32.77 million operations, 32.77 us on an SM. Ten tiles take one turn, eleven two.
    device = ten_sms()
    assert one(device, 128, 1280, 1000) == pytest.approx(32.768, rel=1e-3)
    assert one(device, 128, 1408, 1000) == pytest.approx(65.536, rel=1e-3)


def test_a_tile_that_is_not_full_takes_as_long() -> None:
    device = ten_sms()
    assert one(device, 65, 1280, 1000) == pytest.approx(one(device, 128, 1280, 1000), rel=1e-3)


def test_a_smaller_tile_is_taken_where_it_wastes_less() -> None:
    # 64 rows: [128, 64] tiles do half the work of [128, 128] ones.
    both = ten_sms(tiles=[[128, 128], [128, 64]])
    assert one(both, 64, 1280, 1000) == pytest.approx(32.768 / 2, rel=1e-3)


def test_splitting_k_fills_sms_that_would_idle() -> None:
    # One tile of k = 8000: 262 us on one SM. Eight parts of k = 1000 on eight SMs: 32.8 us, and 5 us to add them up.
    split = ten_sms(splits=[1, 8], split_us=5.0)
    assert one(split, 128, 128, 8000) == pytest.approx(32.768 + 5.0, rel=0.01)


def test_a_batch_of_products_shares_the_sms() -> None:
    # 20 products of one tile each: two turns, as of one product of 20 tiles.
    device = ten_sms()
    assert one(device, 128, 128, 1000, batch=20) == pytest.approx(65.536, rel=1e-3)


def test_small_tiles_pay_more_for_their_operands() -> None:
    # A row of operands costs 16 of products: a 128 x 128 tile (128*128 + 16*256) / 128*128 = 1.25 as long.
    assert one(ten_sms(operand_elements=16.0), 128, 1280, 1000) == pytest.approx(32.768 * 1.25, rel=1e-3)


def test_rows_that_begin_anywhere_take_longer() -> None:
    device = ten_sms(unaligned_efficiency=0.5)
    assert one(device, 128, 1280, 1000, aligned=False) == pytest.approx(2 * 32.768, rel=1e-3)
    shapes = products([1, 1], [64, 64], [64, 66], [64, 64], "float16")
    assert shapes.aligned.tolist() == [True, False]  # 66 halves are 132 bytes, no multiple of 16


def test_a_thin_product_takes_as_long_as_its_operands() -> None:
    # [1, 1000] x [1000, 1280]: 5.12 MB of weights, 4 kB and 5 kB beside them: 5.129 us; the arithmetic 32.8 us on tiles
    # of 128 rows, so tiles of one row show it.
    assert one(ten_sms(tiles=[[128, 1]]), 1, 1280, 1000) == pytest.approx(5.12912, rel=1e-3)


def test_a_product_takes_no_less_than_its_energy() -> None:
    # 20 GFLOP/J at 100 W are 2 TFLOP/s: a fifth of the data sheet, so 5 * 32.768 us; and 128 * 1000 + 1000 * 1280 +
    # 128 * 1280 elements of 4 bytes at 60 pJ a byte are 377 uJ, 3.772 us at 100 W.
    assert one(ten_sms({"gflop_per_joule": 20.0}), 128, 1280, 1000) == pytest.approx(163.84 + 3.772, rel=1e-4)


def test_a_power_limit_slows_whole_turns() -> None:
    # An eleventh tile leaves nine SMs idle for a turn, at the clock that the limit set: twice as long, as without it.
    device = ten_sms({"gflop_per_joule": 20.0})
    bytes_us = 4 * (128 * 1000 + 1000 * 1408 + 128 * 1408) * 60e-6 / 100
    assert one(device, 128, 1408, 1000) == pytest.approx(2 * 163.84 + bytes_us, rel=1e-4)


def test_small_tiles_draw_more_at_a_power_limit() -> None:
    # Half as high: 64 rows and 128 columns beside 64 x 128 products, 7 * 192 / 8192 more, large tiles 7 * 256 / 16384.
    device = ten_sms({"gflop_per_joule": 20.0}, tiles=[[128, 64]])
    bytes_us = 4 * (64 * 1000 + 1000 * 1280 + 64 * 1280) * 60e-6 / 100
    more = (1 + 7 * 192 / 8192) / (1 + 7 * 256 / 16384)
    assert one(device, 64, 1280, 1000) == pytest.approx(163.84 / 2 * more + bytes_us, rel=1e-4)


def test_a_short_call_on_a_cool_device_may_exceed_the_power_limit() -> None:
    # 167.6 us at the limit; alone a quarter faster where it is far shorter than 20 ms, an eighth where it is as long.
    device = ten_sms({"gflop_per_joule": 20.0})
    lasting = one(device, 128, 1280, 1000)
    assert one(device, 128, 1280, 1000, alone=True) == pytest.approx(
        lasting / (1 + 0.25 / (1 + lasting / 20e3)), rel=1e-4
    )
    long = one(device, 128, 1280, 1000 * 122)  # 19,990 us in arithmetic
    assert one(device, 128, 1280, 1000 * 122, alone=True) == pytest.approx(long / 1.125, rel=0.01)


def test_a_lower_bound_is_the_fastest_and_slows_nothing_else() -> None:
    # 2 TFLOP/s seen: 10 full tiles at that rate; one tile alone takes its 32.768 us on one SM, as without the bound.
    device = ten_sms({"gflop_per_joule": 20.0, "lower_bound": True})
    assert one(device, 128, 1280, 1000) == pytest.approx(163.84, rel=1e-4)
    assert one(device, 128, 128, 1000) == pytest.approx(32.768, rel=1e-4)


def test_batches_in_float32_have_one_tile_from_ampere_on() -> None:
    # Products of 64 x 64 take a whole tile of 128 x 128 there; a T4 has tiles of their size.
    ampere, turing = (abilities_of(load_device(name)) for name in ("a100-pcie-40gb", "t4"))
    assert one(ampere, 128, 128, 4096, batch=1080) < 1.1 * one(ampere, 64, 64, 4096, batch=1080)
    assert one(turing, 128, 128, 4096, batch=1080) > 3.0 * one(turing, 64, 64, 4096, batch=1080)


sizes = st.integers(1, 20_000)


@given(m=sizes, n=sizes, k=sizes, more=st.integers(1, 5000))
def test_a_deeper_product_never_takes_less(m: int, n: int, k: int, more: int) -> None:
    device = ten_sms(splits=[1, 2, 4], tiles=[[128, 128], [64, 64]], operand_elements=8.0, overlap=6.0)
    assert one(device, m, n, k + more) >= one(device, m, n, k) * (1 - 1e-9)


@given(m=sizes, n=sizes, k=sizes)
def test_nothing_is_faster_than_the_data_sheet(m: int, n: int, k: int) -> None:
    abilities = abilities_of(load_device("a100-sxm4-80gb"))
    us = float(products_us(products(1, m, n, k, "float16"), "float16", abilities, alone=True).us[0])
    assert us >= 2.0 * m * n * k / 312e6
    assert us >= 2 * (m * k + k * n + m * n) / 2039e3


def test_many_shapes_at_once_are_the_shapes_one_by_one() -> None:
    abilities = abilities_of(load_device("rtx-a5000"))
    batch, m, n, k = np.array([[1, 64, 4096, 4096], [7, 100, 100, 64], [1, 1, 8192, 8192], [3, 5000, 300, 12]]).T
    together = products_us(products(batch, m, n, k, "float16"), "float16", abilities).us
    alone = [
        float(products_us(products(*shape, "float16"), "float16", abilities).us[0])
        for shape in zip(batch, m, n, k, strict=True)
    ]
    assert together.tolist() == alone


# Lenders ----------------------------------------


def test_a_device_lends_to_the_nearest_of_its_kind() -> None:
    lent = {name: abilities_of(load_device(name)) for name in shipped_devices()}
    # The same chip first: GA102 from the A40, GA100 from the A100s that were measured.
    assert lent["rtx-3090"].gemm("float16").device == "a40"
    assert lent["a100-pcie-80gb"].gemm("float16").device == "a100-sxm4-80gb"
    assert lent["a100-sxm4-40gb"].gemm("float32").device == "a100-pcie-40gb"
    # GA100 and GA102 are both Ampere, but a GA102's SM has twice the float32 lanes: 27.8 / 64 against 19.5 / 108.
    assert lent["h100-sxm"].gemm("float16").device == "a100-sxm4-80gb"
    # HBM from HBM, GDDR with error correction from such.
    assert lent["h100-sxm"].memory.device == "a100-pcie-40gb"
    assert lent["l40s"].memory.device == "l4"


def test_every_shipped_device_has_all_abilities() -> None:
    for name in shipped_devices():
        abilities = abilities_of(load_device(name))
        assert set(abilities.rows) == {"softmax", "layer_norm"}
        assert {"gemm_float16", "gemm_float32", "elementwise", "attention"} <= set(abilities.spreads)


def test_a_lent_power_limit_follows_the_process() -> None:
    # A T4's 12 nm to an L4's 4 nm: 3^0.67 = 2.0877 times the operations for a joule.
    t4, l4 = load_device("t4"), load_device("l4")
    bare = l4.model_copy(update={"calibration": Calibration()})
    power = resolve(bare, [t4, load_device("a100-sxm4-80gb")]).power("float32")
    own = t4.calibration.power["float32"].gflop_per_joule
    assert power is not None
    assert power.fit.gflop_per_joule == pytest.approx(own * 2.0877, rel=1e-4)


def test_a_lower_bound_of_the_power_limit_counts_half_for_who_borrows_it() -> None:
    # An A100's 676 GFLOP/J at 400 W were the best rate seen, no limit: an A100 PCIe at 250 W lies between 169 TFLOP/s
    # and what its tiles reach, at their geometric mean.
    pcie = abilities_of(load_device("a100-pcie-40gb"))
    power = pcie.power("float16")
    assert power is not None and not power.own and power.fit.lower_bound
    shapes = products(1, 8192, 8192, 8192, "float16")
    sxm = load_device("a100-sxm4-80gb")
    free = products_us(shapes, "float16", abilities_of(sxm)).us[0] - sxm.calibration.gemm["float16"].fixed_us
    bound = 2 * 8192**3 / (676 * 250 * 1e3)
    found = products_us(shapes, "float16", pcie).us[0] - pcie.gemm("float16").fit.fixed_us
    assert found == pytest.approx((free * bound) ** 0.5, rel=0.01)


def test_without_its_chip_the_median_of_all_boards_is_the_power_limit() -> None:
    # At 12 nm three lenders of 1, 2 and 9 times a T4's operations a joule: the middle one, though it is a bound.
    t4 = load_device("t4")
    fit = t4.calibration.power["float32"]
    boards = [
        t4.model_copy(
            update={
                "name": name,
                "chip": name,
                "calibration": t4.calibration.model_copy(
                    update={
                        "power": {"float32": fit.model_copy(update={"gflop_per_joule": rate, "lower_bound": bound})}
                    }
                ),
            }
        )
        for name, rate, bound in (("a", 50.0, False), ("b", 100.0, True), ("c", 450.0, False))
    ]
    lenders = [*boards, load_device("a100-sxm4-80gb")]  # which lends attention
    bare = t4.model_copy(update={"name": "bare", "calibration": Calibration()})
    power = resolve(bare, lenders).power("float32")
    assert power is not None and power.device == "a, b and c"
    assert power.fit.gflop_per_joule == pytest.approx(100.0) and not power.fit.lower_bound
    same_chip = resolve(bare.model_copy(update={"chip": "b"}), lenders).power("float32")
    assert same_chip is not None and same_chip.device == "b" and same_chip.fit.lower_bound


def test_without_its_chip_float32_products_take_the_median_of_like_lanes() -> None:
    fits = [load_device(name).calibration.gemm["float32"] for name in ("a100-pcie-40gb", "t4", "v100-pcie")]
    middle = sorted(fit.operand_elements for fit in fits)[1]
    h100 = abilities_of(load_device("h100-sxm")).gemm("float32")
    assert h100.device == "a100-pcie-40gb, t4 and v100-pcie"
    assert h100.fit.operand_elements == middle
    # Its 32 lanes a scheduler leave no clock to loads: a tenth less.
    assert h100.fit.efficiency == pytest.approx(0.9 * sorted(fit.efficiency for fit in fits)[1])
    # An RTX 4090's lanes compute integers too, as an A5000's and an L4's.
    assert abilities_of(load_device("rtx-4090")).gemm("float32").device == "l4 and rtx-a5000"


def test_a_cpu_has_no_gpus_power_limit() -> None:
    assert not abilities_of(load_device("epyc-7763")).powers


# Devices with other values ------------------------------------------------------------------------------------------


def changed(**values: object) -> Abilities:
    machine = load_topology("a5000x1", {f"devices.{path.replace('__', '.')}": value for path, value in values.items()})
    return abilities_of(machine.gpus[0].profile)


def test_a_measured_curve_follows_the_values_that_are_changed() -> None:
    """The A5000's squares and copies were measured at 111.1 TFLOP/s, 230 W and 768 GB/s: at half of these the power and
    the DRAM bound them at twice the time, with the same model's misses, and with more power none is slower."""
    side = np.array([8192.0])
    shapes = products(np.ones(1), side, side, side, "float16")
    as_it_is, half = changed(memory_gib=24), changed(tflops__float16=55.55, tdp_w=115)
    now, slower = (float(products_us(shapes, "float16", each).us[0]) for each in (as_it_is, half))
    assert slower == pytest.approx(2 * now, rel=0.02)
    assert now == pytest.approx(float(products_us(shapes, "float16", abilities_of(load_device("rtx-a5000"))).us[0]))
    size = np.array([1e9])
    floor = 1.5
    copied, halved = (
        float(memory_us(size, each)[0]) - floor for each in (as_it_is, changed(memory_bandwidth_gb_s=384))
    )
    assert halved == pytest.approx(2 * copied, rel=1e-9)
    sides = np.array([128.0, 1024.0, 4096.0, 16384.0])
    squares = products(np.ones(4), sides, sides, sides, "float16")
    by_power = [products_us(squares, "float16", changed(tdp_w=watts)).us for watts in (100, 230, 300)]
    assert np.all(by_power[1] <= by_power[0] * 1.001) and np.all(by_power[2] <= by_power[1] * 1.001)
