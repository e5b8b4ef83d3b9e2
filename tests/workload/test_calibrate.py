"""calibrate on this machine: small grids, measured for real; kills, resumes, and ranks that die."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import msgspec
import pytest
import torch

from sim.errors import InputError, UserError
from sim.measurements import Device, Machine, Sample, header_line, read, sample_lines
from sim.topology.device import load_device
from sim.topology.load import load_topology
from sim.workload.calibrate import links, timer
from sim.workload.calibrate.about import this_machine, unused_gpus, vendor
from sim.workload.calibrate.host import launch_times
from sim.workload.calibrate.journal import Journal
from sim.workload.calibrate.spec import GRIDS, partial_file, sections_of
from sim.workload.calibrate.timer import CudaTimer, Repeats, spread_of, timed

TINY = ("calibrate", "--grid", "tiny", "--threads", "1")
CPU = Device("cpu", "A CPU, 1 threads", 1, 1, 2**34, 2**25)
HERE = Machine(CPU, "A CPU", 2, "unknown", {"torch": "2.13.0"}, "tracesim calibrate", "2026-11-25", 0.1)


def test_a_whole_run_gives_a_profile_and_a_machine_that_other_commands_take(
    run: Callable[..., object], tmp_path: Path
) -> None:
    out = tmp_path / "cpu.yaml"
    code, said, errors = run(*TINY, "--out", out)
    assert (code, errors) == (0, ""), errors
    assert f"{out} and {tmp_path}/cpu.topology.yaml" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cpu.topology.yaml", "cpu.yaml"]
    profile = load_device(str(out))
    assert profile.kind == "cpu" and profile.name == "cpu" and profile.sms == 1
    assert set(profile.calibration.gemm) == {"float32", "float16"}  # float16's family: bfloat16 was measured
    assert set(profile.calibration.rows) == {"softmax", "layer_norm"}
    assert profile.calibration.memory is not None and profile.calibration.attention is not None
    assert "tracesim calibrate --grid tiny" in profile.source
    machine = load_topology(str(tmp_path / "cpu.topology.yaml"))
    assert machine.gpus[0].profile == profile
    assert 0 < machine.host.metadata_us < machine.host.op_us < 1000
    code, said, _ = run("kernel", "gemm", "--m", 128, "--n", 96, "--k", 64, "--dtype", "float32", "--device", out)
    assert code == 0 and "its own profile" in said


def test_only_and_links_choose_sections() -> None:
    assert sections_of(None, links=False)[-1] == "attention"
    assert sections_of(None, links=True)[-1] == "links"
    assert sections_of("copy, gemm", links=False) == ("gemm", "copy")
    assert sections_of("copy", links=True) == ("copy", "links")


# Killed by itself, so that it is the fifth measurement however busy this machine is.
KILLED_AT_THE_FIFTH = """
import os, signal, sys
from sim.cli import main
from sim.workload.calibrate.journal import Journal

add = Journal.add


def add_and_die(journal, sample):
    add(journal, sample)
    if len(journal.taken) == 5:
        os.kill(os.getpid(), signal.SIGKILL)


