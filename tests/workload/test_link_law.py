"""The law of linking: a trace's graph, with other durations, is the graph of the trace that those durations give.

Each program runs on the made machine as it is, with faster and slower kernels, and with a faster host.  The graph
linked from the first run alone must predict the others.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sim.workload.inputs import read_inputs
from tests.oracle import replay, steps
from tests.workload.made_machine import Machine
from tests.workload.scaling import scaled

Program = Callable[[Machine], None]


def host_bound(m: Machine) -> None:
    for _ in range(3):
        m.begin_step()
        for i in range(60):
            m.op("add", 40, 10 + i % 5)
        with m.backward():
            for _ in range(60):
                m.op("mul", 35, 12)
        m.op("_foreach_add_", 50, 20)
        m.end_step()
        m.think(30)


def queue_full(m: Machine) -> None:
    """The host runs ahead until the launch queue is full."""
    for _ in range(4):
        m.begin_step()
        for _ in range(300):
            m.op("mm", 10, 60)
        with m.backward():
            for _ in range(300):
                m.op("mm", 10, 70, 50)
        m.op("_foreach_add_", 50, 200)
        m.end_step()
        m.think(30)


def item_each_step(m: Machine) -> None:
    """loss.item() waits for the device at each step's end."""
    for _ in range(3):
        m.begin_step()
        for _ in range(40):
            m.op("mm", 15, 80)
        with m.backward():
            for _ in range(40):
                m.op("mm", 15, 160)
        m.copy(2, "DtoH (Device -> Pageable)")
        m.synchronize("cudaStreamSynchronize", 7)
        m.think(100)
        m.end_step()
        m.think(20)


def device_synchronize(m: Machine) -> None:
    for _ in range(3):
        m.begin_step()
        for _ in range(80):
            m.op("mm", 12, 55)
        m.synchronize("cudaDeviceSynchronize")
        m.end_step()
        m.think(400)


def communication(m: Machine) -> None:
    """Buckets are reduced on another stream while backward goes on; the optimizer waits for them."""
    for _ in range(3):
        m.begin_step()
        for _ in range(30):
            m.op("mm", 20, 60)
        with m.backward():
            for i in range(30):
                m.op("mm", 20, 120)
                if i % 10 == 9:
                    m.wait_event(20, 7)
                    m.launch(900, 20, "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)")
            m.wait_event(7, 20)
        for _ in range(5):
            m.op("_foreach_add_", 30, 100)
        m.synchronize("cudaDeviceSynchronize")
        m.end_step()
        m.think(50)


def prefetch(m: Machine) -> None:
    """Pinned copies on their own stream, one batch ahead."""
    for _ in range(4):
        m.begin_step()
        m.wait_event(24, 7)
        m.copy(1500, "HtoD (Pinned -> Device)", 24)
        m.wait_event(7, 24)
        for _ in range(30):
            m.op("mm", 20, 90)
        m.copy(2, "DtoH (Device -> Pageable)")
        m.end_step()
        m.think(50)


def pageable_input(m: Machine) -> None:
    for _ in range(4):
        m.begin_step()
        m.think(900)
        m.copy(800, "HtoD (Pageable -> Device)")
        for _ in range(50):
            m.op("mm", 15, 70)
        m.end_step()
        m.think(50)


def cuda_graph(m: Machine) -> None:
    for _ in range(4):
        m.begin_step()
        m.think(300)
        m.graph([40.0] * 100)
        m.copy(2, "DtoH (Device -> Pageable)")
        m.end_step()
        m.think(50)


def two_streams(m: Machine) -> None:
    """Forward in halves on two compute streams, joined by events."""
    for _ in range(3):
        m.begin_step()
        for _ in range(20):
            m.wait_event(24, 7)
            m.op("mm", 10, 120, stream=24)
            m.op("mm", 10, 60)
            m.wait_event(7, 24)
            m.op("add", 10, 15)
        m.synchronize("cudaStreamSynchronize", 7)
        m.end_step()
        m.think(50)


