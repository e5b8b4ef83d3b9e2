"""The optimizer of a training step: PyTorch's own, with the implementation that it would choose on a CUDA device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

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
    trainable = [{"params": kind} for kind in kinds_of(parameters)]
    if spec.optimizer == "adamw":
        return torch.optim.AdamW(trainable, lr=LEARNING_RATE, **kernels)
    if spec.optimizer == "sgd":
        return torch.optim.SGD(trainable, lr=LEARNING_RATE, momentum=spec.momentum, **kernels)
    return torch.optim.Adafactor(trainable, lr=LEARNING_RATE, **kernels)


def kinds_of(parameters: Iterable[Any]) -> list[list[Any]]:
    """Parameters by the mesh they are distributed over.  Under tensor parallelism some are DTensors and some are not,
    with FSDP they lie on two meshes; an op over a list takes one kind, so a user's optimizer has a group for each."""
    kinds: dict[str, list[Any]] = {}
    for parameter in parameters:
        mesh = getattr(parameter, "device_mesh", None)
        kinds.setdefault("" if mesh is None else str(mesh), []).append(parameter)
    return list(kinds.values())


def clip_gradients(parameters: Iterable[Any], most: float, pipeline: Any = None) -> None:
    """torch.nn.utils.clip_grad_norm_; with several kinds of parameters the norms of each, put together.  With the
    process group of a pipeline the squares are summed over it, as torchtitan does (torchtitan/distributed/utils.py)."""
    kinds = kinds_of(parameters)
    if len(kinds) == 1 and pipeline is None:
        torch.nn.utils.clip_grad_norm_(kinds[0], most, foreach=True)
        return
    norms = [torch.nn.utils.get_total_norm([p.grad for p in kind], foreach=True) for kind in kinds]
    whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    total = torch.linalg.vector_norm(torch.stack(whole)) if len(whole) > 1 else whole[0]
    if pipeline is not None:
        total = total**2
        torch.distributed.all_reduce(total, group=pipeline)
        total = total**0.5
    for kind in kinds:
        torch.nn.utils.clip_grads_with_norm_(kind, most, total, foreach=True)


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


class State(NamedTuple):
    """A tensor of an optimizer's state: of which parameter, and whether a CUDA run keeps it on the host."""

    parameter: Any
    name: str
    tensor: torch.Tensor
    on_host: bool


def state_tensors(optimizer: Any) -> Iterator[State]:
    """Every state.  On the host are the step counters of an optimizer that is neither fused nor capturable
    (torch/optim/adamw.py, _init_group)."""
    for group in optimizer.param_groups:
        on_host = not (group.get("fused") or group.get("capturable"))
        for parameter in group["params"]:
            for name, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    yield State(parameter, name, value, on_host and name == "step")
