"""Ops over lists of tensors (``_foreach_add_``, ``fsdp::chunk_cat``): one work with one summed tensor a list.

A CUDA device runs such an op as a few kernels over many tensors.  What it costs follows from the bytes of each list,
so a list becomes one flat tensor of its elements in all; ``tensors`` says how many there were and ``launches`` how
many kernels they take.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from sim.ops import TensorMeta, Work

PREFIXES = (
    "aten::_foreach_", "aten::_fused_adam", "aten::_fused_sgd", "aten::_fused_adagrad", "aten::_amp_foreach_", "fsdp::",
)  # fmt: skip
# aten/src/ATen/native/cuda/MultiTensorApply.cuh (PyTorch 2.13, built for CUDA 13, whose launches take 32 KiB of
# arguments): a launch takes chunks of 65,536 elements of at most so many tensors, by the number of lists, and at most
# 2,240 chunks.
CHUNK_ELEMENTS = 65536
MAX_TENSORS = (770, 448, 336, 252, 210)
MAX_CHUNKS = 2240


def is_foreach(name: str) -> bool:
    """Whether an op runs as multi-tensor kernels."""
    return name.startswith(PREFIXES)


def summed(
    name: str, named: Sequence[tuple[str, Any]], outputs: Sequence[torch.Tensor], written: Collection[str]
) -> Work:
    """The work of an op over lists; ``named`` are its arguments, ``written`` those of them that are only written."""
    lists = [_list(value) for key, value in named if key not in written]
    lists = [tensors for tensors in lists if tensors]
    scalars = [(key, value) for key, value in named if isinstance(value, bool | int | float | str)]
    longest = max(lists, key=len)
    scalars += [("tensors", len(longest)), ("launches", launches([t.numel() for t in longest], len(lists)))]
    flat = tuple(meta for tensors in lists for meta in _flat(tensors))
    return Work(name, flat, tuple(_flat(list(outputs))), tuple(scalars))


def launches(elements: Sequence[int], lists: int) -> int:
    """How many kernels a multi-tensor op over tensors of these sizes takes, with so many lists of them."""
    most_tensors = MAX_TENSORS[min(lists, len(MAX_TENSORS)) - 1]
    count = tensors = chunks = 0
    for size in elements:
        if not size:
            continue
        tensors += 1
        filled, chunks = divmod(chunks + -(-size // CHUNK_ELEMENTS), MAX_CHUNKS)
        count += filled
        if filled:
            tensors = min(chunks, 1)  # a tensor that was cut goes on in the next launch
        if tensors == most_tensors:
            count, tensors, chunks = count + 1, 0, 0
    return count + (chunks > 0)


def _list(value: Any) -> list[torch.Tensor]:
    """A list of tensors, or the single tensor that an op takes besides (``found_inf``)."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [v for v in value if isinstance(v, torch.Tensor)] if isinstance(value, list | tuple) else []


def _flat(tensors: Sequence[torch.Tensor]) -> list[TensorMeta]:
    elements: dict[str, int] = {}
    for tensor in tensors:
        dtype = str(tensor.dtype).removeprefix("torch.")
        elements[dtype] = elements.get(dtype, 0) + tensor.numel()
    return [TensorMeta(dtype, (count,)) for dtype, count in elements.items()]
