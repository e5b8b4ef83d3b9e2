"""The options of synth: from a file, from the command line, from Python; every problem of a file at once."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest

import sim
from sim.cli import main
from sim.errors import InputError, UserError
from sim.graph import read as read_graph
from sim.workload.record import Recorder
from sim.workload.spec import SynthSpec, from_file, from_options
from tests.workload.tiny_models import model_folder

CONFIG = """\
model: {model}
batch: 2
seq: 16
mode: train
parallel: dp=2
max-grad-norm: 1.0
"""


def config_file(tmp_path: Path, text: str = CONFIG) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text.format(model=model_folder(tmp_path / "model", "llama")))
    return path


def test_a_file_is_the_same_as_options_and_as_a_call(tmp_path: Path) -> None:
    path = config_file(tmp_path)
    spec = from_file(path)
    assert spec == from_options(
        model=str(tmp_path / "model"), batch=2, seq=16, mode="train", parallel="dp=2", max_grad_norm=1.0, dtype=None
    )
    out = tmp_path / "run.workload.json.gz"
    main(["synth", "--config", str(path), "--out", str(out)])
    called = sim.synthesize(spec.model, 2, 16, mode="train", parallel="dp=2", max_grad_norm=1.0)
    assert read_graph(out) == called


def test_options_go_before_the_file(tmp_path: Path) -> None:
    spec = from_file(config_file(tmp_path), batch=4, parallel="tp=2", seq=None)
    assert (spec.batch, spec.parallel, spec.seq) == (4, "tp=2", 16)


def test_every_problem_of_a_file_is_told_at_once(tmp_path: Path) -> None:
    path = config_file(tmp_path, "batch: many\nsequence: 16\nmode: learn\n")
    with pytest.raises(InputError) as error:
        from_file(path)
    message = str(error.value)
    assert message.startswith(str(path))
    for problem in (
        "batch: Expected `int`, got `str`", "sequence: is no option; did you mean 'sequence_parallel'?",
        "mode: 'learn' is none of forward, train", "model is missing",
    ):  # fmt: skip
        assert problem in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- a\n- b\n", "must be a mapping of keys, found a list"),
        ("", "must be a mapping of keys, found nothing"),
        ("model: [\n", "line 2: not valid YAML"),
        ("batch: 2\nbatch: 4\n", "line 2: not valid YAML: the key 'batch' stands twice"),
        ("max_grad_norm: 1\nmax-grad-norm: 2\n", "max-grad-norm: stands there twice, with - and with _; leave one out"),
    ],
)
def test_what_is_no_mapping_of_options_is_said(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(f"{path}: {told}")):
        from_file(path)


def test_options_of_a_file_that_cannot_be_together_are_told_with_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config_file(tmp_path, CONFIG + "momentum: 0.9\n")
    with pytest.raises(SystemExit):
        main(["synth", "--config", str(path), "--out", str(tmp_path / "x.workload.json.gz")])
    assert capsys.readouterr().err.startswith(f"tracesim: error: {path}: --momentum 0.9: is an option of")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        from_file(tmp_path / "none.yaml")


def test_the_command_says_what_is_wrong_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "x.workload.json.gz")
    with pytest.raises(SystemExit) as exit_:
        main(["synth", "opt-125m", "--seq", "8", "--out", out])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "tracesim: error: --batch is missing: sequences or images a rank\n"
    with pytest.raises(SystemExit):
        main(["synth", "gpt2", "--batch", "2", "--seq", "8", "--momentum", "0.5", "--micro-batches", "2", "--out", out])
    problems = [f"{option}: is an option of --mode train" for option in ("--momentum", "--micro-batches")]
    assert capsys.readouterr().err == f"tracesim: error: {'; '.join(problems)}\n"


def test_the_parameters_dtype_follows_the_mode_unless_told() -> None:
    assert SynthSpec(model="gpt2", batch=1).parameter_dtype == "float16"
    assert SynthSpec(model="gpt2", batch=1, mode="train").parameter_dtype == "float32"
    assert SynthSpec(model="gpt2", batch=1, mode="train", dtype="bfloat16").parameter_dtype == "bfloat16"


def test_a_python_call_is_checked_like_a_file() -> None:
    with pytest.raises(UserError, match="--optimizer: 'adam' is none of adamw, sgd, adafactor, none"):
        sim.synthesize("gpt2", 1, 8, mode="train", optimizer="adam")


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        ("gpt2", {"n_layer": -1}, ["n_layer -1: must be at least 1"]),
        ("gpt2", {"n_layer": 0, "vocab_size": "100", "resid_pdrop": 7}, ["n_layer 0", "vocab_size '100'", "resid_pd"]),
        ("llama", {"num_hidden_layers": 10**9}, ["num_hidden_layers 1000000000: must be at least 1 and at most 4096"]),
        ("llama", {"num_key_value_heads": 3}, ["num_key_value_heads 3: must divide num_attention_heads 4"]),
        (
            "llama",
            {"hidden_size": True, "head_dim": [8]},
            ["hidden_size True: a whole number", "head_dim [8]: a whole"],
        ),
        ("vit", {"image_size": [32, 0]}, ["image_size 0: must be at least 1"]),
    ],
)
def test_every_size_that_cannot_be_is_told_at_once(
    tmp_path: Path, family: str, changes: dict[str, Any], told: list[str]
) -> None:
    folder = model_folder(tmp_path / "model", family, **changes)
    with pytest.raises(InputError) as error:
        sim.synthesize(folder, 1, 16)
    assert str(error.value).startswith(f"{folder}/config.json: ")
    assert all(problem in str(error.value) for problem in told)


@pytest.mark.parametrize("place", ["__torch_dispatch__", "_gone"])
def test_ctrl_c_stops_it_wherever_it_falls(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        pytest.skip("somebody else takes the signal here")
    calls, original = 0, getattr(Recorder, place)

    def interrupted(self: Recorder, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 20:
            signal.raise_signal(signal.SIGINT)
        return original(self, *args)

    monkeypatch.setattr(Recorder, place, interrupted)
    out = tmp_path / "step.workload.json.gz"
    with pytest.raises(SystemExit) as ended:
        main(["synth", model_folder(tmp_path / "model", "gpt2"), "--batch", "1", "--seq", "16", "--out", str(out)])
    assert ended.value.code == 130 and not out.exists()
    assert 20 <= calls <= 60 and "Exception ignored" not in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("parallel", ["fsdp=2", "tp=2", "dp=2,tp=2"])
def test_adafactor_does_not_update_what_is_sharded(parallel: str) -> None:
    """PyTorch's asks DTensor for an in-place product of partial norms, which it refuses; with dp alone it runs."""
    told = f"--optimizer adafactor: PyTorch's cannot step what --parallel {parallel} shards"
    with pytest.raises(UserError, match=told):
        SynthSpec("gpt2", 1, mode="train", optimizer="adafactor", parallel=parallel).check()
    SynthSpec("gpt2", 1, mode="train", optimizer="adafactor", parallel="dp=2").check()
