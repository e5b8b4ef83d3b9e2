"""One of two gloo processes that run tiny models split by the plans of sim.workload.tensor_parallel, with real numbers.

``python -m tests.workload.real_tensor_parallel RANK STORE FOLDER CASE...``; rank 0 prints its findings as JSON.  A case
is a family, or ``family+sequence``.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sim.workload.cards import find_config
from sim.workload.record import COLLECTIVES
from sim.workload.spec import SynthSpec
from sim.workload.tasks import build_model, no_cache, task_of
from sim.workload.tensor_parallel import tensor_parallel
from tests.workload.tiny_models import IMAGES, model_folder

RANKS, BATCH, SEQ = 2, 2, 16


def spec_of(case: str, folder: Path, **options: Any) -> SynthSpec:
    family, _, sequence = case.partition("+")
    return SynthSpec(
        model=model_folder(folder / family, family), batch=BATCH, seq=None if family in IMAGES else SEQ,
        mode="train", optimizer="none", sequence_parallel=bool(sequence), **options,
    )  # fmt: skip


class Collectives(TorchDispatchMode):
    """Notes the kind and whole size of each functional collective."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        kind = COLLECTIVES.get(func._schema.name)
        if kind is not None:
            tensors = [t for t in tree_leaves((args, result)) if isinstance(t, torch.Tensor)]
            self.seen.append((kind, max(t.numel() * t.element_size() for t in tensors)))
        return result


def batch_of(spec: SynthSpec, config: Any) -> dict[str, Any]:
    """The task's batch with values in it."""
    generator = torch.Generator().manual_seed(1)

    def filled(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            return torch.randn(tensor.shape, generator=generator)
        return torch.randint(0, 2, tensor.shape, generator=generator)

    batch = task_of(spec, config).batch(spec, config)
    return {name: t if name == "attention_mask" else filled(t) for name, t in batch.items()}


def by_heads(model: Any) -> None:
    """Deal the columns of a fused q, k, v out so that the first half of them is the first rank's q, k and v."""
    for module in model.modules():
        if hasattr(module, "c_attn"):
            for parameter in module.c_attn.parameters():
                columns = torch.arange(parameter.shape[-1]).view(3, RANKS, -1).transpose(0, 1).reshape(-1)
                gradient, parameter.grad = parameter.grad, None
                parameter.data = parameter.data[..., columns].contiguous()
                parameter.grad = None if gradient is None else gradient[..., columns]


def whole(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def run(case: str, folder: Path, mesh: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    spec = spec_of(case, folder, parallel=f"tp={RANKS}")
    config = find_config(spec.model)
    model = build_model(spec, config, task_of(spec, config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    split = copy.deepcopy(model)
    by_heads(split)
    tensor_parallel(spec, split, config, mesh)
    batch = batch_of(spec, config)
    loss = model(**batch, **no_cache(model)).loss
    loss.backward()
    with Collectives() as collectives:
        other = split(**batch, **no_cache(split)).loss
        other.backward()
    by_heads(model)
    pairs = zip(model.named_parameters(), split.parameters(), strict=True)
    off = {n: (whole(b.grad) - a.grad).abs().max().item() for (n, a), b in pairs if a.grad is not None}
    return {"loss": loss.item(), "split_loss": other.item(), "off": max(off.values()), "collectives": collectives.seen}


def main(rank: str, store: str, folder: str, *cases: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=int(rank), world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tp",))
    found = {case: run(case, Path(folder) / rank, mesh) for case in cases}
    if rank == "0":
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
