"""A script on several GPUs under DistributedDataParallel: one rank runs, and what the others share with it is known.

A script that wraps its model itself finds a job of so many ranks (``RANK`` and the like, ``torch.distributed``), of
which it is the first; around the model of any other script the reducer is put after its first step.  The reducer is
that of :mod:`sim.workload.ddp`.
"""

from __future__ import annotations

import contextlib
import os
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.modules.module import register_module_forward_pre_hook

from sim.workload.ddp import DataParallel
from sim.workload.script.places import Places
from sim.workload.script.recorder import Owner, Refused, ScriptRecorder

AXIS = "dp"
Put = Callable[[Any, str, Any], None]


class Replicas:
    """The ranks; ``ready`` when the reducer has its buckets in the order of a backward."""

    def __init__(self, ranks: int, recorder: ScriptRecorder, places: Places) -> None:
        self.ranks = ranks
        self.ready = ranks == 1
        self._recorder = recorder
        self._places = places
        self._reducer: DataParallel | None = None
        self._by_script = False
        self._handle: Any = None

    @property
    def groups(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        return {AXIS: (tuple(range(self.ranks)),)} if self.ranks > 1 else {}

    def owners(self) -> dict[int, Owner]:
        """Whose the buckets are."""
        buckets = self._reducer.bucket_tensors if self._reducer is not None else []
        return {t.untyped_storage()._cdata: Owner("communication", "ddp_bucket") for t in buckets}

    def step_ended(self, models: Sequence[Any]) -> None:
        """After the first step there is a model to wrap, after the first backward an order of gradients."""
        if self.ready:
            return
        if self._reducer is None:
            trained = [m for m in models if any(p.requires_grad for p in m.parameters())]
            if len(trained) != 1:
                raise Refused(
                    f"--parallel {AXIS}={self.ranks}: the script calls {len(trained)} models that are trained;"
                    " wrap them in DistributedDataParallel in the script"
                )
            self.wrap(trained[0])
            self._handle = register_module_forward_pre_hook(
                lambda module, args: self.before_forward(True) if module is trained[0] else None
            )
            return
        with self._on_gpu():
            self._reducer.rebuild_buckets()
        self.ready = True

    def wrap(self, model: Any, bucket_mib: float | None = None, as_view: bool = False) -> None:
        """Put the reducer around a model."""
        with self._on_gpu():
            self._reducer = DataParallel(model, AXIS, self.ranks, bucket_mib=bucket_mib, as_view=as_view)
        self._reducer.recorder = self._recorder
        self._recorder.after_backward = self._after_backward

    def before_forward(self, synchronize: bool) -> None:
        if self._reducer is not None:
            self._reducer.before_forward(synchronize)

    def close(self) -> None:
        if self._handle is not None:
            self._handle.remove()

    def _after_backward(self) -> None:
        assert self._reducer is not None
        if not self._reducer.is_complete:
            place = self._recorder.place_of_script()
            raise Refused(
                f"{place}: backward left parameters without a gradient; DistributedDataParallel with unused"
                " parameters is not synthesized"
            )
        self._reducer.after_backward()

    @contextlib.contextmanager
    def _on_gpu(self) -> Iterator[None]:
        with torch._C.DisableTorchFunction(), self._places.asking(True, True):
            yield

    # What a script of several ranks finds ----------------------------------------

    @contextlib.contextmanager
    def environment(self) -> Iterator[None]:
        """As torchrun sets it for the first rank."""
        if self.ranks == 1:
            yield
            return
        ranks = str(self.ranks)
        told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        told |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
        with unittest.mock.patch.dict(os.environ, told):
            yield
        self.close()

    def patch(self, put: Put) -> None:
        """torch.distributed and the wrapper."""
        begun = False

        def begin(*_: Any, **__: Any) -> None:
            nonlocal begun
            begun = True

        answers = {"get_rank": 0, "get_world_size": self.ranks, "get_backend": "nccl", "barrier": None}
        for name, answer in answers.items():
            put(dist, name, lambda *_, _answer=answer, **__: _answer)
        put(torch.cuda, "device_count", lambda: self.ranks)
        put(dist, "is_initialized", lambda: begun)
        put(dist, "init_process_group", begin)
        put(dist, "destroy_process_group", lambda *_: None)
        put(dist, "all_reduce", lambda tensor, *_, **options: self._communicate("all_reduce", tensor, options))
        put(dist, "broadcast", lambda tensor, *_, **options: self._communicate("broadcast", tensor, options))
        wrapper = self._wrapper()
        put(torch.nn.parallel, "DistributedDataParallel", wrapper)
        put(torch.nn.parallel.distributed, "DistributedDataParallel", wrapper)

    def _communicate(self, kind: Any, tensor: torch.Tensor, options: dict[str, Any]) -> Any:
        """A collective of the script's own, waited for where it is not asynchronous."""
        if self._places.on_gpu(tensor) and not self._recorder.stopped:
            index = self._recorder.communicate(kind, tensor, AXIS)
            if options.get("async_op"):
                return _Work(self._recorder, index)
            self._recorder.wait(index)
        return _Work(self._recorder, None) if options.get("async_op") else None

    def _wrapper(self) -> type[torch.nn.Module]:
        replicas = self

        class DistributedDataParallel(torch.nn.Module):
            """Stands in for PyTorch's, whose reducer refuses fake tensors."""

            def __init__(self, module: Any, *_: Any, **options: Any) -> None:
                super().__init__()
                self.module = module
                self.require_backward_grad_sync = True
                as_view = bool(options.get("gradient_as_bucket_view"))
                replicas.wrap(module, options.get("bucket_cap_mb"), as_view)

            def forward(self, *args: Any, **kwargs: Any) -> Any:
                replicas.before_forward(self.require_backward_grad_sync)
                return self.module(*args, **kwargs)

            @contextlib.contextmanager
            def no_sync(self) -> Iterator[None]:
                before, self.require_backward_grad_sync = self.require_backward_grad_sync, False
                try:
                    yield
                finally:
                    self.require_backward_grad_sync = before

        return DistributedDataParallel


class _Work:
    """What an asynchronous collective gives back."""

    def __init__(self, recorder: ScriptRecorder, index: int | None) -> None:
        self._recorder = recorder
        self._index = index

    def wait(self, *_: Any) -> bool:
        if self._index is not None:
            self._recorder.wait(self._index)
        return True
