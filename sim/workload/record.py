"""Recorder: writes down what eager PyTorch dispatches under fake tensors, as the operations a CUDA run has.

A TorchDispatchMode sees every aten op after autograd and composite ops are resolved.  Storages are watched through
weak references: when Python lets the last one go, the block is freed at that place of the program, as eager
execution does.  What costs a device nothing is recorded as a host call only: views, metadata, factories.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.module_tracker import ModuleTracker

from sim.errors import UserError
from sim.ops import Category, CollectiveKind, TensorMeta, Work
from sim.workload.builder import ProgramBuilder

# Factories fill memory with constants: their small fill kernels are left out (docs/synth.md).
FACTORIES = frozenset(
    "aten::" + name
    for name in (
        "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "zeros", "zeros_like", "new_zeros",
        "ones", "ones_like", "new_ones", "full", "full_like", "new_full", "arange", "scalar_tensor", "eye", "linspace",
        "lift_fresh", "lift_fresh_copy",
    )
)  # fmt: skip
COLLECTIVES: dict[str, CollectiveKind] = {
    "_c10d_functional::all_reduce": "all_reduce",
    "_c10d_functional::all_gather_into_tensor": "all_gather",
    "_c10d_functional::reduce_scatter_tensor": "reduce_scatter",
    "_c10d_functional::all_to_all_single": "all_to_all",
    "_c10d_functional::broadcast": "broadcast",
}
WAIT = "_c10d_functional::wait_tensor"
READ_VALUE = "aten::_local_scalar_dense"
MASKING = "transformers.masking_utils"


class _Call(NamedTuple):
    """One dispatched call: the op, its tensors, its arguments."""

    func: Any
    name: str
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Recorder(TorchDispatchMode):
    """Records into a builder.  ``groups`` maps the names of c10d process groups to names of mesh axes."""

    def __init__(self, builder: ProgramBuilder, groups: dict[str, str] | None = None) -> None:
        super().__init__()
        self.builder = builder
        self.stopped = False
        self.modules: ModuleTracker | None = None
        self._groups = groups or {}
        self._block_of: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[Any]] = {}
        self._in_flight: dict[int, int] = {}
        self._next_block = 0

    def adopt(self, tensors: Iterable[tuple[str, torch.Tensor]], category: Category) -> None:
        """Tensors that are there before the program runs: parameters, buffers, inputs."""
        for name, tensor in tensors:
            self._block(tensor, category, name)

    def block_of(self, tensor: torch.Tensor) -> int | None:
        """The block that holds a tensor, if it is a known one."""
        return self._block_of.get(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from torch.distributed.tensor import DTensor

        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # DTensor turns into local ops and collectives, which come back here
        name: str = func._schema.name
        inputs = list(_tensors((args, kwargs)))
        if name == READ_VALUE:
            return self._value_read(inputs[0])
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        # Waiting gives back the tensor itself, as ProcessGroupNCCL does; its fake implementation would make another.
        result = inputs[0] if name == WAIT else func(*args, **(kwargs or {}))
        if not self.stopped and not name.startswith("prim"):
            outputs = list(_tensors(result))
            fresh = any(t.untyped_storage()._cdata not in known for t in outputs)
            self._record(_Call(func, name, inputs, outputs, args, kwargs or {}), fresh)
        return result

    def _record(self, call: _Call, fresh: bool) -> None:
        if self.modules is not None:
            self.builder.module = max(self.modules.parents, key=len)
        before = [self._block(t, "unknown", call.name) for t in call.inputs]
        if call.name == WAIT:
            collective = self._in_flight.pop(before[0], None)
            if collective is not None:
                self.builder.wait(collective)
            return
        blocks = [*before, *(self._block(t, "activation", call.name) for t in call.outputs)]
        if call.name in COLLECTIVES:
            self._collective(COLLECTIVES[call.name], call, blocks)
        elif call.name in FACTORIES or not call.outputs or (not fresh and not call.func._schema.is_mutable):
            self.builder.host(call.name, blocks)
        else:
            self.builder.kernel(_work(call), blocks)

    def _value_read(self, tensor: torch.Tensor) -> bool:
        """``bool(tensor)``: the host waits for a copy from the device.  Only transformers' questions about the
        attention mask have an answer: a synthesized batch has no padding and one sequence a row, so it is yes."""
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "sim"):
            frame = frame.f_back
        if tensor.dtype != torch.bool or frame is None or frame.f_globals.get("__name__") != MASKING:
            where = f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "an unknown place"
            raise UserError(f"{where}: reads the value of a tensor, which a synthesized run does not have")
        block = self._block(tensor, "unknown", READ_VALUE)
        self.builder.copy("Memcpy DtoH (Device -> Pageable)", "d2h", _nbytes([tensor]), [block])
        self.builder.synchronize("cudaStreamSynchronize")
        return True

    def _collective(self, kind: CollectiveKind, call: _Call, blocks: list[int]) -> None:
        group = next((self._groups[a] for a in call.args if isinstance(a, str) and a in self._groups), "world")
        first = call.inputs[0]
        if kind == "all_reduce":
            # The functional all-reduce clones its input, then reduces in place.
            self.builder.kernel(Work("aten::clone", (_meta(first),), (_meta(call.outputs[0]),)), blocks)
        whole = max(_nbytes(call.inputs), _nbytes(call.outputs))
        index = self.builder.collective(kind, whole, group, _dtype(first), blocks)
        for output in call.outputs:
            self._in_flight[self._block(output, "communication", kind)] = index

    def _block(self, tensor: torch.Tensor, category: Category, name: str) -> int:
        storage = tensor.untyped_storage()
        key: int = storage._cdata
        if key not in self._block_of:
            block = self._next_block
            self._next_block += 1
            self._block_of[key] = block
            self._watched[block] = weakref.ref(storage, partial(self._gone, key, block))
            self.builder.alloc(block, storage.nbytes(), category, name)
        return self._block_of[key]

    def _gone(self, key: int, block: int, _reference: Any) -> None:
        self._block_of.pop(key, None)
        self._watched.pop(block, None)
        if not self.stopped:
            self.builder.free(block)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _nbytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _meta(tensor: torch.Tensor) -> TensorMeta:
    stride = None if tensor.is_contiguous() else tuple(tensor.stride())
    return TensorMeta(_dtype(tensor), tuple(tensor.shape), stride)


def _work(call: _Call) -> Work:
    arguments = call.func._schema.arguments
    named = [(a.name, v) for a, v in zip(arguments, call.args, strict=False)] + sorted(call.kwargs.items())
    scalars = tuple((key, value) for key, value in named if isinstance(value, bool | int | float | str))
    return Work(call.name, tuple(map(_meta, call.inputs)), tuple(map(_meta, call.outputs)), scalars)
