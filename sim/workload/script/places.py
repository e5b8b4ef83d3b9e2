"""Where tensors are: in this build of PyTorch every fake tensor is on the CPU; the GPU's are remembered here.

What an op makes is on the GPU where one of its inputs is, and what a factory makes is where it was asked for.  A
script that names no GPU at all runs as if everything were on one, as a script without ``.to("cuda")`` is meant to be
judged by its work, not by its device.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch


class Places:
    """Which storages are in a GPU's memory, and which are pinned."""

    def __init__(self) -> None:
        self.gpu_named = False
        self.all_on_gpu = False
        self.default_is_gpu = False
        self._on_gpu: dict[int, weakref.ref[Any]] = {}
        self._on_host: dict[int, weakref.ref[Any]] = {}
        self._pinned: dict[int, weakref.ref[Any]] = {}
        self._asked: bool | None = None
        self._around = False

    def on_gpu(self, tensor: torch.Tensor) -> bool:
        return self.holds(held(tensor).untyped_storage()._cdata)

    def is_put_on_gpu(self, tensor: torch.Tensor) -> bool:
        """Whether the script itself has put it there."""
        return held(tensor).untyped_storage()._cdata in self._on_gpu

    def holds(self, key: int) -> bool:
        """Whether the GPU holds the storage of that key (``UntypedStorage._cdata``)."""
        return key not in self._on_host if self.all_on_gpu else key in self._on_gpu

    def keep_on_host(self, tensor: torch.Tensor) -> None:
        """Also where a script names no GPU: an optimizer's step counters."""
        self._on_gpu.pop(held(tensor).untyped_storage()._cdata, None)
        _remember(self._on_host, tensor)

    def are_mixed(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether some are on the GPU and some, that are no single numbers, are not: PyTorch would refuse."""
        if self.all_on_gpu or len(tensors) < 2:
            return False
        return any(map(self.on_gpu, tensors)) and any(t.dim() and not self.on_gpu(t) for t in tensors)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return held(tensor).untyped_storage()._cdata in self._pinned

    def put_on_gpu(self, tensor: torch.Tensor) -> None:
        _remember(self._on_gpu, tensor)

    def pin(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            _remember(self._pinned, tensor)

    @contextlib.contextmanager
    def asking(self, gpu: bool | None, around: bool) -> Iterator[None]:
        """One call of a torch function: ``gpu`` is where its result was asked to be, if it was; ``around`` whether
        the call concerns tensors on the GPU, which is where what its inside makes belongs."""
        before = self._asked, self._around
        self._asked, self._around = gpu, around
        if gpu:
            self.gpu_named = True
        try:
            yield
        finally:
            self._asked, self._around = before

    @property
    def moving(self) -> bool | None:
        """Where the result of the call that is under way was asked to be."""
        return self._asked

    def place(self, inputs: Iterable[torch.Tensor], made: Iterable[torch.Tensor]) -> None:
        """Say where what an op made is."""
        inputs = list(inputs)
        if self._asked is not None:
            gpu = self._asked
        elif inputs:
            gpu = any(self.on_gpu(t) for t in inputs)
        else:
            gpu = self._around or torch._C._current_autograd_node() is not None
        if gpu:
            for tensor in made:
                self.put_on_gpu(tensor)


def held(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that has the storage: of a DTensor, or of what is still being communicated, the one inside."""
    while True:
        inside = getattr(tensor, "_local_tensor", None)
        inside = getattr(tensor, "elem", None) if inside is None else inside
        if inside is None:
            return tensor
        tensor = inside


def _remember(kept: dict[int, weakref.ref[Any]], tensor: torch.Tensor) -> None:
    storage = held(tensor).untyped_storage()
    key: int = storage._cdata
    if key not in kept:
        kept[key] = weakref.ref(storage, partial(_forget, kept, key))


def _forget(kept: dict[int, weakref.ref[Any]], key: int, _reference: Any) -> None:
    kept.pop(key, None)
