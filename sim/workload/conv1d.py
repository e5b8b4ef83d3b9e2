"""ColwiseParallel and RowwiseParallel for transformers' Conv1D: GPT-2's linear layer, whose weight is [in, out]."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel


class ColwiseConv1D(ColwiseParallel):
    """Columns of [in, out] are dim 1."""

    def _apply(self, module: Any, device_mesh: Any) -> Any:
        return _distributed(self, module, device_mesh, weight=Shard(1), bias=Shard(0))


class RowwiseConv1D(RowwiseParallel):
    """Rows of [in, out] are dim 0; the bias is whole."""

    def _apply(self, module: Any, device_mesh: Any) -> Any:
        self.desired_input_layouts = (Shard(-1),)
        return _distributed(self, module, device_mesh, weight=Shard(0), bias=Replicate())


def _distributed(style: Any, module: Any, mesh: Any, **placements: Any) -> Any:
    def partition(name: str, module: Any, mesh: Any) -> None:
        for parameter, placement in placements.items():
            whole = getattr(module, parameter)
            module.register_parameter(parameter, nn.Parameter(distribute_tensor(whole, mesh, [placement])))

    return distribute_module(
        module,
        mesh,
        partition,
        partial(style._prepare_input_fn, style.input_layouts, style.desired_input_layouts),
        partial(style._prepare_output_fn, style.output_layouts, style.use_local_output),
    )