Journal.add = add_and_die
main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, run: Callable[..., object]) -> None:
    out = tmp_path / "cpu.yaml"
    journal = partial_file(out)
    words = [sys.executable, "-c", KILLED_AT_THE_FIFTH, *TINY, "--only", "gemm,softmax", "--out", str(out)]
    killed = subprocess.run(words, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    kept = read(journal).samples
    assert len(kept) == 5
    journal.write_bytes(journal.read_bytes() + b'{"section":"gem')  # a line that the kill cut off
    code, _, errors = run(*TINY, "--only", "gemm,softmax", "--out", out)
    assert code == 0
    assert f"going on after {len(kept)} measurements" in errors
    assert out.exists() and not journal.exists()


def test_an_interrupt_keeps_what_is_there_and_says_how_to_go_on(tmp_path: Path) -> None:
    out = tmp_path / "cpu.yaml"
    journal = partial_file(out)
    words = [sys.executable, "-m", "sim", "calibrate", "--quick", "--only", "gemm", "--threads", "1", "--out", str(out)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and (not journal.exists() or len(journal.read_bytes().splitlines()) < 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"are kept in {journal}, the same command goes on" in errors
    assert "Traceback" not in errors
    assert read(journal).samples


# The journal ----------------------------------------


def _sample(size: int) -> Sample:
    return Sample("gemm", "float32", (1, size, size, size), 3.0, 2.5, 4.0, 5, 10, 1)


def test_a_journal_is_its_own_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "x.partial.jsonl"
    path.write_bytes(header_line(HERE) + sample_lines([_sample(64), _sample(128)]))
    taken = read(path)
    assert taken.machine == HERE and taken.samples == (_sample(64), _sample(128))
    assert taken.us("gemm", "float32", (1, 64, 64, 64)) == 3.0


def test_an_empty_journal_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.partial.jsonl"
    with Journal(path, HERE):
        assert path.exists()
    assert not path.exists()


def test_a_journal_of_another_machine_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.partial.jsonl"
    path.write_bytes(header_line(HERE) + sample_lines([_sample(64)]))
    other = Machine(CPU, "A CPU", 2, "unknown", {"torch": "2.14.0"}, "tracesim calibrate", "2026-11-26", 0.1)
    with pytest.raises(InputError, match="another machine or with other versions; remove it"):
        Journal(path, other)


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "it is empty"), (b"[]\n", "line 1: holds no measurements"), (b'{"format": "x"}\n', "line 1"),
     (header_line(HERE) + b"{}\n" + sample_lines([_sample(64)]), "line 2: is no measurement")],
)  # fmt: skip
def test_a_file_that_is_no_journal(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "x.partial.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=problem):
        read(path)


# Timing ----------------------------------------


def test_the_spread_of_repeats() -> None:
    # 1..11: the median is 6; a tenth of the way from the first to the last of eleven is the second.
    spread = spread_of([float(i) for i in range(11, 0, -1)], 7)
    assert (spread.us, spread.p10, spread.p90, spread.repeats, spread.calls) == (6.0, 2.0, 10.0, 11, 7)
    assert spread.scaled(0.5, less=2.0)[:3] == (2.0, 0.0, 4.0)


def test_disturbed_batches_are_taken_anew() -> None:
    repeats = Repeats(most=5)
    for us, waited in ((1.0, 0.0), (9.0, 0.8), (1.2, 0.01)):
        repeats.take(us, waited)
    assert not repeats.enough(spent_us=500.0, budget_us=200.0)  # two quiet ones: up to three times the time
    repeats.take(1.1, 0.0)
    assert repeats.enough(spent_us=500.0, budget_us=200.0)
    assert repeats.kept() == [1.0, 1.2, 1.1]


def test_a_call_that_others_disturb_all_the_time_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = iter([0.9, 0.7, 1.0] * 100)
    monkeypatch.setattr(timer.Watch, "share", lambda self: next(shares))
    with pytest.raises(UserError, match="others use this machine: several threads cannot be timed"):
        timed(lambda call, calls: 50.0, lambda: None, 1.0, alone=True)
    assert timed(lambda call, calls: 50.0, lambda: None, 1.0, alone=False).us == 50.0


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the system does not tell waiting for a CPU")
def test_waiting_for_a_cpu_that_another_process_has_is_seen() -> None:
    """Both on one CPU: each gets half of it, so this one waits for about half of the time, and never runs all of it."""
    cpu, before = min(os.sched_getaffinity(0)), os.sched_getaffinity(0)
    other = subprocess.Popen([sys.executable, "-c", f"import os\nos.sched_setaffinity(0, {{{cpu}}})\nwhile True: pass"])
    try:
        os.sched_setaffinity(0, {cpu})
        time.sleep(0.5)
        watch, begun = timer.Watch(), time.monotonic()
        while time.monotonic() - begun < 0.5:
            pass
        assert watch.share() > 0.1
    finally:
        os.sched_setaffinity(0, before)
        other.kill()
        other.wait()


def test_where_every_batch_is_disturbed_the_fastest_third_counts() -> None:
    repeats = Repeats(most=2)
    for us in (8.0, 3.0, 5.0, 9.0, 2.0, 7.0):
        repeats.take(us, 1)
    assert repeats.enough(spent_us=1.0, budget_us=100.0)  # three times the most
    assert repeats.kept() == [2.0, 3.0]


class _FakeStream:
    """A GPU's stream on clocks of our own: a copy of the plug takes 100 us, a call 7, each after the one before and
    after the host has launched it, which takes the host 2 us for a copy and ``launch_us`` for a call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, launch_us: float = 5.0) -> None:
        self.now_us = self.host_us = 0.0
        self.launch_us = launch_us
        stream = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.us = max(stream.now_us, stream.host_us)

            def synchronize(self) -> None:
                synchronize()

            def elapsed_time(self, end: Event) -> float:
                return (end.us - self.us) / 1e3  # milliseconds, as CUDA's

        class Bytes:
            def copy_(self, other: object) -> None:
                stream.run(2.0, 100.0)

        def synchronize(device: object = None) -> None:
            stream.host_us = max(stream.host_us, stream.now_us)

        monkeypatch.setattr(timer, "SETTLE_S", 0.0)
        monkeypatch.setattr(timer.time, "perf_counter_ns", lambda: round(1e3 * stream.host_us))
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch, "zeros", lambda *shape, dtype, device: Bytes())
        monkeypatch.setattr(torch, "empty_like", lambda tensor: Bytes())

    def run(self, launch_us: float, us: float) -> None:
        self.host_us += launch_us
        self.now_us = max(self.now_us, self.host_us) + us

    def call(self) -> None:
        self.run(self.launch_us, 7.0)


def test_device_events_stand_around_the_calls_and_not_around_the_plug(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = _FakeStream(monkeypatch)
    gpu = CudaTimer()
    before = stream.now_us
    assert gpu.batch_us(stream.call, 50) == pytest.approx(7.0)
    # 50 launches of at most 40 us each: 20 plugs of 100 us keep the stream busy for so long; the first waits for its
    # launch of 2 us.
    assert stream.now_us - before == 2 + 20 * 100 + 50 * 7
    # Alone the launch shows, as somebody sees it who waits for the call: 5 + 7.
    assert gpu.alone_us(stream.call, 3) == pytest.approx(12.0)
    assert timed(gpu.batch_us, stream.call, 0.001, alone=gpu.alone).us == pytest.approx(7.0)


def test_a_host_slower_than_the_plug_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    # A backward pass that takes the host 150 us a call: 20 plugs last 2 ms, 50 calls are launched in 7.5, and the
    # device would wait for 143 us before each of the last ones.  Taken again behind a plug of twice 7.54 ms.
    stream = _FakeStream(monkeypatch, launch_us=150.0)
    assert CudaTimer().batch_us(stream.call, 50) == pytest.approx(7.0)


def test_ranks_meet_behind_the_plug(monkeypatch: pytest.MonkeyPatch) -> None:
    # The meeting takes 30 us behind the plug (2 x 10 x 150 us: 30 copies of 100) and before the first event.
    stream = _FakeStream(monkeypatch, launch_us=150.0)
    gpu = CudaTimer()
    before = stream.now_us
    assert gpu.met_us(stream.call, 10, 150.0, lambda: stream.run(5.0, 30.0)) == pytest.approx(7.0)
    assert stream.now_us - before == 2 + 30 * 100 + 30 + 10 * 7


# What the driver says ----------------------------------------


class _Properties:
    """Of an RTX A5000 as PyTorch 2.13 tells them."""

    name, major, minor, multi_processor_count = "NVIDIA RTX A5000", 8, 6, 64
    total_memory, L2_cache_size = 25_294_602_240, 6_291_456
    clock_rate, memory_clock_rate, memory_bus_width = 1_695_000, 8_001_000, 384

    def __init__(self, uuid: str) -> None:
        self.uuid = uuid


SMI = """#!/bin/sh
case "$*" in
*index,uuid*) printf '0, GPU-aa\\n1, GPU-bb\\n2, GPU-cc\\n' ;;
*driver_version*) printf '580.1\\n580.1\\n580.1\\n' ;;
*topo*) cat "$0.topo" ;;
-L) printf 'GPU 0: NVIDIA RTX A5000 (UUID: GPU-aa)\\n' ;;
*--id=GPU-cc*) echo "$ANSWER" ;;
*) exit 6 ;;
esac
"""
TOPO = """
     GPU0 GPU1 GPU2 CPU Affinity NUMA Affinity
