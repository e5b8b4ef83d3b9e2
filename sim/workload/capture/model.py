"""A model by name, with random weights: forward steps with loss, or training steps with AdamW; DDP where torchrun
started several ranks.

Each step reads its loss, as a loop that logs it does: a step ends when its work has.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from sim.errors import UserError
from sim.workload.capture.session import Session
from sim.workload.capture.spec import ModelRun, Place
from sim.workload.cards import find_config

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def run_model(run: ModelRun, place: Place, session: Session) -> None:
    """Warm up and record; UserError where the model cannot be built or does not fit."""
    config = find_config(run.model)
    _check_length(run, config)
    device = _device(place)
    with _out_of_memory(run), _process_group(place):
        session.record_memory()
        with torch.device(device):  # for the building alone: as a context it costs the host time in every call
            step = _step(run, _build(run, config), place)
        session.begin()
        try:
            while not session.over:
                step()
                session.step_ended()
        finally:
            session.stop()


def _check_length(run: ModelRun, config: Any) -> None:
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and run.seq > longest:
        raise UserError(f"--seq {run.seq}: {run.model} has positions for {longest} tokens; choose at most {longest}")


def _device(place: Place) -> str:
    if not torch.cuda.is_available():
        return "cpu"
    if place.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"LOCAL_RANK {place.local_rank}: this host has {torch.cuda.device_count()} GPUs; start one process a GPU"
        )
    torch.cuda.set_device(place.local_rank)
    return f"cuda:{place.local_rank}"


def _build(run: ModelRun, config: Any) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    try:
        model: torch.nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=DTYPES[run.dtype], attn_implementation="sdpa"
        )
    except ValueError as error:
        raise UserError(f"{run.model}: transformers cannot build it as a causal language model: {error}") from None
    return model.train(run.mode == "train")


def _step(run: ModelRun, model: torch.nn.Module, place: Place) -> Any:
    ids = torch.randint(0, model.config.vocab_size, (run.batch, run.seq))
    if run.mode == "forward":
        return lambda: _forward(model, ids)
    if place.ranks > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters())
    return lambda: _train(model, ids, optimizer)


def _forward(model: Any, ids: torch.Tensor) -> None:
    with torch.no_grad():
        model(input_ids=ids, labels=ids, use_cache=False).loss.item()


def _train(model: Any, ids: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    loss.item()


@contextlib.contextmanager
def _process_group(place: Place) -> Iterator[None]:
    if place.ranks == 1:
        yield
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _out_of_memory(run: ModelRun) -> Iterator[None]:
    """PyTorch's two ways to say that memory is out: a class of its own on GPUs, a RuntimeError on CPUs."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise UserError(
            f"--model {run.model} --batch {run.batch} --seq {run.seq}: does not fit into this device's memory; "
            "choose a smaller --batch or --seq"
        ) from None
