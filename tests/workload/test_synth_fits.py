"""From synth to replay on the command line: jobs that fit nowhere, and more ranks than there are GPUs."""

from __future__ import annotations

from logging import Handler, LogRecord
from pathlib import Path

import pytest
from transformers.utils import logging

from tests.conftest import Run
from tests.workload.tiny_models import model_folder

# Two embeddings of 128,256 x 8,192 and two layers of (2 x 8,192 + 2 x 1,024 + 3 x 28,672) x 8,192 and two norms, and
# one norm: 3,812,630,528 parameters.
WIDE = {
    "hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 28672,
    "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
PARAMETERS = 2 * 128256 * 8192 + 2 * ((2 * 8192 + 2 * 1024 + 3 * 28672) * 8192 + 2 * 8192) + 8192


@pytest.fixture
def workload(run: Run, tmp_path: Path) -> Path:
    file = tmp_path / "wide.workload.json.gz"
    model = model_folder(tmp_path / "model", "llama", **WIDE)
    plan = ["--parallel", "fsdp=2", "--optimizer-kernels", "fused"]
    code, _, error = run("synth", model, "--mode", "train", "--batch", 1, "--seq", 8, *plan, "--out", file)
    assert code == 0, error
    return file


def test_weights_that_do_not_fit_even_sharded_are_answered_by_how_much(run: Run, workload: Path) -> None:
    code, out, _ = run("replay", workload, "--topology", "a5000x2")
    assert code == 0
    assert out.startswith("Out of memory: ")
    short = float(out.removeprefix("Out of memory: ").split()[0])
    assert short > 16 * PARAMETERS / 2 / 2**30 - 24
    # AdamW in float32 takes 16 bytes a parameter, half of them on each card: 28.41 GiB, and more while it runs.
    needed = float(out.split("would need ")[1].split()[0])
    assert needed > 16 * PARAMETERS / 2 / 2**30 > 24


def test_more_ranks_than_gpus_are_one_line(run: Run, workload: Path) -> None:
    code, _, error = run("replay", workload, "--topology", "a5000x1")
    assert code == 2
    assert error.count("\n") == 1
    assert "has 2 ranks, a5000x1 only 1 GPU; choose a larger --topology" in error


def test_advice_of_the_libraries_stays_off_stderr(run: Run, tmp_path: Path) -> None:
    """transformers warns of GPT-2 that its configuration names no loss, once a process."""
    logging.warning_once.cache_clear()
    told: list[LogRecord] = []
    handler = Handler()
    handler.emit = told.append  # type: ignore[method-assign]
    logging.get_logger().addHandler(handler)
    model = model_folder(tmp_path / "model", "gpt2")
    plan = ("--mode", "train", "--batch", 1, "--seq", 8, "--out", tmp_path / "a.workload.json.gz")
    code, _, error = run("synth", model, *plan)
    logging.get_logger().removeHandler(handler)
    assert (code, error, told) == (0, "", [])
