"""DistributedDataParallel's buckets: gradients are averaged over the data-parallel ranks while backward runs.

PyTorch's C++ reducer refuses fake tensors, so what it does is done here, after torch/csrc/distributed/c10d/reducer.cpp
and torch/nn/parallel/distributed.py (PyTorch 2.13):

* buckets are filled in the order in which the first backward made the gradients ready (one bucket for everything in
  that first one), by PyTorch's own ``_compute_bucket_assignment_by_size``: 1 MiB first, then 25 MiB;
* a gradient that is ready is divided into its place in the bucket (mark_variable_ready_dense); with
  ``gradient_as_bucket_view`` it then *is* that place;
* a full bucket is all-reduced on the process group's stream, after the buckets before it (mark_bucket_ready);
* when backward ends, each bucket is waited for and copied back into its gradients (finalize_bucket_dense);
* before a forward that follows a synchronized backward, buffers are broadcast from rank 0 (_sync_buffers,
  broadcast_coalesced in comm.cpp).

Under tensor parallelism the buckets hold each rank's own shards.  Left out: unused parameters, communication hooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from sim.workload.parallel import to_local
from sim.workload.record import Recorder

MIB = 2**20
FIRST_BUCKET_BYTES = MIB
DEFAULT_BUCKET_BYTES = 25 * MIB
BROADCAST_BYTES = 250 * MIB


class _Bucket(NamedTuple):
    parameters: list[Any]
    flat: torch.Tensor
    views: list[torch.Tensor]


class DataParallel:
    """One rank's reducer over ``group``, an axis of ``ranks`` ranks; ``buffers`` says whether it broadcasts them.
    ``recorder`` is who writes down now."""

    recorder: Recorder

    def __init__(
        self, model: Any, group: str, ranks: int, *, bucket_mib: float | None = None, as_view: bool = False,
        buffers: bool = True,
    ) -> None:  # fmt: skip
        self._model = model
        self._group = group
        self._share = 1.0 / ranks
        self._limits = bucket_limits(bucket_mib)
        self._as_view = as_view
        self._synchronize = True
        self._buffers = buffers
        self._buffers_are_due = True
        self._ready: list[Any] = []
        self._under_way: list[int] = []
        self._missing: list[int] = []
        self._place: dict[Any, tuple[int, torch.Tensor]] = {}
        parameters = [p for p in model.parameters() if p.requires_grad]
        self._fill_buckets([parameters])
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._gradient_is_ready)

    @property
    def bucket_tensors(self) -> list[torch.Tensor]:
        return [bucket.flat for bucket in self._buckets]

    @property
    def has_an_order(self) -> bool:
        """Whether a backward has said in which order gradients become ready."""
        return bool(self._ready)

    @property
    def has_begun(self) -> bool:
        """Whether backward has made gradients ready that are to be reduced."""
        begun = (left < len(bucket.parameters) for left, bucket in zip(self._missing, self._buckets, strict=True))
        return bool(self._under_way) or any(begun)

    @property
    def is_complete(self) -> bool:
        """Whether backward has made every gradient ready."""
        return len(self._under_way) == len(self._buckets)

    def adopt_state(self, recorder: Recorder) -> None:
        """The buckets live as long as the model."""
        recorder.adopt([("ddp_bucket", bucket.flat) for bucket in self._buckets], "communication")
        self.recorder = recorder

    def rebuild_buckets(self) -> None:
        """Fill the buckets anew, in the order in which the last backward made the gradients ready."""
        ordered = self._ready
        groups, _ = torch.distributed._compute_bucket_assignment_by_size(
            [to_local(p) for p in ordered], self._limits, [False] * len(ordered), list(range(len(ordered)))
        )
        self._fill_buckets([[ordered[i] for i in group] for group in groups])

    # A step's parts ----------------------------------------

    def before_forward(self, synchronize: bool) -> None:
        """``synchronize``: whether the backward that follows reduces, or only accumulates (``no_sync``)."""
        if self._buffers and self._buffers_are_due:
            self._broadcast_buffers([to_local(b) for b in self._model.buffers()])
        self._synchronize = self._buffers_are_due = synchronize
        self._ready = []

    def before_backward(self, synchronize: bool) -> None:
        """Of a pipeline's stage, whose forwards all run under ``no_sync``, so that its buffers are never broadcast
        again: it is the backward that says whether it reduces."""
        self._synchronize = synchronize
        self._ready = []

    def after_backward(self) -> None:
        """The engine's callback at the end of backward."""
        if not self._synchronize:
            return
        assert len(self._under_way) == len(self._buckets), "a bucket never became full: an unused parameter"
        for bucket, reduction in zip(self._buckets, self._under_way, strict=True):
            self.recorder.wait(reduction)
            if not self._as_view:
                for parameter, view in zip(bucket.parameters, bucket.views, strict=True):
                    to_local(parameter.grad).copy_(view)
        self._under_way.clear()

    def _gradient_is_ready(self, parameter: Any) -> None:
        if not self._synchronize:
            return
        self._ready.append(parameter)
        index, view = self._place[parameter]
        with torch.no_grad():
            torch.mul(to_local(parameter.grad), self._share, out=view)
        if self._as_view:
            parameter.grad = _like(parameter.grad, view)
        self._missing[index] -= 1
        while len(self._under_way) < len(self._buckets) and not self._missing[len(self._under_way)]:
            flat = self._buckets[len(self._under_way)].flat
            self._under_way.append(self.recorder.communicate("all_reduce", flat, self._group))
        if len(self._under_way) == len(self._buckets):
            self._missing = [len(bucket.parameters) for bucket in self._buckets]

    def _fill_buckets(self, groups: Sequence[Sequence[Any]]) -> None:
        self._buckets = [_bucket(parameters) for parameters in groups]
        self._missing = [len(bucket.parameters) for bucket in self._buckets]
        self._place = {
            parameter: (index, view)
            for index, bucket in enumerate(self._buckets)
            for parameter, view in zip(bucket.parameters, bucket.views, strict=True)
        }

    def _broadcast_buffers(self, buffers: Sequence[torch.Tensor]) -> None:
        if not buffers:
            return
        groups, _ = torch.distributed._compute_bucket_assignment_by_size(buffers, [BROADCAST_BYTES])
        with torch.no_grad():
            for group in groups:
                self._broadcast([buffers[i] for i in group])

    def _broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        flat = torch.cat([t.reshape(-1) for t in tensors]) if len(tensors) > 1 else tensors[0].reshape(-1)
        self.recorder.wait(self.recorder.communicate("broadcast", flat, self._group))
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def bucket_limits(bucket_mib: float | None) -> list[int]:
    """Sizes that buckets are filled up to: DDP's defaults, or one size for all where one is asked for."""
    return [FIRST_BUCKET_BYTES, DEFAULT_BUCKET_BYTES] if bucket_mib is None else [int(bucket_mib * MIB)]


def _bucket(parameters: Sequence[Any]) -> _Bucket:
    local = [to_local(p) for p in parameters]
    flat = torch.zeros(sum(t.numel() for t in local), dtype=local[0].dtype)
    offset, views = 0, []
    for tensor in local:
        views.append(flat.as_strided(tensor.size(), tensor.stride(), offset))
        offset += tensor.numel()
    return _Bucket(list(parameters), flat, views)


def _like(gradient: Any, local: torch.Tensor) -> Any:
    """The local tensor as a gradient of the same kind: a DTensor where the parameter is one."""
    if not hasattr(gradient, "placements"):
        return local
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local, gradient.device_mesh, gradient.placements, run_check=False)
