"""The optimizer of a training step: PyTorch's own, with the implementation that it would choose on a CUDA device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from sim.errors import UserError
from sim.workload.builder import ProgramBuilder
from sim.workload.record import Recorder
from sim.workload.spec import SynthSpec

LEARNING_RATE = 1e-4


def make_optimizer(spec: SynthSpec, parameters: Iterable[Any]) -> Any:
    """The optimizer, or None where the step ends with the gradients.

    ``foreach`` is PyTorch's default for CUDA parameters only (torch/optim/optimizer.py,
    _default_to_fused_or_foreach); for CPU parameters it is asked for.
    """
    if spec.optimizer == "none":
        return None
    kernels = {"foreach": spec.optimizer_kernels == "foreach"}
    if spec.optimizer_kernels == "fused":
        kernels = {"fused": True}
    trainable = [p for p in parameters if p.requires_grad]
    if spec.optimizer == "adamw":
        return torch.optim.AdamW(trainable, lr=LEARNING_RATE, **kernels)
    if spec.optimizer == "sgd":
        return torch.optim.SGD(trainable, lr=LEARNING_RATE, momentum=spec.momentum, **kernels)
    return torch.optim.Adafactor(trainable, lr=LEARNING_RATE, **kernels)


def begin_state(optimizer: Any, parameters: Iterable[Any]) -> None:
    """One step with zero gradients, so that the optimizer has the state that a steady step finds."""
    parameters = list(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    answering = Recorder(ProgramBuilder())
    answering.stopped = True
    try:
        with answering:
            optimizer.step()
    except RuntimeError as error:
        raise UserError(f"the optimizer refuses these parameters: {' '.join(str(error).split())}") from None
    optimizer.zero_grad(set_to_none=True)


def state_tensors(optimizer: Any) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Name and tensor of every state, and whether a CUDA run keeps it on the host: the step counters of an optimizer
    that is neither fused nor capturable (torch/optim/adamw.py, _init_group)."""
    for group in optimizer.param_groups:
        on_host = not (group.get("fused") or group.get("capturable"))
        for parameter in group["params"]:
            for name, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    yield name, value, on_host and name == "step"