GPU0  X   SYS  SYS  0-7   0
GPU1 SYS   X   NV4  8-15  1
GPU2 SYS  NV4   X   8-15  1
"""


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """A host whose CUDA sees GPUs by these names and UUIDs, and an nvidia-smi that answers as recorded."""

    def host(names: list[str], uuids: list[str], answer: str = "", smi: bool = True) -> None:
        properties = [_Properties(uuid) for uuid in uuids]
        for each, name in zip(properties, names, strict=True):
            each.name = name
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: properties[gpu])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: names[gpu])
        monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
        if smi:
            (tmp_path / "nvidia-smi").write_text(SMI)
            (tmp_path / "nvidia-smi").chmod(0o755)
            (tmp_path / "nvidia-smi.topo").write_text(TOPO)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        monkeypatch.setenv("ANSWER", answer)

    return host


def test_the_gpu_that_cuda_calls_first_is_asked_for_by_its_uuid(gpus: Callable[..., None]) -> None:
    # CUDA_VISIBLE_DEVICES=2,1: CUDA's first is nvidia-smi's third.
    gpus(["NVIDIA RTX A5000"] * 2, ["cc", "bb"], "230.00, 4, 16, 2100")
    machine = this_machine(["tracesim", "calibrate"])
    assert machine.device == Device(
        "gpu", "NVIDIA RTX A5000", 2, 64, 25_294_602_240, 6_291_456, (8, 6), 1695.0, 8001.0, 384, 230.0, 4, 16
    )
    assert machine.gpus == (2, 1) and machine.others == ()
    assert machine.versions["driver"] == "580.1" and "GPU2" in machine.topology


def test_a_card_of_another_name_is_not_measured(gpus: Callable[..., None]) -> None:
    gpus(["NVIDIA RTX A5000", "NVIDIA T400"], ["cc", "bb"], "230.00, 4, 16, 2100")
    machine = this_machine(["tracesim", "calibrate"])
    assert machine.device.count == 1 and machine.others == ("NVIDIA T400",)


def test_what_nvidia_smi_does_not_tell_is_left_open(gpus: Callable[..., None]) -> None:
    # A slice under MIG: nvidia-smi does not know its UUID as a GPU's.
    gpus(["NVIDIA A100-SXM4-40GB MIG 1g.5gb"], ["MIG-dd"])
    sliced = this_machine(["tracesim", "calibrate"])
    assert (sliced.device.power_limit_w, sliced.device.pcie_lanes, sliced.gpus) == (None, None, ())
    gpus(["NVIDIA RTX A5000"], ["cc"], "[N/A], [N/A], [N/A], [N/A]")
    assert this_machine(["tracesim", "calibrate"]).device.power_limit_w is None


def test_without_nvidia_smi_cuda_alone_tells(gpus: Callable[..., None]) -> None:
    gpus(["NVIDIA RTX A5000"], ["cc"], smi=False)
    machine = this_machine(["tracesim", "calibrate"])
    assert machine.device.clock_mhz == 1695.0 and machine.device.power_limit_w is None and machine.topology == ""


def test_gpus_that_this_pytorch_cannot_use_are_told(gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(["NVIDIA RTX A5000"], ["cc"])
    assert unused_gpus() == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert unused_gpus().startswith("nvidia-smi lists 1 GPU, but torch 2.")


def test_times_around_kernels_are_read_from_a_trace() -> None:
    def launch(ts: float, correlation: int) -> dict[str, object]:
        return {
            "cat": "cuda_runtime",
            "name": "cudaLaunchKernel",
            "ts": ts,
            "dur": 4,
            "args": {"correlation": correlation},
        }

    def kernel(ts: float, dur: float, correlation: int) -> dict[str, object]:
        return {"cat": "kernel", "ts": ts, "dur": dur, "pid": 0, "tid": 7, "args": {"correlation": correlation}}

    # The first is launched at 0 and starts at 9; the second and third are queued: launched 200 us and more before their
    # predecessors end (at 309 and 330), which leaves gaps of 1.0 and 1.5 us.
    events = [launch(0, 1), launch(20, 2), launch(40, 3), kernel(9, 300, 1), kernel(310, 20, 2), kernel(331.5, 2, 3)]
    assert launch_times(events) == {"floor": [2.0], "latency": [9.0], "gap": [1.0, 1.5]}


def test_times_around_kernels_of_a_public_trace_are_those_of_the_profiles(shared_dir: Path) -> None:
    """The A5000's launch block was read from this trace: floor 1.5, latency 9.6, gap 1.15 us."""
    path = shared_dir / "data" / "traces" / "a100-ddp-rank0of2.pt.trace.json.gz"
    times = launch_times(json.loads(gzip.decompress(path.read_bytes()))["traceEvents"])
    assert {what: round(median(values), 2) for what, values in times.items()} == {
        "floor": 1.5, "latency": 9.6, "gap": 1.15,
    }  # fmt: skip


