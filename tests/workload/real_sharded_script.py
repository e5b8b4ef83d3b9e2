"""One of the gloo processes that run ``sharded_script.py`` on a CPU, with real numbers, as torchrun would start them.

``python -m tests.workload.real_sharded_script RANK FOLDER MODEL MODE...``; rank 0 prints the collectives of the third
step in each mode as JSON: in its second DistributedDataParallel makes its buckets anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sim.workload.capture.cutting import cut_by_optimizer
from sim.workload.record import C10D, COLLECTIVES

SCRIPT = Path(__file__).parent / "sharded_script.py"
RANKS, HOSTS, STEP = 4, 2, 3
KINDS = C10D | COLLECTIVES


class Collectives(TorchDispatchMode):
    """Notes the kind, the whole size and the dtype of each collective."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        kind = KINDS.get(func._schema.name)
        if kind is not None:
            tensors = [t for t in tree_leaves((args, result)) if isinstance(t, torch.Tensor)]
            size = max(t.numel() * t.element_size() for t in tensors)
            self.seen.append((kind, size, str(tensors[0].dtype).removeprefix("torch.")))
        return result


class Enough(BaseException):
    """The third step has ended."""


def clipping(mode: str) -> tuple[str, ...]:
    """Parameters on two meshes are not clipped by one call."""
    return () if mode == "fsdp-tp" else ("--clip", "1.0")


def third_step(mode: str, model: str) -> list[tuple[str, int, str]]:
    collectives, steps = Collectives(), 0

    def step_ended() -> None:
        nonlocal steps
        steps += 1
        if steps == STEP:
            raise Enough
        collectives.seen.clear()

    sys.argv = ["sharded_script.py", model, "--device", "cpu", "--mode", mode, *clipping(mode)]
    with cut_by_optimizer(step_ended), contextlib.suppress(Enough), collectives:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return collectives.seen


def main(rank: str, folder: str, model: str, *modes: str) -> None:
    torch.set_num_threads(1)
    of_a_host = str(RANKS // HOSTS)
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": of_a_host}
    begin, found = dist.init_process_group, {}
    for mode in modes:
        store = dist.FileStore(f"{folder}/{mode}", RANKS)
        dist.init_process_group = partial(begin, store=store, rank=int(rank), world_size=RANKS)
        found[mode] = third_step(mode, model)
        dist.destroy_process_group()
    if rank == "0":
        print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
