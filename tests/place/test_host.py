"""What the host takes for a call of a synthesized workload, by kind of op and by thread."""

from __future__ import annotations

import pytest

from sim.errors import UserError
from sim.graph import OpGraph, Program, RankProgram
from sim.ops import HostCall, Kernel, Lane, Op, TensorMeta, Work
from sim.place.host import host_us
from sim.place.place import place
from sim.topology.load import load_topology
from sim.topology.schema import HostCosts

MAIN, AUTOGRAD = Lane("thread", 1, "main"), Lane("thread", 2, "autograd")


def cost(host: HostCosts, name: str, thread: Lane = MAIN, launches: bool = True) -> float:
    return host_us(host, HostCall(lane=0, name=name), thread, launches)


def test_kinds_are_as_every_op_unless_stated() -> None:
    host = HostCosts(op_us=15, metadata_us=4)
    names = ["aten::mm", "aten::_softmax", "aten::copy_", "aten::_foreach_add_", "aten::mul", "autograd::Engine"]
    assert {cost(host, name, thread) for name in names for thread in (MAIN, AUTOGRAD)} == {15}
    assert cost(host, "aten::view", launches=False) == 4


def test_a_stated_kind_goes_before_the_thread_and_the_thread_before_every_op() -> None:
    host = HostCosts(op_us=15, product_us=30, norm_us=20, copy_us=10, list_us=100, backward_us=8)
    assert [cost(host, f"aten::{name}") for name in ("addmm", "native_layer_norm", "_to_copy", "mul")] == [
        30,
        20,
        10,
        15,
    ]
    assert [cost(host, f"aten::{name}", AUTOGRAD) for name in ("mm", "native_layer_norm_backward", "mul")] == [
        30,
        20,
        8,
    ]
    assert cost(host, "aten::_foreach_lerp_") == cost(host, "aten::_fused_adamw_") == 100
    assert cost(host, "aten::view", AUTOGRAD, launches=False) == 4  # what launches nothing is metadata everywhere


def test_kinds_are_set_by_path_and_reach_the_placement() -> None:
    tensor = TensorMeta("float32", (64, 64))
    ops: tuple[Op, ...] = tuple(
        op
        for i, name in enumerate(("aten::mm", "aten::mul"))
        for op in (HostCall(lane=0, name=name), Kernel(lane=1, name=name, launch=2 * i, work=i))
    )
    works = (Work("aten::mm", (tensor, tensor), (tensor,)), Work("aten::mul", (tensor, tensor), (tensor,)))
    lanes = (MAIN, Lane("stream", 7, "compute"))
    graph = OpGraph("two", (Program(lanes, ops),), (RankProgram(0, 0),), works)
    machine = load_topology("a5000x1", {"host.product_us": "30", "host.op_us": "12"})
    durations = place(graph, machine).ranks[0].costs.duration_ns
    assert (durations[0], durations[2]) == (30_000, 12_000)
    with pytest.raises(UserError, match=r"host\.product_us"):
        load_topology("a5000x1", {"host.product_us": "-1"})
