"""A trace whose device is the CPU, taken here and now, is replayed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, schedule

from sim.ops import HostCall
from sim.workload.inputs import read_inputs
from tests.oracle import replay, steps


def test_a_training_loop_on_this_cpu(tmp_path: Path) -> None:
    path = tmp_path / "cpu.pt.trace.json"
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with profile(
        activities=[ProfilerActivity.CPU],
        schedule=schedule(wait=0, warmup=1, active=3),
        on_trace_ready=lambda p: p.export_chrome_trace(str(path)),
        record_shapes=True,
    ) as profiler:
        for _ in range(4):
            model(torch.randn(64, 256)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            profiler.step()
    # What `tracesim trace` writes into the file's head.
    path.write_text(json.dumps({**json.loads(path.read_text()), "tracesim_device": "cpu"}))
    work = read_inputs([path])
    assert work.measured is not None
    predicted = steps(work.graph, replay(work.graph))[0]
    assert len(predicted) == 3
    for (_, ns), measured in zip(predicted, work.measured.steps, strict=True):
        assert ns == pytest.approx(measured.duration_ns, rel=0.001)
    worked = {
        work.graph.works[op.work].op
        for op in work.graph.programs[0].ops
        if isinstance(op, HostCall) and op.work is not None
    }
    assert {"aten::linear", "aten::relu", "aten::mm"} <= worked
