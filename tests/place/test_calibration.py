"""Measurements become profiles and topologies: of made-up GPUs whose every time is known, and of a CPU's ranks."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

import sim
from sim.graph import OpGraph, Program, RankProgram
from sim.measurements import Device, Machine, Measurements, Sample
from sim.ops import HostCall, Kernel, TensorMeta, Work
from sim.place.calibration import compare
from sim.place.calibration.compare_plot import write_plot
from sim.place.calibration.descent import descend, folds, holding, with_block
from sim.place.calibration.profile import profile_of
from sim.place.calibration.write import topology_file, write_files
from sim.place.collectives import plan
from sim.place.kernels.gemm import products, products_us
from sim.place.kernels.memory import memory_us
from sim.place.kernels.rows import rows_us
from sim.place.kernels.single import kernel_rows
from sim.topology.abilities import abilities_of
from sim.topology.device import Measured, load_device
from sim.topology.load import load_topology
from sim.topology.machine import Machine as Topology
from tests.programs import LANES, MAIN, STREAM
from tests.topology.test_smi import DGX_A100

GAP_US, FLOOR_US = 1.0, 1.4


def _machine(device: Device, topology: str = "") -> Machine:
    versions = {"torch": "2.13.0", "cuda": "13.0", "driver": "580.1", "nccl": "2.28.9"}
    return Machine(device, "AMD EPYC", 64, "amd", versions, "tracesim calibrate", "2026-11-25", 0.0, topology=topology)


def _gpu(name: str, count: int = 1) -> Device:
    return Device(
        "gpu", name, count, 100, 48 << 30, 64 << 20, (8, 9), 1500.0, 8000.0, 256, 300.0, 4, 16
    )  # fmt: skip


def _sample(section: str, what: str, sizes: tuple[int, ...], us: float) -> Sample:
    return Sample(section, what, sizes, us, us, us)


def _as_modelled(profile: str) -> list[Sample]:
    """What a GPU would show that behaves as a shipped profile says, turn-around of the stream included."""
    able = abilities_of(load_device(profile))
    shapes = [(1, side, side, side) for side in (64, 128, 512, 1024, 2048, 4096)]
    shapes += [(1, m, n, k) for m in (1, 64, 512, 4096) for n in (768, 3072, 4096) for k in (768, 4096)]
    found = [
        _sample("launch", "floor", (), FLOOR_US),
        _sample("launch", "latency", (), 7.0),
        _sample("launch", "gap", (), GAP_US),
    ]
    columns = [np.array(column, dtype=np.float64) for column in zip(*shapes, strict=True)]
    for dtype in ("float16", "float32"):
        times = products_us(products(*columns, dtype), dtype, able).us
        found += [_sample("gemm", dtype, shape, us + GAP_US) for shape, us in zip(shapes, times.tolist(), strict=True)]
    for elements in (2**i for i in range(10, 29, 2)):
        us = float(memory_us(np.array([12.0 * elements]), able)[0])
        found.append(_sample("elementwise", "add", (1, elements), us + GAP_US))
    for rows in (64, 1024, 16384):
        for width in (512, 2048, 8192):
            us = float(rows_us("softmax", np.array([float(rows)]), np.array([float(width)]), 4, able)[0])
            found.append(_sample("softmax", "float32", (rows, width), us + GAP_US))
    return found


def test_the_ends_between_which_one_more_lies() -> None:
    # Of 9 values 10 places are left, each as likely: outside of the least and the greatest lie two in ten.
    assert holding(np.arange(9.0, 0.0, -1.0), 0.8) == pytest.approx((1.0, 9.0))
    # Of 19: the second from either end. Of 4 the least and the greatest, which hold three places in five.
    assert holding(np.arange(1.0, 20.0), 0.8) == pytest.approx((2.0, 18.0))
    assert holding(np.arange(1.0, 5.0), 0.8) == (1.0, 4.0)
    # Of 14: a tenth of 15 places is one and a half, so half way between the first two.
    assert holding(np.arange(1.0, 15.0), 0.8) == pytest.approx((1.5, 13.5))


def test_sizes_of_one_group_are_left_out_together_and_every_fifth_has_its_share() -> None:
    groups = [(n, k) for n in range(5) for k in range(4)] * 3
    dealt = folds(groups)
    assert all(len({int(f) for f, g in zip(dealt, groups, strict=True) if g == group}) == 1 for group in groups)
    assert np.bincount(dealt).tolist() == [12] * 5  # 20 groups of three
    assert folds(groups[:20]).tolist() == dealt[:20].tolist()


def test_the_spread_holds_four_of_five_shapes_that_were_never_measured() -> None:
    """Times that no fit can reach: each off by its shape, evenly from 0.8 to 1.3.  The spread that comes of a grid must
    hold shapes off the grid, and not be idle: hardly wider than what was put in."""

    def off(sample: Sample) -> Sample:
        factor = 0.8 + 0.5 * (zlib.crc32(repr(sample.sizes).encode()) % 1000) / 1000
        return msgspec.structs.replace(sample, us=sample.us * factor) if sample.section == "gemm" else sample

    taken = Measurements(_machine(_gpu("NVIDIA L40S")), tuple(map(off, _as_modelled("l40s"))))
    made = profile_of(taken, "mine").profile
    able, truth = abilities_of(made), abilities_of(load_device("l40s"))
    sides = [
        (m, n, k) for m in (48, 160, 300, 720, 2000) for n in (500, 768, 1500, 2600, 6000) for k in (640, 1000, 2500)
    ]
    sizes = [(1.0, float(m), float(n), float(k)) for m, n, k in sides]
    shapes = [np.array(column) for column in zip(*sizes, strict=True)]
    names = [(1, *side) for side in sides]
    real = products_us(products(*shapes, "float16"), "float16", truth).us
    real = np.array([off(_sample("gemm", "float16", n, us)).us for n, us in zip(names, real, strict=True)])
    ratio = real / products_us(products(*shapes, "float16"), "float16", able).us
    spread = made.calibration.spread["gemm_float16"]
    inside = float(np.mean((ratio >= spread.p10) & (ratio <= spread.p90)))
    # 0.8 of 75 shapes, with ends that 36 of the grid's decide: twice the error of both is 0.16.
    assert 0.64 <= inside <= 0.96, (inside, spread)
    assert spread.p90 / spread.p10 < 1.3 / 0.8 * 1.2


def test_a_descent_finds_the_lowest_point() -> None:
    # (x - 3)^2 + (y - 0.5)^2 is lowest at 3 and at the limit of y, 0.4.
    start, limits = {"x": 1.0, "y": 0.1}, {"x": (0.0, 9.0), "y": (0.0, 0.4)}
    found = descend(start, lambda v: (v["x"] - 3) ** 2 + (v["y"] - 0.5) ** 2, limits)
    assert found["x"] == pytest.approx(3, rel=0.02) and found["y"] == 0.4


def test_a_known_gpu_keeps_its_data_sheet_and_gets_what_was_measured() -> None:
    taken = Measurements(_machine(_gpu("NVIDIA L40S")), tuple(_as_modelled("l40s")))
    made = profile_of(taken, "mine")
    sheet = load_device("l40s")
    assert made.profile.name == "mine" and made.profile.full_name == "NVIDIA L40S"
    assert made.profile.tflops == sheet.tflops and made.profile.source == sheet.source
    assert made.profile.launch is not None and made.profile.launch.kernel_gap_us == GAP_US
    assert "torch 2.13.0, cuda 13.0, driver 580.1" in made.profile.launch.source
    # The samples are what another profile's model says: fits of the same formulas give them back.
    for judged in made.judged:
        assert abs(float(np.median(judged.ratio)) - 1) < 0.08, judged
    own = products_us(products(1, 2048, 1024, 4096, "float16"), "float16", abilities_of(made.profile)).us[0]
    said = products_us(products(1, 2048, 1024, 4096, "float16"), "float16", abilities_of(sheet)).us[0]
    assert own == pytest.approx(said, rel=0.12)
    # The same measurements, the same profile.
    assert profile_of(taken, "mine").data == made.data


def test_an_unknown_gpu_is_described_by_its_driver_and_by_nothing_else() -> None:
    # 100 SMs x 1.5 GHz x 1024 operations a clock (8.9) = 153.6 TFLOP/s of float16, rounded up; float32 a quarter.
    # 8000 MHz x 256 bit / 8 x 2 = 512 GB/s.
    made = profile_of(Measurements(_machine(_gpu("NVIDIA NEW 1000")), tuple(_as_modelled("l40s")[:3])), "new").profile
    assert made.tflops == {"float32": 38.4, "float16": 154.0, "bfloat16": 154.0, "tfloat32": 76.8}
    assert made.memory_bandwidth_gb_s == 512 and made.architecture == "Ada" and made.compute_capability == "8.9"
    assert (made.sms, made.memory_gib, made.l2_mib, made.tdp_w) == (100, 48, 64, 300)
    assert "no data sheet" in made.note and "measured on NVIDIA NEW 1000" in made.source
    assert made.calibration.gemm == {}  # borrowed, as for every profile


def test_a_host_with_an_nvswitch_becomes_a_topology(tmp_path: Path) -> None:
    large = 64 << 20
    samples = [
        *_as_modelled("a100-sxm4-80gb"),
        _sample("copy", "h2d", (large,), large / 25e3),  # 25 GB/s
        _sample("copy", "d2h", (large,), large / 24e3),
        _sample("copy", "p2p 0 1", (large,), large / 240e3),
        _sample("copy", "p2p 0 7", (large,), large / 235e3),
        *(
            _sample("links", "all_reduce", (size, 8), us)
            for size, us in ((1024, 30.0), (1 << 20, 60.0), (1 << 30, 5000.0))
        ),
        _sample("links", "issue", (8,), 12.0),
        _sample("host", "op", (), 9.5),
    ]
    written = write_files(
        Measurements(_machine(_gpu("NVIDIA A100-SXM4-80GB", 8), DGX_A100), tuple(samples)), tmp_path / "dgx.yaml"
    )
    assert written.topology == topology_file(tmp_path / "dgx.yaml") == tmp_path / "dgx.topology.yaml"
    machine = load_topology(str(written.topology))
    assert len(machine.gpus) == 8 and machine.gpus[0].profile.name == "dgx"
    rates = {link.cls: link.bandwidth_gb_s for link in machine.links}
    assert rates == {"pcie": 25.0, "nvlink12": 240.0, "socket": 25.0}
    assert machine.route("gpu0", "gpu7").path == "NVS"
    assert (machine.host.op_us, machine.host.collective_us) == (9.5, 12.0)
    assert machine.nccl.version == "2.28.9"
    told = plan(machine, "all_reduce", 1 << 20, tuple(range(8)))
    assert told.call_us == pytest.approx(60.0) and told.source == "profile"


@pytest.mark.parametrize(
    ("topology", "gpus", "assumed"),
    [
        (DGX_A100, (6, 2), "links between NUMA nodes carry"),
        (DGX_A100, (), "nvidia-smi topo -m shows 8 and CUDA 2, which ones is not told"),
        ("no such thing", (0, 1), "nvidia-smi topo -m: shows no matrix of GPUs"),
    ],
)
def test_gpus_of_a_host_that_others_have_the_rest_of(
    tmp_path: Path, topology: str, gpus: tuple[int, ...], assumed: str
) -> None:
    """CUDA_VISIBLE_DEVICES=6,2 on a DGX: NVLink joins them, on two NUMA nodes.  What cannot be read stops nothing."""
    measured = msgspec.structs.replace(
        _machine(_gpu("NVIDIA NEW 1000", 2), topology), gpus=gpus, others=("NVIDIA T400",)
    )
    samples = (_sample("copy", "p2p 0 1", (64 << 20,), (64 << 20) / 200e3), *_as_modelled("l40s")[:3])
    machine = load_topology(str(write_files(Measurements(measured, samples), tmp_path / "two.yaml").topology))
    assert any(assumed in told for told in machine.assumed)
    assert machine.assumed[0] == "GPUs of other names are left out: NVIDIA T400"
    links = {link.cls for link in machine.links}
    assert links == ({"pcie", "nvlink12", "socket"} if len(gpus) == 2 and topology == DGX_A100 else {"pcie"})


def test_a_gpu_newer_than_this_program_is_rated_by_what_was_measured() -> None:
    device = msgspec.structs.replace(_gpu("NVIDIA NEW 2000"), capability=(12, 0), power_limit_w=None)
    made = profile_of(Measurements(_machine(device), tuple(_as_modelled("l40s"))), "new").profile
    assert made.architecture == "compute capability 12.0" and set(made.tflops) == {"float32", "float16"}
    assert "tflops the highest measured" in made.note and made.tdp_w is None


# CPUs ----------------------------------------


@pytest.fixture
def two_ranks(tmp_path: Path) -> Topology:
    """A CPU on which an add of 8 x 8 takes 2 us, an op in a model 12, a view 1; two ranks, a measured all_reduce."""
    device = Device("cpu", "A CPU, 1 threads", 1, 1, 16 << 30, 32 << 20)
    samples = [
        _sample("host", "op", (), 12.0), _sample("host", "metadata", (), 1.0),
        *(_sample("host", f"call {op}", (), 2.0) for op in ("elementwise", "softmax", "layer_norm", "linear", "bmm")),
        *(_sample("gemm", "float32", (1, n, n, n), 2.0 + 2 * n**3 / 1e5) for n in (64, 128, 256, 512)),  # 0.1 TFLOP/s
        *(_sample("links", "all_reduce", (size, 2), us) for size, us in ((256, 300.0), (1 << 20, 1300.0))),
        *(_sample("links", "send", (size, 2), us) for size, us in ((256, 100.0), (32 << 20, 20000.0))),
    ]  # fmt: skip
    machine = Machine(device, "A CPU", 2, "amd", {"torch": "2.13.0"}, "tracesim calibrate", "2026-11-25", 0.1)
    return load_topology(str(write_files(Measurements(machine, tuple(samples)), tmp_path / "cpu.yaml").topology))


def test_gloo_ranks_get_the_curve_that_was_measured(two_ranks: Topology) -> None:
    assert [gpu.name for gpu in two_ranks.gpus] == ["rank0", "rank1"]
    assert plan(two_ranks, "all_reduce", 256, (0, 1)).call_us == 300
    assert plan(two_ranks, "all_reduce", 1 << 20, (0, 1)).call_us == 1300
    # Halfway in logarithms: sqrt(300 x 1300) = 624.5.
    assert plan(two_ranks, "all_reduce", 16384, (0, 1)).call_us == pytest.approx(624.5, rel=1e-4)
    # No curve of a send: two links of 50 us, and 32 MiB at the measured 1.68 GB/s.
    sent = plan(two_ranks, "send", 32 << 20, (0, 1))
    assert sent.call_us == pytest.approx(100 + (32 << 20) / 1.68e3, rel=1e-3)


def test_what_calls_of_an_op_take_beyond_the_shortest_is_seen_in_tiny_sizes() -> None:
    # An add of 64 elements takes 2 us, the floor; a gelu of any tiny size 7: 5 beyond. 1 ns an element after that.
    device = Device("cpu", "A CPU, 1 threads", 1, 1, 16 << 30, 32 << 20)
    sizes = [16, 64, 256, 16384, 65536, 262144]
    samples = [
        _sample("host", f"call {op}", (), 2.0) for op in ("elementwise", "softmax", "layer_norm", "linear", "bmm")
    ]
    samples += [_sample("elementwise", "add", (1, n), 2.0 + 12 * n / 50e3) for n in sizes]  # 50 GB/s
    samples += [_sample("elementwise", "gelu", (1, n), 7.0 + n / 1e3) for n in sizes]
    machine = Machine(device, "A CPU", 2, "amd", {"torch": "2.13.0"}, "tracesim calibrate", "2026-11-25", 0.1)
    made = profile_of(Measurements(machine, tuple(samples)), "cpu").profile
    assert made.calibration.memory is not None
    assert made.calibration.memory.op_us["gelu"] == pytest.approx(5.0, rel=0.02)
    assert made.calibration.memory.op_us["add"] < 0.02  # the bytes of 64 elements
    assert made.calibration.memory.element_ns["gelu"] == pytest.approx(1.0, rel=0.05)
    tiny = kernel_rows("gelu", [{"rows": 1, "columns": 8}], "float32", made)[0]
    assert tiny.kernel_us == pytest.approx(7.0, rel=0.01)


def test_a_changed_link_scales_the_measured_transfer(two_ranks: Topology, tmp_path: Path) -> None:
    halved = load_topology(str(tmp_path / "cpu.topology.yaml"), {"links.tcp.bandwidth_gb_s": 0.84})
    # The part above the smallest call is the transfer: 1300 = 300 + 1000, which takes twice as long.
    told = plan(halved, "all_reduce", 1 << 20, (0, 1))
    assert told.call_us == pytest.approx(300 + 2000)
    assert "scaled by 2" in told.note


def test_a_cpu_computes_in_the_call(two_ranks: Topology) -> None:
    """call - kernel - view - call - kernel, one after another: no stream runs beside the thread."""
    matrix = TensorMeta("float32", (256, 256))
    ops = (
        HostCall(lane=MAIN, name="aten::mm"), Kernel(lane=STREAM, name="aten::mm", launch=0, work=0),
        HostCall(lane=MAIN, name="aten::view"),
        HostCall(lane=MAIN, name="aten::mm"), Kernel(lane=STREAM, name="aten::mm", launch=3, work=0),
    )  # fmt: skip
    work = Work("aten::mm", (matrix, matrix), (matrix,))
    graph = OpGraph("made", (Program(LANES, ops),), (RankProgram(0, 0),), works=(work,))
    placed = sim.place(graph, two_ranks)
    product = placed.ranks[0].costs.duration_ns[1]
    # The square of 256 lies on its curve, without what the curve's first point shows above the floor of 2 us:
    # 2 x 256^3 / 1e5 + 2 - 5.24 = 332.3 us; an op's own part is 12 - 2 us, a view takes 1.
    assert product == pytest.approx(332_300, rel=0.02)
    timeline = sim.replay(placed)
    assert max(span.end_ns for span in timeline.spans) == 2 * (10_000 + product) + 1_000


def test_a_product_on_a_cpu_is_one_tile(two_ranks: Topology) -> None:
    fit = {
        "source": "x", "data": "x", "efficiency": 0.5, "operand_elements": 8.0, "prologue_k": 10.0, "tail": 0.0,
        "split_us": 0.0, "fixed_us": 3.0, "memory_efficiency": 1.0, "overlap": 12.0, "tiles": [[1, 1]],
    }  # fmt: skip
    sheet = two_ranks.gpus[0].profile.model_copy(update={"tflops": {"float32": 0.2}, "sms": 2, "measured": Measured()})
    device = with_block(sheet, gemm={"float32": fit}, memory={"source": "x", "data": "x", "efficiency": 1.0})
    # n = 100 is 7 vectors of 16 float32: 112. Two cores, each 0.1 x 0.5 TFLOP/s = 50,000 operations a us, share
    # 2 x (112 x 48 + 8 x (112 + 48)) x (190 + 10) = 2,662,400 operations: 26.624 us, and the kernel's 3.
    # Its operands are too few bytes to show (overlap 12).
    told = products_us(products(1, 48, 100, 190, "float32", aligned=True), "float32", abilities_of(device)).us[0]
    assert told == pytest.approx(29.624, rel=0.02)


# Two side by side ----------------------------------------


def test_rows_of_two_profiles() -> None:
    left, right = compare.read_side("a5000x8"), compare.read_side("dgx-a100")
    rows = {row.what: row for row in compare.compared(left, right)}
    assert (rows["SMs"].left, rows["SMs"].right) == (64, 108)
    assert rows["memory bandwidth, data sheet"].left == 768
    # The A5000's all-reduce of 64 MiB over 8 is on its curve.
    row = rows["all_reduce, 8 ranks, 64.00 MiB"]
    assert row.left == pytest.approx(8234.52) and row.right is not None and row.right < row.left


def test_profiles_alone_have_no_host_and_no_links() -> None:
    rows = [row.what for row in compare.compared(compare.read_side("rtx-a5000"), compare.read_side("a40"))]
    assert not [what for what in rows if what.startswith(("host", "all_reduce"))]


@pytest.mark.parametrize("names", [("rtx-a5000", "a100-pcie-40gb"), ("a5000x8", "cpu-gloo"), ("epyc-7763", "h200-sxm")])
def test_the_picture_is_the_same_to_the_byte(names: tuple[str, str], tmp_path: Path) -> None:
    left, right = map(compare.read_side, names)
    write_plot(left, right, tmp_path / "a.png")
    write_plot(left, right, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_command_compares(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, said, errors = run("calibrate", "--compare", "rtx-a5000", "rtx-a6000", "--plot", tmp_path / "x.png")
    assert (code, errors) == (0, "")
    assert "float16, 4096^3 product" in said and f"drawn to {tmp_path / 'x.png'}" in said