def sharded(m: Machine) -> None:
    """As FSDP: the weights of the next layer are gathered while this one computes."""
    for _ in range(3):
        m.begin_step()
        for _ in range(16):
            m.wait_event(20, 7)
            m.launch(150, 20, "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)")
            m.wait_event(7, 20)
            for _ in range(4):
                m.op("mm", 20, 70)
        m.synchronize("cudaDeviceSynchronize")
        m.end_step()
        m.think(50)


def polling(m: Machine) -> None:
    for _ in range(3):
        m.begin_step()
        for _ in range(50):
            m.op("mm", 15, 100)
        m.poll(7)
        m.end_step()
        m.think(50)


PROGRAMS = [
    host_bound, queue_full, item_each_step, device_synchronize, communication, prefetch, pageable_input, cuda_graph,
    polling, two_streams, sharded,
]  # fmt: skip


def run(program: Program, kernels: float = 1.0, host: float = 1.0, dialect: str = "new") -> Machine:
    machine = Machine(kernels, host, dialect)
    program(machine)
    return machine


@pytest.mark.parametrize("dialect", ["new", "old", "hip", "sync"])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_one_trace_predicts_the_others(program: Program, dialect: str, tmp_path: Path) -> None:
    machine = run(program, dialect=dialect)
    graph = read_inputs([machine.write(tmp_path / "made.pt.trace.json")]).graph
    for kernels, host in ((1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.5), (0.25, 1.0), (4.0, 1.0)):
        predicted = [ns / 1000 for _, ns in steps(graph, replay(scaled(graph, kernels, host)))[0]]
        truth = run(program, kernels, host, dialect).step_times()
        # The whole run within 2 %: a change of speed moves work from one step to the next where they overlap.
        assert sum(predicted) == pytest.approx(sum(truth), rel=0.02), (kernels, host, predicted, truth)
        for a, b in zip(predicted, truth, strict=True):
            assert a == pytest.approx(b, rel=0.05), (kernels, host, predicted, truth)


def train_together(m: Machine) -> None:
    """Data parallel: rank r thinks longer before each step, so the others wait for it in the first all_reduce."""
    assert m.rank is not None
    for step in range(3):
        m.begin_step()
        m.think(200 + 300 * ((m.rank + step) % m.world))
        for _ in range(20):
            m.op("mm", 20, 40)
        with m.backward():
            for i in range(20):
                m.op("mm", 20, 80)
                if i % 10 == 9:
                    m.all_reduce(1000 + i, 400)
            m.wait_event(7, 20)
        for _ in range(3):
            m.op("_foreach_add_", 30, 60)
        m.copy(2, "DtoH (Device -> Pageable)")
        m.end_step()
        m.think(50)


def run_together(world: int, kernels: float = 1.0, host: float = 1.0) -> list[Machine]:
    """All ranks, again and again until nobody arrives at a collective later than the others knew."""
    meetings: list[float] = []
    while True:
        machines = [Machine(kernels, host, rank=rank, world=world) for rank in range(world)]
        for machine in machines:
            machine.meetings = meetings
            machine.clock_ahead = 7_000_000.0 * machine.rank  # type: ignore[operator]
            train_together(machine)
        latest = [max(arrivals) for arrivals in zip(*(m.arrivals for m in machines), strict=True)]
        if latest == meetings:
            return machines
        meetings = latest


@pytest.mark.parametrize(("kernels", "host"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.5)])
def test_ranks_with_clocks_of_their_own_meet_in_collectives(kernels: float, host: float, tmp_path: Path) -> None:
    for machine in run_together(4):
        machine.write(tmp_path / f"rank{machine.rank}.pt.trace.json")
    linked = read_inputs([tmp_path])
    assert linked.graph.groups == {"world": ((0, 1, 2, 3),)}
    assert not linked.graph.warnings
    predicted = steps(linked.graph, replay(scaled(linked.graph, kernels, host)))
    for machine in run_together(4, kernels, host):
        assert machine.rank is not None
        times = [ns / 1000 for _, ns in predicted[machine.rank]]
        assert times == pytest.approx(machine.step_times(), rel=0.03)
