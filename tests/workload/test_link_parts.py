"""The parts of linking, each on a few events with the answer worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sim.errors import UserError
from sim.ops import Alloc, Collective, Copy, Free, HostCall, Kernel, TensorMeta, Work
from sim.workload.inputs import Workload, read_inputs
from sim.workload.link.collectives import kind_of
from sim.workload.link.nodes import plain_name
from tests.oracle import replay, steps
from tests.workload.made_machine import Machine

Event = dict[str, Any]


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, pid: int = 1, **args: Any) -> Event:
    return {"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, "ts": ts, "dur": dur, "args": args}


def call(name: str, ts: float, dur: float, correlation: int = -1, tid: int = 1) -> Event:
    return event("cuda_runtime", name, ts, dur, tid, correlation=correlation)


def kernel(ts: float, dur: float, correlation: int, stream: int = 7, name: str = "kern", **args: Any) -> Event:
    return event("kernel", name, ts, dur, stream, 0, correlation=correlation, stream=stream, device=0, **args)


def memory(ts: float, size: int, **args: Any) -> Event:
    args |= {"Device Type": 1, "Device Id": 0, "Bytes": size}
    return {"ph": "i", "name": "[memory]", "pid": 1, "tid": 1, "ts": ts, "args": args}


def linked(folder: Path, events: list[Event], **head: Any) -> Workload:
    path = folder / "small.pt.trace.json"
    path.write_text(json.dumps({"traceEvents": events, **head}))
    return read_inputs([path])


def ops(work: Workload, kind: type) -> list[Any]:
    return [op for op in work.graph.programs[0].ops if isinstance(op, kind)]


def test_a_synchronising_call_keeps_only_what_remains(tmp_path: Path) -> None:
    # Launched at 100 for 5 us, runs 110 to 400; the call from 150 to 404 waits 250 us and has 4 us of its own.
    work = linked(
        tmp_path, [call("cudaLaunchKernel", 100, 5, 1), kernel(110, 290, 1), call("cudaDeviceSynchronize", 150, 254)]
    )
    launch, sync = ops(work, HostCall)
    assert (launch.measured_ns, sync.before_ns, sync.measured_ns) == (5_000, 45_000, 4_000)
    assert [type(work.graph.programs[0].ops[i]) for i in sync.waits] == [Kernel]


def test_a_busy_stream_gives_gaps_and_an_idle_one_lags(tmp_path: Path) -> None:
    # The first kernel starts 10 us after its launch began on an idle stream, the second 2 us after the first ended.
    work = linked(
        tmp_path,
        [
            call("cudaLaunchKernel", 100, 5, 1),
            call("cudaLaunchKernel", 120, 5, 2),
            kernel(110, 290, 1),
            kernel(402, 50, 2),
        ],
    )
    first, second = ops(work, Kernel)
    assert first.lag_ns == 10_000
    assert second.gap_ns == 2_000
    # What did not decide is the trace's typical value, as far as it does not decide.
    assert (first.gap_ns, second.lag_ns) == (2_000, 10_000)


def test_a_pageable_copy_is_launched_and_then_waited_for(tmp_path: Path) -> None:
    copy = event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 112, 30, 7, 0, correlation=1, stream=7, bytes=4096)
    work = linked(
        tmp_path, [call("cudaMemcpyAsync", 100, 45, 1), copy, call("cudaLaunchKernel", 160, 5, 2), kernel(170, 9, 2)]
    )
    launch, wait, after = ops(work, HostCall)
    # The call began at 100, the copy ended at 142, the call at 145: 3 us remain; then 15 us until the next call.
    assert (launch.measured_ns, wait.measured_ns, after.before_ns) == (0, 3_000, 15_000)
    (copied,) = ops(work, Copy)
    assert (copied.kind, copied.bytes, copied.lag_ns) == ("d2h", 4096, 12_000)


def test_one_launch_recorded_by_runtime_and_driver_is_one(tmp_path: Path) -> None:
    inner = event("cuda_driver", "cuLaunchKernel", 101, 3, correlation=1)
    work = linked(tmp_path, [call("cudaLaunchKernel", 100, 5, 1), inner, kernel(110, 40, 1)])
    assert [c.name for c in ops(work, HostCall)] == ["cudaLaunchKernel"]
    assert not work.graph.warnings


def test_the_kernel_knows_its_op(tmp_path: Path) -> None:
    shapes = {
        "Input Dims": [[4, 8], [8, 2], [], [[2], [3, 5]]],
        "Input type": ["c10::BFloat16", "float", "Scalar", "TensorList"],
        "Input Strides": [[8, 1], [1, 8], [], []],
        "Concrete Inputs": ["", "", "1.5", ""],
    }
    host = [event("cpu_op", "aten::linear", 90, 60), event("cpu_op", "aten::mm", 95, 40, **shapes)]
    work = linked(tmp_path, [*host, call("cudaLaunchKernel", 100, 5, 1), kernel(110, 40, 1)])
    # The innermost op around the launch; contiguous strides are left out; a list's tensors follow one another.
    inputs = (
        TensorMeta("bfloat16", (4, 8)), TensorMeta("float32", (8, 2), (1, 8)),
        TensorMeta("float32", (2,)), TensorMeta("float32", (3, 5)),
    )  # fmt: skip
    assert work.graph.works == (Work("aten::mm", inputs, (), (("arg2", 1.5),)),)


def test_frees_without_an_address_take_the_latest_block_of_their_size(tmp_path: Path) -> None:
    base = [call("cudaLaunchKernel", 100, 5, 1), kernel(110, 400, 1)]
    frees = [memory(200, 512), memory(210, 512), memory(220, -512), memory(230, -1024), memory(240, 2048)]
    work = linked(tmp_path, base + frees)
    allocs, freed = ops(work, Alloc), ops(work, Free)
    # 1,024 bytes were there before; of the two blocks of 512 the second is freed; two are never freed.
    assert [a.bytes for a in allocs] == [1024, 512, 512, 2048]
    assert [f.block for f in freed] == [allocs[2].block, allocs[0].block]
    assert any("1 blocks freed that were allocated before the trace" in w for w in work.graph.warnings)
    assert {a.stream for a in allocs} == {1}


def test_totals_tell_what_else_was_allocated_before(tmp_path: Path) -> None:
    base = [call("cudaLaunchKernel", 100, 5, 1), kernel(110, 400, 1)]
    first = {"Addr": 4096, "Total Allocated": 10_512, "Total Reserved": 20_000}
    work = linked(tmp_path, [*base, memory(200, 512, **first), memory(210, -2_000, Addr=64)])
    # 10,512 with the first block: 10,000 before it, of which the block at address 64 is 2,000.
    assert [(a.bytes, a.address) for a in ops(work, Alloc)] == [(2_000, 64), (8_000, None), (512, 4096)]
    assert work.measured is not None
    assert [(m.allocated_bytes, m.reserved_bytes) for m in work.measured.memory] == [(10_512, 20_000)]


def test_a_collective_says_what_it_moves(tmp_path: Path) -> None:
    args = {
        "Collective name": "_reduce_scatter_base", "In msg nelems": 1024, "Out msg nelems": 128, "Group size": 8,
        "dtype": "BFloat16", "Process Group Name": "3", "Process Group Ranks": "[0, 2, 4, 6, 8, 10, 12, 14]",
    }  # fmt: skip
    nccl = kernel(110, 40, 1, name="ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(x)", **args)
    work = linked(tmp_path, [call("cudaLaunchKernel", 100, 5, 1), nccl], distributedInfo={"rank": 4, "world_size": 16})
    (collective,) = ops(work, Collective)
    # The whole tensor is the input: 1,024 elements of 2 bytes.
    assert (collective.kind, collective.bytes, collective.dtype) == ("reduce_scatter", 2048, "bfloat16")
    assert work.graph.groups == {"3": ((0, 2, 4, 6, 8, 10, 12, 14),)}
    assert [r.rank for r in work.graph.ranks] == [4]
    assert "7 ranks are not among the traces (0, 2, 6, 8, 10, 12, 14)" in work.graph.warnings[0]


@pytest.mark.parametrize(
    ("title", "kind"),
    [
        ("nccl:all_reduce", "all_reduce"),
        ("_allgather_base", "all_gather"),
        ("reduce_scatter_tensor_coalesced", "reduce_scatter"),
        ("ncclDevKernel_Broadcast_RING_LL", "broadcast"),
        ("alltoallv", "all_to_all"),
        ("reduce", "reduce"),
        ("ncclKernel_SendRecv_RING_SIMPLE_Sum_int8_t", None),
        ("c10d::allreduce_", "all_reduce"),
    ],
)
def test_names_of_collectives(title: str, kind: str | None) -> None:
    assert kind_of(title) == kind


def test_send_and_recv_meet_in_pairs(tmp_path: Path) -> None:
    for rank, (title, start) in enumerate((("nccl:send 0->1", 110.0), ("nccl:recv 1<-0", 150.0))):
        shape = {"Input Dims": [[256]], "Input type": ["float"]}
        events = [
            event("user_annotation", title, 90, 40, **shape), call("cudaLaunchKernel", 100, 5, 1),
            kernel(start, 300 - start, 1, name="ncclDevKernel_SendRecv(x)"),
        ]  # fmt: skip
        path = tmp_path / f"rank{rank}.pt.trace.json"
        path.write_text(json.dumps({"traceEvents": events, "distributedInfo": {"rank": rank, "world_size": 2}}))
    graph = read_inputs([tmp_path]).graph
    assert graph.groups == {"world:0-1": ((0, 1),)}
    ends = [op for program in graph.programs for op in program.ops if isinstance(op, Collective)]
    # Both end at 300; the later began at 150: the transfer is 150 us.
    assert [(c.kind, c.peer, c.bytes, c.measured_ns) for c in ends] == [
        ("send", 1, 1024, 150_000),
        ("recv", 0, 1024, 150_000),
    ]


def test_names_without_their_vendor() -> None:
    names = [
        "cudaLaunchKernel",
        "cuLaunchKernel",
        "hipLaunchKernel",
        "cudaMemcpyAsync_ptsz",
        "cudaStreamGetCaptureInfo_v2",
    ]
    assert [plain_name(n) for n in names] == ["LaunchKernel"] * 3 + ["MemcpyAsync", "StreamGetCaptureInfo"]


def test_ranks_are_named_by_their_files_where_the_traces_do_not_say(tmp_path: Path) -> None:
    for name in ("worker3.1623143089.pt.trace.json", "worker5.1623143089.pt.trace.json"):
        machine = Machine()
        machine.begin_step()
        machine.op("mm", 10, 20)
        machine.end_step()
        machine.write(tmp_path / name)
    assert [r.rank for r in read_inputs([tmp_path]).graph.ranks] == [3, 5]


def test_a_trace_without_marks_is_one_step_to_the_device_s_end(tmp_path: Path) -> None:
    # From the first call at 100 to the kernel's end at 400.
    work = linked(tmp_path, [call("cudaLaunchKernel", 100, 5, 1), kernel(110, 290, 1)])
    assert work.measured is not None
    assert [(s.name, s.duration_ns) for s in work.measured.steps] == [("trace", 300_000)]
    assert steps(work.graph, replay(work.graph)) == {0: [("trace", 300_000)]}


def test_no_traces_at_all() -> None:
    from sim.workload.link import link_traces

    with pytest.raises(UserError, match="no traces; give"):
        link_traces([])
