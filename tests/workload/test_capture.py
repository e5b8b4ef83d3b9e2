"""``tracesim trace``: how scripts are cut into steps, what is written, and how it refuses."""

from __future__ import annotations

import gc
import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sim.errors import UserError
from sim.workload.capture.about import without_secrets
from sim.workload.capture.cutting import cut_by_optimizer
from sim.workload.capture.spec import Place, place_of
from sim.workload.inputs import read_inputs

# A script as a user has it: it knows nothing of being traced.
LOOP = """
import sys
from pathlib import Path
import torch
import neighbour

model = torch.nn.Linear(16, 16)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
here = Path(__file__).parent
try:
    for _ in range(int(sys.argv[1])):
        model(torch.randn(4, 16)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    {after}
finally:
    (here / "cleaned_up").write_text(" ".join(sys.argv[1:]))
(here / "ran_to_the_end").write_text(__name__)
"""


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., Path]:
    """Write the loop, with a line of its own after the last step."""

    def write(after: str = "pass") -> Path:
        (tmp_path / "neighbour.py").write_text("")
        path = tmp_path / "train.py"
        path.write_text(LOOP.format(after=after))
        return path

    return write


@pytest.fixture
def trace(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """Run ``tracesim trace`` in this process: exit code, stdout, stderr."""
    return lambda *words, out=tmp_path / "out": run("trace", "--out", out, *words)


@pytest.fixture
def refused(trace: Callable[..., tuple[int, str, str]], tmp_path: Path) -> Callable[..., str]:
    """Run it where it must refuse: one line, exit code 2, and nothing is left in the folder."""

    def run(*words: object, out: Path = tmp_path / "out") -> str:
        existed = out.exists()
        code, told, error = trace(*words, out=out)
        assert (code, told) == (2, "")
        assert error.startswith("tracesim: error: ") and error.count("\n") == 1, error
        assert out.exists() == existed
        return error

    return run


def written(out: Path, rank: int = 0) -> dict[str, Any]:
    """The trace as JSON."""
    with gzip.open(out / f"rank{rank}.pt.trace.json.gz") as file:
        content: dict[str, Any] = json.load(file)
    return content


def regions(out: Path) -> list[tuple[str, float, float]]:
    """The user's regions in order: name, begin, end."""
    events = [e for e in written(out)["traceEvents"] if e.get("cat") == "user_annotation"]
    return sorted((e["name"], e["ts"], e["ts"] + e["dur"]) for e in events)


def marks(out: Path) -> list[str]:
    return [name for name, _, _ in regions(out) if name.startswith("ProfilerStep#")]


# Steps ----------------------------------------


def test_a_script_is_cut_where_its_optimizer_steps_and_stopped_after_the_last(
    script: Callable[..., Path], trace: Callable[..., Any], tmp_path: Path
) -> None:
    argv, path = list(sys.argv), list(sys.path)
    code, told, error = trace("--steps", 2, "--warmup", 3, "--", script(), 50, "--lr", "0.1")
    assert (code, error) == (0, "")
    assert told.splitlines() == [
        f"{tmp_path / 'out'}: 2 steps; replay it with",
        f"  tracesim replay {tmp_path / 'out'} --topology as-captured",
    ]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["capture.json", "rank0.pt.trace.json.gz"]
    # The profiler counts its own warm-up step as 0, so the two that are recorded are 1 and 2.
    assert marks(tmp_path / "out") == ["ProfilerStep#1", "ProfilerStep#2"]
    # The script was stopped in its fifth step: it cleaned up, with its own arguments, and went no further.
    assert (tmp_path / "cleaned_up").read_text() == "50 --lr 0.1"
    assert not (tmp_path / "ran_to_the_end").exists()
    assert (argv, path) == (sys.argv, sys.path)


def test_a_step_ends_when_the_optimizer_has_returned(
    script: Callable[..., Path], trace: Callable[..., Any], tmp_path: Path
) -> None:
    trace("--steps", 3, "--warmup", 1, "--", script(), 50)
    steps = [r for r in regions(tmp_path / "out") if r[0].startswith("ProfilerStep#")]
    optimizer = [r for r in regions(tmp_path / "out") if r[0].startswith("Optimizer.step#")]
    assert len(steps) == len(optimizer) == 3
    for (_, begin, end), (_, first, last) in zip(steps, optimizer, strict=True):
        assert begin <= first < last <= end, "regions that cross are not drawn"


def test_it_may_run_to_the_end(script: Callable[..., Path], trace: Callable[..., Any], tmp_path: Path) -> None:
    code, _, error = trace("--steps", 2, "--warmup", 1, "--to-the-end", script(), 6)
    assert (code, error) == (0, "")
    assert marks(tmp_path / "out") == ["ProfilerStep#1", "ProfilerStep#2"]
    assert (tmp_path / "ran_to_the_end").read_text() == "__main__"


def test_a_script_may_go_elsewhere_and_take_its_output_along(
    script: Callable[..., Path],
    run: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = script(after="import io, os; os.chdir('/'); sys.stdout = io.StringIO()")
    monkeypatch.chdir(tmp_path)
    # Two steps exist, three are asked for: the script's own last line runs before anything is written.
    code, told, error = run("trace", "--out", "here", "--steps", 3, "--warmup", 1, "--", path, 3)
    assert (code, error.count("\n")) == (0, 1)
    assert told.splitlines()[1] == "  tracesim replay here --topology as-captured"
    assert (tmp_path / "here" / "rank0.pt.trace.json.gz").exists()


def test_without_a_warm_up_the_first_step_begins_with_the_script(
    script: Callable[..., Path], trace: Callable[..., Any], tmp_path: Path
) -> None:
    assert trace("--steps", 2, "--warmup", 0, script(), 6)[0] == 0
    assert marks(tmp_path / "out") == ["ProfilerStep#0", "ProfilerStep#1"]


@pytest.mark.parametrize(
    ("after", "how"),
    [
        ("pass", "ended by itself"),
        ("sys.exit(3)", "ended by itself with exit code 3"),
        ("raise ValueError('no\\n good')", "raised ValueError: no good (train.py, line 15)"),
    ],
)
def test_a_script_that_ends_early_gives_the_whole_steps_it_made(
    script: Callable[..., Path], trace: Callable[..., Any], tmp_path: Path, after: str, how: str
) -> None:
    # Five steps end in six iterations' worth asked for: 1 is left out, 4 are whole; what comes after is no step.
    code, told, error = trace("--steps", 6, "--warmup", 1, script(after), 5)
    assert code == 0
    assert error == f"tracesim: warning: {tmp_path / 'train.py'}: {how}; captured 4 of 6 steps\n"
    assert told.startswith(f"{tmp_path / 'out'}: 4 steps;")
    assert marks(tmp_path / "out") == [f"ProfilerStep#{i}" for i in (1, 2, 3, 4)]
    assert len(read_inputs([tmp_path / "out"]).graph.programs) == 1
    assert json.loads((tmp_path / "out" / "capture.json").read_text())["steps"] == 4


@pytest.mark.parametrize(
    ("iterations", "after", "how"),
    [
        (3, "pass", "ended by itself after 3 optimizer steps, of which 3 are left out: nothing was captured"),
        (2, "sys.exit()", "ended by itself with exit code 0 after 2 optimizer steps"),
        (0, "pass", "ended by itself before its first step: nothing was captured; steps are cut where"),
        (0, "1 / 0", "raised ZeroDivisionError: division by zero (train.py, line 15) before its first step"),
    ],
)
def test_a_script_that_gives_no_whole_step_is_refused(
    script: Callable[..., Path], refused: Callable[..., str], iterations: int, after: str, how: str
) -> None:
    assert how in refused(script(after), iterations)


def test_a_script_that_is_no_python_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("x = (\n")
    assert "raised SyntaxError: '(' was never closed (" in refused(tmp_path / "broken.py")


def test_a_script_that_catches_everything_is_stopped_all_the_same(trace: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "stubborn.py"
    path.write_text(
        "import torch\nw = torch.zeros(2, requires_grad=True)\no = torch.optim.SGD([w], lr=1)\n"
        "for i in range(20):\n    try:\n        w.sum().backward(); o.step()\n    except:\n        pass\n"
    )
    assert trace("--steps", 2, "--warmup", 1, path)[0] == 0
    assert marks(tmp_path / "out") == ["ProfilerStep#1", "ProfilerStep#2"]


def parameters() -> list[torch.Tensor]:
    return [torch.nn.Parameter(torch.ones(2))]


def test_the_first_optimizer_counts_and_the_next_takes_its_place() -> None:
    cuts: list[str] = []
    with cut_by_optimizer(lambda: cuts.append("cut")):
        first, second = (torch.optim.SGD(parameters(), lr=0.1) for _ in range(2))
        for _ in range(3):
            first.step()
            second.step()
        assert len(cuts) == 3
        del first
        gc.collect()
        second.step()
        second.step()
        assert len(cuts) == 5
    second.step()
    assert len(cuts) == 5, "the hook is gone"


@pytest.mark.filterwarnings("error")
def test_schedulers_may_wrap_the_optimizer_before_and_after() -> None:
    cuts: list[str] = []
    with cut_by_optimizer(lambda: cuts.append("cut")):
        optimizer = torch.optim.SGD(parameters(), lr=1.0)
        early = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        for _ in range(2):
            optimizer.step()
            early.step()
        late = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        optimizer.step()
        late.step()
    assert len(cuts) == 3
    optimizer.step()
    assert len(cuts) == 3


# What is written ----------------------------------------


def test_the_trace_says_that_the_cpu_is_the_device_and_is_replayed(
    script: Callable[..., Path], trace: Callable[..., Any], tmp_path: Path
) -> None:
    trace("--steps", 3, "--warmup", 2, script(), 9)
    content = written(tmp_path / "out")
    assert content["tracesim_device"] == "cpu"
    assert content["traceName"] == "rank0.pt.trace.json"
    assert content["record_shapes"] == content["profile_memory"] == 1
    work = read_inputs([tmp_path / "out"])
    assert work.measured is not None and len(work.measured.steps) == 3
    assert work.graph.ranks[0].device == "cpu"
    assert any(w.op == "aten::linear" and w.inputs[0].shape == (4, 16) for w in work.graph.works)
    assert {type(op).__name__ for op in work.graph.programs[0].ops} >= {"HostCall", "Alloc", "Free", "Mark"}


def test_tensorboards_plugin_reads_it(script: Callable[..., Path], trace: Callable[..., Any], tmp_path: Path) -> None:
    data = pytest.importorskip("torch_tb_profiler.profiler.data")
    trace("--steps", 3, "--warmup", 1, script(), 9)
    profile = data.RunProfileData.parse("worker", None, str(tmp_path / "out" / "rank0.pt.trace.json.gz"), str(tmp_path))
    profile.process()
    assert profile.steps_names == ["1", "2", "3"]


def test_capture_json_says_what_was_run_on_what_and_no_secrets(
    script: Callable[..., Path], trace: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "from-the-environment")
    trace("--steps", 2, "--warmup", 1, "--", script(), 9, "--hf-token", "given-1", "--api_key=given-2")
    text = (tmp_path / "out" / "capture.json").read_text()
    assert "from-the-environment" not in text and "given" not in text
    told = json.loads(text)
    assert told["format"] == "tracesim.capture/1"
    assert told["command"][-3:] == ["--hf-token", "***", "--api_key=***"]
    assert told["command"][:2] == ["tracesim", "trace"]
    assert (told["ranks"], told["steps"], told["warmup"], told["device"]) == (1, 2, 1, "cpu")
    assert told["versions"]["torch"] == torch.__version__
    assert told["host"]["cpus"] >= 1 and told["host"]["cpu"]
    assert told["gpus"] == [] or torch.cuda.is_available()
    assert told["date"].endswith("+00:00")


def test_secrets_are_known_by_the_name_of_their_option() -> None:
    command = ["--token", "a", "--max-tokens", "5", "--tokenizer", "b", "password=c", "--api-key", "--verbose", "d"]
    assert without_secrets(command) == [
        "--token", "***", "--max-tokens", "5", "--tokenizer", "b", "password=***", "--api-key", "--verbose", "d",
    ]  # fmt: skip


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_a_model_by_name(trace: Callable[..., Any], tmp_path: Path, mode: str) -> None:
    config = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    (tmp_path / "config.json").write_text(json.dumps({**config, "bos_token_id": 0, "eos_token_id": 0}))
    words = ("--model", tmp_path, "--batch", 2, "--seq", 16, "--mode", mode, "--steps", 2, "--warmup", 1)
    assert trace(*words)[0] == 0
    work = read_inputs([tmp_path / "out"])
    assert work.measured is not None and len(work.measured.steps) == 2
    named = {event["name"] for event in written(tmp_path / "out")["traceEvents"]}
    assert "aten::cross_entropy_loss" in named
    assert ("Optimizer.step#AdamW.step" in named) == (mode == "train")


# What is refused ----------------------------------------


def test_commands_that_cannot_be(refused: Callable[..., str], script: Callable[..., Path], tmp_path: Path) -> None:
    path = script()
    assert "give --model NAME --batch B --seq S, or -- SCRIPT.py" in refused()
    assert "--model gpt2 and the script" in refused("--model", "gpt2", "--batch", 1, "--seq", 8, path)
    assert "give --batch and --seq as well" in refused("--model", "gpt2", "--batch", 1)
    assert "--batch 0: must be at least 1" in refused("--model", "gpt2", "--batch", 0, "--seq", 8)
    assert "--seq 8: belongs to --model" in refused("--seq", 8, path)
    assert "--steps 0: must be at least 1" in refused("--steps", 0, path)
    assert "--warmup -1: must not be negative" in refused("--warmup", -1, path)
    assert "no such script" in refused(tmp_path / "nosuch.py")
    assert "did you mean 'gpt2'" in refused("--model", "gptt2", "--batch", 1, "--seq", 8)
    assert "gpt2 has positions for 1024 tokens" in refused("--model", "gpt2", "--batch", 1, "--seq", 2000)


def test_folders_that_cannot_be_written(
    refused: Callable[..., str], script: Callable[..., Path], tmp_path: Path
) -> None:
    path = script()
    assert "cannot be written (File exists); choose another --out" in refused(path, 9, out=path)
    assert "cannot be written" in refused(path, 9, out=path / "below")
    other = tmp_path / "other"
    other.mkdir()
    (other / "rank1.pt.trace.json.gz").write_text("of a run with two ranks")
    assert "holds rank1.pt.trace.json.gz of another run" in refused(path, 9, out=other)


def test_ranks_come_from_the_environment() -> None:
    assert place_of({}) == Place(0, 0, 1)
    assert place_of({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}) == Place(5, 1, 8)
    with pytest.raises(UserError, match="RANK='x' in the environment"):
        place_of({"RANK": "x"})
