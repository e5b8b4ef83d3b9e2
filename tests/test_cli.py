"""The commands as a user types them: what they print, what they write, how they refuse."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sim.cli import main
from tests.workload.tiny_models import model_folder

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small OPT over two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("model")
    out = folder / "opt.workload.json.gz"
    model = model_folder(folder, "opt", hidden_size=64, word_embed_proj_dim=64, ffn_dim=128, vocab_size=512)
    main(["synth", model, "--batch", "64", "--seq", "64", "--parallel", "tp=2", "--out", str(out)])
    return out


def test_replay_json_keeps_its_contract(run: Run, workload: Path) -> None:
    code, out, _ = run("replay", workload, "--topology", "a5000x8", "--json", "-")
    told = json.loads(out)
    assert code == 0
    assert told["step_ms"] == pytest.approx(sum(told["steps_ms"]) / len(told["steps_ms"]))
    assert sum(told["breakdown_ms"].values()) == pytest.approx(told["step_ms"])
    assert set(told["breakdown_ms"]) == {"compute", "exposed_communication", "exposed_memcpy", "idle"}
    assert [rank["device"] for rank in told["ranks"]] == ["gpu0", "gpu1"]
    # Two all-reduces a layer, two layers, of 64 x 64 x 64 halves.
    (row,) = told["collectives"]
    assert (row["kind"], row["bytes"], row["ranks"], row["count"]) == ("all_reduce", 524288, 2, 4)
    assert told["measured_step_ms"] is None and told["measured_steps_ms"] is None
    assert told["out_of_memory"] is False
    assert told["peak_reserved_bytes"] >= told["peak_allocated_bytes"] > 0
    for key in ("kernel_ms", "durations_from", "ops", "replay_seconds", "warnings"):
        assert key in told
    assert told["ranks_replayed"] == 1
    assert "1 of 2 ranks stands for all" in run("replay", workload, "--topology", "a5000x8")[1]


def test_replay_says_how_sure_it_is(run: Run, workload: Path) -> None:
    _, out, _ = run("replay", workload, "--topology", "a5000x8", "--json", "-")
    told = json.loads(out)
    assert told["step_ms_p10"] < told["step_ms"] < told["step_ms_p90"]
    assert told["kernel_ms_p10"] < told["kernel_ms"] < told["kernel_ms_p90"]
    assert 0.9 < sum(row["share"] for row in told["doubt"]) <= 1.0 + 1e-9
    assert all(row["source"] and row["cure"] for row in told["doubt"])
    _, shown, _ = run("replay", workload, "--topology", "a5000x8")
    assert "80 % range" in shown and " of the doubt" in shown


def test_nobody_need_ask_how_sure_it_is(run: Run, workload: Path) -> None:
    _, out, _ = run("replay", workload, "--topology", "a5000x8", "--no-ranges", "--json", "-")
    told = json.loads(out)
    assert (told["step_ms_p10"], told["step_ms_p90"], told["doubt"]) == (None, None, [])
    code, _, err = run("replay", workload, "--topology", "a5000x8", "--samples", "1")
    assert code == 2 and err.count("\n") == 1 and "--samples" in err


def test_the_same_command_gives_the_same_bytes(run: Run, workload: Path, tmp_path: Path) -> None:
    written = []
    for i in range(2):
        told, trace = tmp_path / f"{i}.json", tmp_path / f"{i}.pt.trace.json.gz"
        run("replay", workload, "--topology", "a5000x8", "--json", told, "--timeline", trace)
        summary = json.loads(told.read_text())
        summary.pop("replay_seconds")  # how long the event loop took is the one thing that is not a result
        written.append((json.dumps(summary), trace.read_bytes()))
    assert written[0] == written[1]


def test_ranks_go_onto_the_gpus_that_are_named(run: Run, workload: Path) -> None:
    _, out, _ = run("replay", workload, "--topology", "a5000x8", "--gpus", "1,6", "--json", "-")
    assert [rank["device"] for rank in json.loads(out)["ranks"]] == ["gpu1", "gpu6"]


def test_a_slower_link_is_a_slower_step(run: Run, workload: Path) -> None:
    steps = []
    for value in (24, 0.2):
        setting = f"links.pcie.bandwidth_gb_s={value}"
        _, out, _ = run("replay", workload, "--topology", "a5000x8", "--set", setting, "--json", "-")
        steps.append(json.loads(out)["step_ms"])
    assert steps[0] < steps[1]


def test_topology_shows_the_machine(run: Run) -> None:
    code, out, _ = run("topology", "a5000x8.yaml")
    assert code == 0
    assert "gpu7" in out and "RTX A5000" in out
    assert max(len(line) for line in out.splitlines()) <= 100


def test_python_m_sim_is_the_same_command(tmp_path: Path, root: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "sim", "topology", "a5000x9"], cwd=root, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert ran.stderr.startswith("tracesim: error: ") and ran.stderr.count("\n") == 1


@pytest.mark.parametrize("json_out", [[], ["--json", "-"]])
def test_output_that_cannot_be_written_is_one_line(root: Path, json_out: list[str]) -> None:
    words = ["collective", "all_reduce", "--bytes", "8", "--ranks", "2", "--topology", "a5000x2", *json_out]
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run(
            [sys.executable, "-m", "sim", *words], cwd=root, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert ran.returncode == 2
    problem = "standard output: cannot be written (No space left on device); send it elsewhere"
    assert ran.stderr == f"tracesim: error: {problem}\n"


@pytest.mark.parametrize("words", [("replay", "{}", "--topology", "a5000x8"), ("--help",)])
def test_a_reader_that_has_gone_is_no_failure(root: Path, workload: Path, words: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "sim", *(word.format(workload) for word in words)]
    ran = subprocess.run(command, cwd=root, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_no_number_is_cut_on_a_narrow_terminal(root: Path) -> None:
    words = ["collective", "all_reduce", "--bytes", "1048576", "--ranks", "8", "--topology", "a5000x8"]
    ran = subprocess.run(
        [sys.executable, "-m", "sim", *words], cwd=root, env={**os.environ, "COLUMNS": "40"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "230.3    4.55    7.97" in ran.stdout and "…" not in ran.stdout  # 230.32 us, measured


def test_what_is_no_file_is_written_to(run: Run, workload: Path, tmp_path: Path) -> None:
    """As /dev/null and >(a command) are: nothing is put in the place of a pipe, and a link stays a link."""
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to("real.json")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for out in (pipe, link):
        assert run("replay", workload, "--topology", "a5000x8", "--no-ranges", "--json", out)[0] == 0
    assert pipe.is_fifo() and link.is_symlink()
    assert (
        json.loads(os.read(reader, 1 << 16))["step_ms"] == json.loads((tmp_path / "real.json").read_text())["step_ms"]
    )
    os.close(reader)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["link", "pipe", "real.json"]


# What is refused ------------------------------------------------------------------------------------------------


def test_a_missing_file(refused: Callable[..., str]) -> None:
    assert "nowhere.json: no such file" in refused("replay", "nowhere.json", "--topology", "as-captured")


def test_a_truncated_gzip(refused: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "cut.pt.trace.json.gz"
    file.write_bytes(gzip.compress(b'{"traceEvents": []}' * 1000)[:-30])
    assert str(file) in refused("replay", file, "--topology", "as-captured")


@pytest.mark.parametrize("content", ["{}", "[]", '{"traceEvents": 3}', "hello", "", '{"traceEvents": []}'])
def test_json_that_is_no_trace(refused: Callable[..., str], tmp_path: Path, content: str) -> None:
    file = tmp_path / "not.json"
    file.write_text(content)
    assert str(file) in refused("replay", file, "--topology", "as-captured")


def test_a_trace_without_gpu_events(refused: Callable[..., str], shared_dir: Path) -> None:
    file = shared_dir / "data/traces/cpu-only-rank34.pt.trace.json.gz"
    assert "GPU" in refused("replay", file, "--topology", "as-captured")


def test_an_unknown_command_offers_the_nearest(refused: Callable[..., str]) -> None:
    assert "unknown command 'replya': did you mean 'replay'?" in refused("replya", "x.json")


def test_a_trace_that_does_not_say_its_gpu_or_is_given_twice_is_named(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    args = {"device": 0, "stream": 7, "correlation": 1}
    kernel = {"ph": "X", "cat": "kernel", "name": "k", "pid": 0, "tid": 7, "ts": 1, "dur": 5, "args": args}
    (tmp_path / "bare.json").write_text(json.dumps({"traceEvents": [kernel]}))
    twice = refused("replay", tmp_path / "bare.json", tmp_path, "--topology", "as-captured")
    assert "bare.json: is named twice; give one file a rank" in twice
    told = refused("replay", tmp_path / "bare.json", "--topology", "a5000x1")
    assert (
        "bare.json: its measured times are of 'gpu0', as the trace calls its device, which no profile describes" in told
    )


def test_synth_of_nothing_says_what_to_give(refused: Callable[..., str], tmp_path: Path) -> None:
    told = refused("synth", "--out", tmp_path / "x.workload.json.gz")
    assert "MODEL is missing: a model's name, as in `tracesim synth gpt2" in told


def test_an_unknown_topology_offers_the_nearest(refused: Callable[..., str], workload: Path) -> None:
    assert "did you mean 'a5000x8'" in refused("replay", workload, "--topology", "a5000x88")


def test_a_yaml_with_three_mistakes_names_all_three(
    refused: Callable[..., str], workload: Path, tmp_path: Path
) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(
        "name: bad\ndescription: bad\nsource: here\ndevices: {count: -1, profile: rtx-a5000}\n"
        "nodes: [{id: cpu, kind: cpu}]\n"
        "links: {pcie: {kind: pcie, bandwidth_gb_s: 0, source: here, between: [[gpu, cpu]], gpbs: 3}}\n"
    )
    line = refused("replay", workload, "--topology", file)
    for mistake in ("devices.count", "links.pcie.bandwidth_gb_s", "links.pcie.gpbs"):
        assert mistake in line


def test_a_model_that_does_not_exist(refused: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "x.workload.json.gz"
    line = refused("synth", "opt-1.3", "--batch", 1, "--seq", 8, "--out", out)
    assert "did you mean 'opt-1.3b'" in line
    assert not list(tmp_path.iterdir())


def test_a_batch_of_zero(refused: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "x.workload.json.gz"
    assert "--batch 0" in refused("synth", "opt-125m", "--batch", 0, "--seq", 8, "--out", out)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--topology", "a5000x1"], "has 2 ranks, a5000x1 only 1 GPU"),
        (["--topology", "a5000x8", "--gpus", "1"], "names 1 GPUs for the 2 ranks"),
        (["--topology", "a5000x8", "--gpus", "1,1"], "named twice"),
        (["--topology", "a5000x8", "--gpus", "1,8"], "a5000x8 has no GPU 8, its GPUs are 0 to 7"),
        (["--topology", "a5000x8", "--gpus", "a"], "whole numbers"),
        (["--topology", "a5000x8", "--gpus", "²"], "whole numbers"),
        (["--topology", "a5000x8", "--gpus", "9" * 5000], "whole numbers"),
        (["--topology", "a5000x8", "--set", "links.pcie"], "write PATH=VALUE"),
        (["--topology", "a5000x8", "--set", "links.pcy.bandwidth_gb_s=3"], "links.pcie.bandwidth_gb_s"),
        (["--topology", "a5000x8", "--set", "links.pcie.bandwidth_gb_s=0"], "links.pcie.bandwidth_gb_s"),
        (["--topology", "a5000x8", "--set", "devices.memory_gib=1e300"], "devices.memory_gib=1e300"),
        (["--topology", "a5000x8", "--set", "devices.memory_gib=1e-30"], "memory_gib: must be at least 1e-09"),
        (["--topology", "a5000x8", "--set", "devices.memory_bandwidth_gb_s=1e-300"], "must be at least 1e-09"),
        (["--topology", "a5000x8", "--set", "host.op_us=1e300"], "host.op_us: must be <= 1e+09"),
        (["--topology", "as-captured"], "needs a machine"),
        (["--topology", "as-captured", "--set", "a=b"], "no values to change"),
        (
            ["--topology", "a5000x8", "--set", "host.op_us=1", "--set", "host.op_us=2"],
            "--set host.op_us: is there twice",
        ),
        (["--topology", "as-captured", "--gpus", "1"], "--gpus 1: 'as-captured' has the GPUs of the trace"),
        (["--topology", "a5000x8", "--timeline", "x.txt"], "x.txt"),
        (["--topology", "a5000x8", "--timeline", "-"], "-: a trace file ends in .json or .json.gz"),
        (
            ["--topology", "a5000x8", "--timeline", "x.json", "--json", "./x.json"],
            "two results cannot go into one file",
        ),
        (["--topology", "a5000x8", "--timeline", "no/such/folder/x.json"], "no/such/folder"),
        (["--topology", "a5000x8", "--json", "no/such/folder/x.json"], "no/such/folder"),
        ([], "--topology"),
    ],
)
def test_wrong_options(refused: Callable[..., str], workload: Path, args: list[str], words: str) -> None:
    assert words in refused("replay", workload, *args)


@pytest.mark.parametrize(
    "written",
    [
        ["--json", "{}"], ["--timeline", "{}.pt.trace.json"], ["--timeline", "{}/there"], ["--memory-plot", "{}.png"],
        ["--memory-plot", "x.jpg"], ["--timeline", "x.txt"],
    ],
)  # fmt: skip
def test_where_nothing_can_be_written_is_told_before_the_work(
    refused: Callable[..., str], tmp_path: Path, written: list[str]
) -> None:
    """The workload is not even looked for."""
    (tmp_path / "file").write_text("")
    option, name = written
    place = name.format(tmp_path / "file" / "x")
    line = refused("replay", tmp_path / "absent.workload.json.gz", "--topology", "a5000x8", option, place)
    assert line.startswith(f"tracesim: error: {place}: ")


def test_a_workload_beside_traces_is_not_passed_over(
    refused: Callable[..., str], workload: Path, tmp_path: Path
) -> None:
    (tmp_path / workload.name).write_bytes(workload.read_bytes())
    (tmp_path / "rank0.json").write_text("{}")
    assert workload.name in refused("replay", tmp_path, "--topology", "a5000x8")


def test_a_path_that_is_like_no_other_gets_the_beginnings_of_all(refused: Callable[..., str], workload: Path) -> None:
    line = refused("replay", workload, "--topology", "a5000x8", "--set", "zzz.zzz=3")
    assert "known paths begin with assumed, collectives, description, devices, host, " in line and len(line) < 300


def test_a_broken_workload_file(refused: Callable[..., str], workload: Path, tmp_path: Path) -> None:
    file = tmp_path / "broken.workload.json.gz"
    file.write_bytes(workload.read_bytes()[:200])
    assert str(file) in refused("replay", file, "--topology", "a5000x8")
    file.write_bytes(gzip.compress(b'{"name": "x", "programs": [], "ranks": [{"rank": 0, "program": 3}]}'))
    assert "runs program 3, which is not there" in refused("replay", file, "--topology", "a5000x8")


# The smaller commands -------------------------------------------------------------------------------------------


def test_sizes_may_be_written_as_nccl_tests_has_them(run: Run) -> None:
    words = ["collective", "all_reduce", "--ranks", 8, "--topology", "a5000x8", "--json", "-", "--bytes"]
    _, out, _ = run(*words, "8,64M,1GiB,2k")
    assert [row["bytes"] for row in json.loads(out)["rows"]] == [8, 64 << 20, 1 << 30, 2 << 10]


def test_collective_json_keeps_its_contract(run: Run) -> None:
    sizes = "1048576,1073741824"
    _, out, _ = run("collective", "all_reduce", "--bytes", sizes, "--ranks", 8, "--topology", "a5000x8", "--json", "-")
    small, large = json.loads(out)["rows"]
    # The host's own sweep: 230.32 us for 1 MiB. busbw = bytes / time * 2 * 7 / 8.
    assert small["us"] == pytest.approx(230.32, rel=0.05)
    assert small["algbw_gb_s"] == pytest.approx(1048576 / small["us"] / 1e3)
    assert small["busbw_gb_s"] == pytest.approx(small["algbw_gb_s"] * 2 * 7 / 8)
    assert large["busbw_gb_s"] == pytest.approx(14.3, rel=0.05)
    assert (large["kind"], large["ranks"], large["algorithm"], large["protocol"]) == ("all_reduce", 8, "ring", "simple")


def test_a_barrier_has_no_size(run: Run) -> None:
    _, out, _ = run("collective", "barrier", "--bytes", "1000", "--ranks", 8, "--topology", "dgx-a100")
    assert "a barrier is an all-reduce of one element, whatever --bytes says" in out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["all_reduc", "--bytes", 8, "--ranks", 8, "--topology", "a5000x8"], "did you mean 'all_reduce'"),
        (["all_reduce", "--bytes", 8, "--ranks", 9, "--topology", "a5000x8"], "8 devices"),
        (["all_reduce", "--bytes", 8, "--ranks", 10**18, "--topology", "a5000x8"], "8 devices"),
        (["all_reduce", "--bytes", 8, "--ranks", -1, "--topology", "a5000x8"], "--ranks -1"),
        (["all_reduce", "--bytes", "64iB", "--ranks", 8, "--topology", "a5000x8"], "as in 1048576,64M,1GiB"),
        (["all_reduce", "--bytes", 2**50 + 1, "--ranks", 8, "--topology", "a5000x8"], "larger than any memory"),
        (["all_reduce", "--bytes", "x", "--ranks", 8, "--topology", "a5000x8"], "--bytes 'x'"),
        (["all_reduce", "--bytes", 8, "--ranks", 8, "--topology", "as-captured"], "name a machine"),
    ],
)
def test_wrong_collectives(refused: Callable[..., str], args: list[object], words: str) -> None:
    assert words in refused("collective", *args)


def test_allocator_json_keeps_its_contract(run: Run, shared_dir: Path) -> None:
    code, out, _ = run("allocator", shared_dir / "data/snapshots/forward_100.pickle", "--json", "-")
    told = json.loads(out)
    assert code == 0
    assert told["allocations_checked"] == told["allocations_matched"] == 785
    assert told["segments_checked"] == told["segments_matched"] > 0
    assert told["first_mismatch"] is None
    for key in ("segments_released_checked", "segments_released_matched", "not_predictable", "fragmentation_at_peak"):
        assert key in told


def test_a_pickle_that_wants_to_run_code(refused: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "evil.pickle"
    file.write_bytes(b"cos\nsystem\n(S'echo caught'\ntR.")
    assert "os.system" in refused("allocator", file)
