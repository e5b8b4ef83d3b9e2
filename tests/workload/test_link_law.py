"""The law of linking: a trace's graph, with other durations, is the graph of the trace that those durations give.

Each program runs on the made machine as it is, with faster and slower kernels, and with a faster host.  The graph
linked from the first run alone must predict the others.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from made_machine import Machine
from oracle import replay, steps
from scaling import scaled

from sim.workload.link import link_traces, read_traces

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
    polling,
]  # fmt: skip


def run(program: Program, kernels: float = 1.0, host: float = 1.0, old: bool = False) -> Machine:
    machine = Machine(kernels, host, old)
    program(machine)
    return machine


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_one_trace_predicts_the_others(program: Program, old: bool, tmp_path: Path) -> None:
    machine = run(program, old=old)
    graph = link_traces(read_traces([machine.write(tmp_path / "made.pt.trace.json")])).graph
    for kernels, host in ((1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.5), (0.25, 1.0), (4.0, 1.0)):
        predicted = [ns / 1000 for _, ns in steps(graph, replay(scaled(graph, kernels, host)))[0]]
        truth = run(program, kernels, host, old).step_times()
        # The whole run within 2 %: a change of speed moves work from one step to the next where they overlap.
        assert sum(predicted) == pytest.approx(sum(truth), rel=0.02), (kernels, host, predicted, truth)
        for a, b in zip(predicted, truth, strict=True):
            assert a == pytest.approx(b, rel=0.05), (kernels, host, predicted, truth)
