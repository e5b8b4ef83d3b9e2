"""Measured timelines written as traces: the plugin and the project's own reader find what was in the recording."""

from __future__ import annotations

from pathlib import Path

import pytest

from sim.report.chrome import write_traces
from sim.report.summarize import summarize
from sim.workload.inputs import read_inputs

# Two traces whose steps the plugin takes from the host alone, as it does of files with today's category names.
TRACES = ["v100-1gpu-steady.pt.trace.json.gz", "a100-ddp-rank0of2.pt.trace.json.gz"]


@pytest.mark.parametrize("name", TRACES)
def test_the_plugin_finds_the_same_in_both(shared_dir: Path, tmp_path: Path, name: str) -> None:
    data = pytest.importorskip("torch_tb_profiler.profiler.data", reason="the TensorBoard plugin is not installed")
    recorded = shared_dir / "data" / "traces" / name
    measured = read_inputs([recorded]).measured
    assert measured is not None
    (written,) = write_traces(measured, tmp_path)
    ours, theirs = (
        data.RunProfileData.parse("rank0", None, str(file), str(tmp_path)) for file in (written, recorded)
    )  # fmt: skip
    assert ours.steps_names == theirs.steps_names
    # The recording's times are floats of microseconds since 1970, good to a quarter of one.
    for mine, its in zip(ours.steps_costs, theirs.steps_costs, strict=True):
        assert mine.costs[-1] == pytest.approx(its.costs[-1], abs=0.5)
    assert dict(ours.kernel_stat["count"]) == dict(theirs.kernel_stat["count"])
    assert dict(ours.kernel_stat["sum"]) == pytest.approx(dict(theirs.kernel_stat["sum"]))
    assert ours.used_devices == theirs.used_devices
    assert ours.device_props[0]["name"] == theirs.device_props[0]["name"]


@pytest.mark.parametrize("name", [*TRACES, "h100-qwen0.5b-forward.pt.trace.json.gz", "v100-dlrm-8ranks"])
def test_the_own_reader_reads_the_same_summary_back(shared_dir: Path, tmp_path: Path, name: str) -> None:
    measured = read_inputs([shared_dir / "data" / "traces" / name]).measured
    assert measured is not None
    write_traces(measured, tmp_path)
    again = read_inputs([tmp_path]).measured
    assert again is not None
    before, after = summarize(measured), summarize(again)
    before.check()
    assert after.steps_ms == before.steps_ms
    assert after.kernel_ms == before.kernel_ms
    assert after.breakdown_ms == before.breakdown_ms
    assert after.peak_allocated_bytes == before.peak_allocated_bytes
    assert [(r.kind, r.bytes, r.ranks, r.count, r.total_ms) for r in after.collectives] == [
        (r.kind, r.bytes, r.ranks, r.count, r.total_ms) for r in before.collectives
    ]