def test_who_made_a_cpu() -> None:
    names = ("AMD EPYC 7763", "Intel(R) Xeon(R) Platinum 8480C", "Neoverse-V2", "Apple M2")
    assert [vendor(name) for name in names] == ["amd", "intel", "arm", "unknown"]


# Links ----------------------------------------


def test_how_many_ranks_take_part() -> None:
    assert [links.rank_counts(ranks) for ranks in (1, 2, 3, 6, 8)] == [[], [2], [2, 3], [2, 4, 6], [2, 4, 8]]
    assert links.ranks_of(HERE) == 2


def _journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "x.partial.jsonl", HERE)


def test_two_gloo_ranks_and_the_curve_given_back(run: Callable[..., object], tmp_path: Path) -> None:
    out = tmp_path / "two.yaml"
    code, _, errors = run(*TINY, "--only", "host", "--links", "--out", out)
    assert (code, errors) == (0, "")
    machine = load_topology(str(tmp_path / "two.topology.yaml"))
    assert len(machine.gpus) >= 2
    assert {c.kind for c in machine.collectives.measured} == {"all_reduce", "all_gather", "reduce_scatter", "broadcast"}
    curve = next(c for c in machine.collectives.measured if c.kind == "all_reduce" and c.ranks == 2)
    topology = tmp_path / "two.topology.yaml"
    words = ("all_reduce", "--bytes", int(curve.bytes[1]), "--ranks", 2, "--json", "-", "--topology", topology)
    code, said, _ = run("collective", *words)
    assert code == 0 and json.loads(said)["rows"][0]["us"] == pytest.approx(curve.us[1], abs=0.001)


