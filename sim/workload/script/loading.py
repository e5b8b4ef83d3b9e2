"""Data loaders: they load in this process, really, for that is the host's own matter and may look at values.

Only a data set whose tensors are on the GPU has its batches made by ops of the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import dataloader

from sim.workload.script.devices import GpuFace
from sim.workload.script.places import Places
from sim.workload.script.recorder import outside

# What would load in other processes or threads.
HERE = {
    "num_workers": 0, "pin_memory": False, "prefetch_factor": None, "persistent_workers": False, "timeout": 0,
    "multiprocessing_context": None, "pin_memory_device": "",
}  # fmt: skip


def load_here(face: GpuFace, put: Callable[[Any, str, Any], None]) -> None:
    """Patch PyTorch's DataLoader."""
    make, begin = dataloader.DataLoader.__init__, dataloader.DataLoader.__iter__
    following = dataloader._BaseDataLoaderIter.__next__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        self._tracesim_pins = bool(kwargs.get("pin_memory"))
        make(self, *args, **{key: HERE.get(key, value) for key, value in kwargs.items()})

    def iterate(self: Any) -> Any:
        with outside():
            iterator = begin(self)
        iterator._tracesim_pins = self._tracesim_pins
        return iterator

    def batch(self: Any) -> Any:
        if _is_on_gpu(self._dataset, face.places):
            with outside():
                index = self._next_index()
            return self._dataset_fetcher.fetch(index)
        with outside():
            loaded = following(self)
        if getattr(self, "_tracesim_pins", False):
            face.places.pin(leaf for leaf in tree_leaves(loaded) if isinstance(leaf, torch.Tensor))
        return loaded

    put(dataloader.DataLoader, "__init__", init)
    put(dataloader.DataLoader, "__iter__", iterate)
    put(dataloader._BaseDataLoaderIter, "__next__", batch)


def _is_on_gpu(dataset: Any, places: Places) -> bool:
    """Whether a data set, or the one that it is a part of, holds tensors that the script has put on the GPU."""
    held = vars(dataset) if hasattr(dataset, "__dict__") else {}
    if any(places.is_put_on_gpu(t) for t in tree_leaves(dict(held)) if isinstance(t, torch.Tensor)):
        return True
    return "dataset" in held and _is_on_gpu(held["dataset"], places)
