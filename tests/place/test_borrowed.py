"""Whose efficiencies price a device's kernels is told, each borrow by name and count."""

from __future__ import annotations

import sim
from sim.graph import OpGraph, Program, RankProgram
from sim.ops import HostCall, Kernel, TensorMeta, Work
from sim.place.placement import Placement
from sim.topology.abilities import UNKNOWN, abilities_of
from sim.topology.device import load_device
from tests.programs import LANES, MAIN, STREAM


def placed(machine: str, *ops: tuple[str, str]) -> Placement:
    """A kernel of each op on 512 x 512 of a dtype."""
    works = tuple(Work(op, (t := TensorMeta(dtype, (512, 512)), t), (t,)) for op, dtype in ops)
    program: list[HostCall | Kernel] = []
    for i, (op, _) in enumerate(ops):
        program += [HostCall(lane=MAIN, name=op), Kernel(lane=STREAM, name=op, launch=2 * i, work=i)]
    graph = OpGraph("made", (Program(LANES, tuple(program)),), (RankProgram(0, 0),), works=works)
    return sim.place(graph, sim.load_topology(machine))


OPS = (("aten::mm", "float16"), ("aten::relu", "float16"), ("aten::relu", "float32"), ("aten::_softmax", "float32"))


def test_a_device_that_is_not_calibrated_says_who_lends_for_what() -> None:
    told = placed("dgx-h100", *OPS).warnings
    assert (
        "NVIDIA H100 80GB HBM3 borrows efficiencies from a100-pcie-40gb for elementwise kernels (2), softmax kernels "
        "(1); from a100-sxm4-80gb for matrix products in half precision (1)"
    ) in told


def test_what_is_the_devices_own_is_not_borrowed() -> None:
    told = [text for text in placed("a5000x1", *OPS).warnings if "borrows" in text]
    assert told == ["NVIDIA RTX A5000 borrows efficiencies from v100-pcie for softmax kernels (1)"]


def test_a_dtype_without_a_rate_is_told() -> None:
    told = placed("a5000x1", ("aten::mm", "float64"), ("aten::relu", "float64")).warnings
    assert "NVIDIA RTX A5000 has no rate in its profile for kernels of float64 (1): estimated as float32" in told


def test_a_cpu_that_borrows_from_gpus_says_so_and_is_in_doubt() -> None:
    placement = placed("cpu-gloo", *OPS)
    (told,) = [text for text in placement.warnings if "borrows" in text]
    assert told.endswith("a GPU's say little of a CPU: `tracesim calibrate` measures this one")
    intervals = {part.interval for kind in placement.doubts.kinds for part in kind if "AMD EPYC" in part.source.name}
    assert {(i.p10, i.p90) for i in intervals} >= {UNKNOWN}
    assert placement.doubts.ranks[0].host != -1


def test_a_cpu_has_no_call_around_its_kernels() -> None:
    assert abilities_of(load_device("epyc-7763")).call.fit.elementwise == 0