@pytest.mark.parametrize(
    ("blow", "silence_s", "told"),
    [
        (signal.SIGKILL, 60.0, r"--links: rank 1 was killed by signal 9"),
        (signal.SIGSTOP, 4.0, r"rank 1 has been silent for 4 s"),
    ],
)
def test_a_rank_that_dies_or_stops_is_named(tmp_path: Path, blow: int, silence_s: float, told: str) -> None:
    struck: list[int] = []

    def strike(doing: str, done: int) -> None:
        place = tmp_path / "rank1.at"
        if place.exists() and not struck:
            struck.append(int(place.read_text().split()[0]))
            os.kill(struck[0], blow)

    began = time.monotonic()
    with _journal(tmp_path) as journal, pytest.raises(UserError, match=told):
        links.measure_links(GRIDS["tiny"], journal, tmp_path, strike, silence_s)
    assert time.monotonic() - began < 60
    assert read(tmp_path / "x.partial.jsonl").samples  # what came before is kept
    for place in tmp_path.glob("rank*.at"):
        command = Path("/proc") / place.read_text().split()[0] / "cmdline"
        assert not command.exists() or links.RANK_MODULE not in command.read_text(), "a rank was left behind"


def test_ranks_end_when_who_reads_their_results_is_killed(tmp_path: Path) -> None:
    """A SIGKILL leaves no time to end them: each looks for itself."""
    reader = subprocess.Popen(["sleep", "60"])
    request = links.Request("gloo", 2, [], 2.0, 50.0, str(tmp_path / "results"), str(tmp_path), reader.pid)
    (tmp_path / "request.json").write_bytes(msgspec.json.encode(request))
    environment = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # waits for a rank that never comes
    words = [sys.executable, "-m", links.RANK_MODULE, str(tmp_path / "request.json")]
    rank = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)
    while rank.poll() is None and not (tmp_path / "rank0.at").exists():
        time.sleep(0.05)
    reader.kill()
    reader.wait()
    assert rank.wait(timeout=60) == 1


def test_without_torchrun_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with _journal(tmp_path) as journal, pytest.raises(UserError, match="has no torchrun"):
        links.measure_links(GRIDS["tiny"], journal, tmp_path, lambda doing, done: None)


# Commands that are refused ----------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--out", "x.yaml", "--only", "gemn"], "unknown section 'gemn': did you mean 'gemm'"),
        (["--out", "x.txt"], "--out x.txt: the name of a device profile ends in .yaml"),
        ([], "give --out FILE.yaml to measure this machine"),
        (["--out", "x.yaml", "--plot", "x.png"], "give --out FILE.yaml to measure this machine"),
        (["--out", "/proc/nowhere/x.yaml"], "cannot be written"),
        (["--out", "nowhere/x.yaml"], "cannot be written (there is no folder nowhere); choose another place"),
        (["--out", "x.yaml", "--threads", "100000"], "--threads 100000: this process may run on"),
        (["--compare", "a5000x1", "rtx-a600"], "unknown device profile or topology 'rtx-a600': did you mean"),
        (["--compare", "rtx-a5000", "a40", "--quick"], "--compare measures nothing"),
        (["--compare", "rtx-a5000", "a40", "--plot", "x.jpg"], "the plot is a PNG"),
    ],
)
def test_a_wrong_command_is_one_line(refused: Callable[..., str], words: list[str], told: str) -> None:
    assert told in refused("calibrate", *words)


def test_a_file_that_is_no_profile_cannot_be_compared(refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a: 1\n")
    assert "is neither a device profile (it has no tflops) nor a topology" in refused(
        "calibrate", "--compare", path, "a40"
    )
    path.write_text("{")
    assert "not valid YAML" in refused("calibrate", "--compare", "a40", path)
