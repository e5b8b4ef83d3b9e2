"""DistributedDataParallel for a script: around the models that it wraps itself, or, after its first step, around the
one of a script that knows of one GPU only.  The reducer is that of :mod:`sim.workload.ddp`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_map

from sim.workload.ddp import DataParallel
from sim.workload.script.devices import GPU
from sim.workload.script.job import ONE_GPU, Job
from sim.workload.script.places import Places
from sim.workload.script.recorder import Owner, Refused, ScriptRecorder

NOT_SYNTHESIZED = ("mixed_precision", "delay_all_reduce_named_params", "param_to_hook_all_reduce")
Put = Callable[[Any, str, Any], None]


class Replicas:
    """The reducers of a job.  ``wraps`` says that the model of a script which makes no process group is wrapped."""

    def __init__(self, job: Job, wraps: bool, recorder: ScriptRecorder, places: Places) -> None:
        self._job = job
        self._wraps = wraps
        self._recorder = recorder
        self._places = places
        self._reducers: list[DataParallel] = []
        self._unordered: list[DataParallel] = []
        self._handle: Any = None

    def owners(self) -> dict[int, Owner]:
        """Whose the buckets are."""
        buckets = (bucket for reducer in self._reducers for bucket in reducer.bucket_tensors)
        return {t.untyped_storage()._cdata: Owner("communication", "ddp_bucket") for t in buckets}

    def are_ready(self, models: Sequence[Any]) -> bool:
        """Whether every reducer has its buckets in the order of a backward, when a step has ended: after the first
        there is a model to wrap, after its first backward an order of gradients."""
        if self._wraps and not self._job.begun and not self._reducers:
            self._wrap_the_model(models)
            return False
        with self._on_gpu():
            for reducer in [r for r in self._unordered if r.has_an_order]:
                reducer.rebuild_buckets()
                self._unordered.remove(reducer)
        return not self._unordered

    def _wrap_the_model(self, models: Sequence[Any]) -> None:
        trained = [m for m in models if any(p.requires_grad for p in m.parameters())]
        if len(trained) != 1:
            raise Refused(
                f"--parallel dp={self._job.ranks}: the script calls {len(trained)} models that are trained;"
                " wrap them in DistributedDataParallel in the script"
            )
        reducer = self.wrap(trained[0], self._job.world, self._job.ranks or 1)
        self._handle = register_module_forward_pre_hook(
            lambda module, args: reducer.before_forward(True) if module is trained[0] else None
        )

    def wrap(self, model: Any, group: str, ranks: int, **options: Any) -> DataParallel:
        """Put a reducer around a model; ``options`` are the reducer's."""
        with self._on_gpu():
            reducer = DataParallel(model, group, ranks, **options)
        reducer.recorder = self._recorder
        self._recorder.after_backward = self._after_backward
        self._reducers.append(reducer)
        self._unordered.append(reducer)
        return reducer

    def close(self) -> None:
        """Forget the script's model."""
        if self._handle is not None:
            self._handle.remove()

    def _after_backward(self) -> None:
        for reducer in [r for r in self._reducers if r.has_begun]:
            if not reducer.is_complete:
                place = self._recorder.place_of_script()
                raise Refused(
                    f"{place}: backward left parameters without a gradient; DistributedDataParallel with unused"
                    " parameters is not synthesized"
                )
            reducer.after_backward()

    @contextlib.contextmanager
    def _on_gpu(self) -> Iterator[None]:
        with torch._C.DisableTorchFunction(), self._places.asking(True, True):
            yield

    def patch(self, put: Put) -> None:
        """The wrapper, for scripts that wrap their models themselves."""
        wrapper = self._wrapper()
        put(torch.nn.parallel.DistributedDataParallel, "__init__", self._refused)
        for place in (torch.nn.parallel, torch.nn.parallel.distributed):
            put(place, "DistributedDataParallel", wrapper)

    def _refused(self, *_: Any, **__: Any) -> None:
        """Where a library took PyTorch's own class before the script ran."""
        raise Refused(
            f"{self._recorder.place_of_script()}: a library wraps the model in PyTorch's DistributedDataParallel, whose"
            " reducer needs data; wrap it in torch.nn.parallel.DistributedDataParallel in the script"
        )

    def _wrapper(self) -> type[torch.nn.Module]:
        replicas = self

        class DistributedDataParallel(torch.nn.Module):
            """Stands in for PyTorch's, whose reducer refuses fake tensors."""

            def __init__(self, module: Any, device_ids: Any = None, *_: Any, **options: Any) -> None:
                super().__init__()
                self.module = module
                self.device_ids = device_ids
                self.require_backward_grad_sync = True
                group, ranks = replicas.group_of(options)
                self.reducer = replicas.wrap(
                    module, group, ranks,
                    bucket_mib=options.get("bucket_cap_mb"),
                    as_view=bool(options.get("gradient_as_bucket_view")),
                    buffers=bool(options.get("broadcast_buffers", True)),
                )  # fmt: skip

            def forward(self, *args: Any, **kwargs: Any) -> Any:
                self.reducer.before_forward(self.require_backward_grad_sync)
                if self.device_ids:
                    args, kwargs = tree_map(_to_gpu, (args, kwargs))
                return self.module(*args, **kwargs)

            def register_comm_hook(self, *_: Any, **__: Any) -> None:
                place = replicas._recorder.place_of_script()
                raise Refused(f"{place}: `{place.text}`: communication hooks are not synthesized; leave it out")

            @contextlib.contextmanager
            def no_sync(self) -> Iterator[None]:
                before, self.require_backward_grad_sync = self.require_backward_grad_sync, False
                try:
                    yield
                finally:
                    self.require_backward_grad_sync = before

        return DistributedDataParallel

    def group_of(self, options: dict[str, Any]) -> tuple[str, int]:
        """The name and the size of the group that a wrapper is given: all ranks, unless it says otherwise."""
        if self._job.ranks is None:
            raise Refused(f"{self._recorder.place_of_script()}: DistributedDataParallel: {ONE_GPU}")
        for option in NOT_SYNTHESIZED:
            if options.get(option):
                place = self._recorder.place_of_script()
                raise Refused(f"{place}: DistributedDataParallel's {option} is not synthesized; leave it out")
        if options.get("find_unused_parameters"):
            place = self._recorder.place_of_script()
            self._recorder.told[f"find_unused_parameters at {place}: its own small all-reduce is left out"] += 1
        if not self._job.begun:
            raise ValueError(
                "Default process group has not been initialized, please make sure to call init_process_group."
            )
        mesh, group = options.get("device_mesh"), options.get("process_group")
        if mesh is not None:
            group = mesh.get_group()
        return self._job.name_of(group), self._job.ranks if group is None else group.size()


def _to_gpu(argument: Any) -> Any:
    """What DistributedDataParallel does with a forward's arguments where it knows of a device."""
    return argument.to(GPU) if isinstance(argument, torch.Tensor) else argument
