"""Recorder: writes down what eager PyTorch dispatches under fake tensors, as the operations a CUDA run has.

A TorchDispatchMode sees every aten op after autograd and composite ops are resolved.  Storages are watched through
weak references: when Python or autograd lets the last one go, the block is freed at that place of the program, as
eager execution does.  What costs a device nothing is recorded as a host call only: views, metadata, and tensors that
live on the host, as an optimizer's step counters do.

Two things the autograd engine would do without a dispatch mode are put right here: it adds a second gradient to the
first one in place where nobody else holds that (torch/csrc/autograd/input_buffer.cpp), and never in place while a
mode is active.

Autocast keeps its casts of parameters by address (aten/src/ATen/autocast_mode.cpp, cached_casts) and lets them go in
that order, which is another in each process: here it is the order in which they were made.
"""

from __future__ import annotations

import math
import sys
import unittest.mock
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sim.errors import UserError
from sim.ops import Category, CollectiveKind, TensorMeta, Work
from sim.workload.builder import ProgramBuilder
from sim.workload.foreach import is_foreach, summed
from sim.workload.interrupts import stop_if_asked
from sim.workload.modules import ModuleTracker

# Factories that only allocate, and those that fill what they allocate with one kernel.
EMPTY = frozenset(
    "aten::" + name for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
)
FILLED = frozenset(
    "aten::" + name
    for name in (
        "zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full", "full_like", "new_full", "arange",
        "scalar_tensor", "eye", "linspace", "lift_fresh", "lift_fresh_copy",
    )
)  # fmt: skip
FACTORIES = EMPTY | FILLED
# In-place ops that change what a tensor points at, not the memory it points to.
METADATA = frozenset(
    "aten::" + name
    for name in (
        "set_", "resize_", "detach_", "as_strided_", "squeeze_", "unsqueeze_", "transpose_", "t_", "record_stream",
        "requires_grad_",
    )
)  # fmt: skip
# The collectives of FSDP and of torch.distributed's own calls: in place, and on the current stream unless async.
C10D: dict[str, CollectiveKind] = {
    "c10d::_allgather_base_": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::allreduce_": "all_reduce",
    "c10d::broadcast_": "broadcast",
    "c10d::reduce_": "reduce",
    "c10d::alltoall_base_": "all_to_all",
}
COLLECTIVES: dict[str, CollectiveKind] = {
    "_c10d_functional::all_reduce": "all_reduce",
    "_c10d_functional::all_gather_into_tensor": "all_gather",
    "_c10d_functional::reduce_scatter_tensor": "reduce_scatter",
    "_c10d_functional::all_to_all_single": "all_to_all",
    "_c10d_functional::broadcast": "broadcast",
}
WAIT = "_c10d_functional::wait_tensor"
LIFT = "aten::lift_fresh"
READ_VALUE = "aten::_local_scalar_dense"
NO_BLOCK = -1
NOT_RECORDED = -1
MASKING = "transformers.masking_utils"
SCALER = "torch.amp.grad_scaler"
OPTIMIZERS = "torch.optim."
# What an optimizer reads: the number of a steady step, not the first.
STEADY_STEP = 2.0


class Call(NamedTuple):
    """One dispatched call: the op, its tensors, its arguments."""

    func: Any
    name: str
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Recorder(TorchDispatchMode):
    """Records into a builder.  ``groups`` maps the names of c10d process groups to names of mesh axes.

    ``issued`` is the last collective that torch.distributed's own calls issued, for who waits for it.
    ``training`` tells activations (alive when backward begins) from temporaries and counts the kernels that fill
    what a factory allocates; without it every intermediate is called an activation and fills are left out.
    """

    def __init__(
        self, builder: ProgramBuilder, groups: dict[str, str] | None = None, *, training: bool = False
    ) -> None:
        super().__init__()
        self.builder = builder
        self.stopped = False
        self.modules: ModuleTracker | None = None
        self.handlers: dict[str, Callable[[Call, list[int]], None]] = {}
        self.issued = NOT_RECORDED
        self._training = training
        self._groups = {} if groups is None else groups
        self._block_of: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[Any]] = {}
        self._in_flight: dict[int, int] = {}
        self._next_block = 0
        self._on_host: dict[int, weakref.ref[Any]] = {}
        self._live: set[int] = set()
        self._in_backward = False
        self._forward: list[int] = []
        self._held_back: list[int] | None = None
        clear = partial(self._free_in_order, torch.clear_autocast_cache)
        self._autocast_end = unittest.mock.patch.object(torch, "clear_autocast_cache", clear)
        _alone()

    def __enter__(self) -> Any:
        self._autocast_end.start()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        self._autocast_end.stop()
        super().__exit__(*raised)

    # What is there before the program runs ----------------------------------------

    def adopt(self, tensors: Iterable[tuple[str, torch.Tensor]], category: Category, module: str = "") -> None:
        """Tensors that are there before the program runs: parameters, buffers, inputs; ``module`` is whose they are."""
        self.builder.module = module
        for name, tensor in tensors:
            self._block(tensor, category, name)
        self.builder.module = ""

    def adopt_on_host(self, tensors: Iterable[torch.Tensor]) -> None:
        """Tensors that a CUDA run keeps in the host's memory."""
        for tensor in tensors:
            self._keep_on_host(tensor)

    def block_of(self, tensor: torch.Tensor) -> int | None:
        """The block that holds a tensor, if it is a known one."""
        block = self._block_of.get(tensor.untyped_storage()._cdata, NO_BLOCK)
        return None if block == NO_BLOCK else block

    def categorize(self, tensors: Iterable[torch.Tensor], category: Category) -> None:
        """Say what known tensors turned out to be."""
        for tensor in tensors:
            block = self.block_of(tensor)
            if block is not None:
                self.builder.categorize(block, category)

    # What is not dispatched ----------------------------------------

    def communicate(self, kind: CollectiveKind, tensor: torch.Tensor, group: str) -> int:
        """An in-place collective of a whole tensor that is issued now; what to wait for."""
        block = self._block(tensor, "communication", kind)
        return self.builder.collective(kind, nbytes([tensor]), group, dtype_of(tensor), [block])

    def buffer(self, tensor: torch.Tensor, name: str) -> int:
        """The block of a tensor that is communicated."""
        return self._block(tensor, "communication", name)

    def wait(self, collective: int) -> None:
        """The current stream waits for a collective."""
        self.builder.wait(collective)

    # Dispatch ----------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        stop_if_asked()
        name: str = func._schema.name
        if name.startswith(("prim::", "profiler::")):
            return func(*args, **(kwargs or {}))
        if any(issubclass(t, _dtensor()) for t in types):
            return NotImplemented  # DTensor turns into local ops and collectives, which come back here
        if name == "aten::add" and _engine_adds_in_place(args):
            func, name = torch.ops.aten.add_.Tensor, "aten::add_"
        inputs = list(_tensors((args, kwargs)))
        if name == READ_VALUE:
            return self._value_read(inputs[0])
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        # Waiting gives back the tensor itself, as ProcessGroupNCCL does; its fake implementation would make another.
        result = inputs[0] if name == WAIT else func(*args, **(kwargs or {}))
        outputs = list(_tensors(result))
        fresh = [t for t in outputs if t.untyped_storage()._cdata not in known]
        self._notice(name, inputs, fresh)
        if not self.stopped:
            self._record(Call(func, name, inputs, outputs, args, kwargs or {}), bool(fresh))
        return result

    def _notice(self, name: str, inputs: list[torch.Tensor], fresh: list[torch.Tensor]) -> None:
        """For who follows also what is not recorded: an op made tensors with storages of their own."""

    def _record(self, call: Call, fresh: bool) -> None:
        if self.modules is not None:
            self.builder.module = self.modules.current()
        if self._training:
            self._follow_phase()
        if self._runs_on_host(call):
            self.adopt_on_host(call.outputs)
            self.builder.host(call.name)
            return
        if call.name == LIFT and _asked_by(OPTIMIZERS):
            self.adopt_on_host([*call.inputs, *call.outputs])  # a number for step counters
        # torch.tensor(number): what is lifted is the result itself.
        before = [self._block(t, "unknown", call.name) for t in call.inputs if call.name != LIFT]
        if call.name == WAIT:
            collective = self._in_flight.pop(before[0], None)
            if collective is not None:
                self.builder.wait(collective)
            return
        made: Category = "temporary" if self._training else "activation"
        blocks = [*before, *(self._block(t, made, call.name) for t in call.outputs if not self._is_on_host(t))]
        if call.name in self.handlers:
            self.handlers[call.name](call, blocks)
        elif call.name in COLLECTIVES:
            self._collective(COLLECTIVES[call.name], call, blocks)
        elif call.name in C10D:
            self._in_place_collective(C10D[call.name], call, blocks)
        else:
            self._compute(call, blocks, fresh)

    def _runs_on_host(self, call: Call) -> bool:
        return bool(call.inputs) and self._is_on_host(call.inputs[0])

    def _compute(self, call: Call, blocks: list[int], fresh: bool) -> None:
        if self._training and call.name in FILLED and not call.name.startswith("aten::lift"):
            self.builder.kernel(Work("aten::fill_", tuple(map(meta, call.outputs))), blocks)
        elif call.name in FACTORIES or call.name in METADATA or not (fresh or _writes(call)):
            self.builder.host(call.name, blocks)
        else:
            self.launch(call, blocks)

    def launch(self, call: Call, blocks: Iterable[int]) -> None:
        """One kernel for the op, on the current stream."""
        self.builder.kernel(work_of(call), blocks)

    def _follow_phase(self) -> None:
        """When backward takes over from forward, what forward has left alive is what backward needs."""
        self._in_backward = not torch.is_grad_enabled() and torch._C._current_autograd_node() is not None
        if self._in_backward and self._forward:
            for block in self._forward:
                if block in self._live:
                    self.builder.categorize(block, "activation")
            self._forward.clear()

    def _value_read(self, tensor: torch.Tensor) -> bool | float:
        """``tensor.item()``: the host waits for a copy from the device.  Few questions have an answer without data:
        an optimizer's, of its step number or a norm (some small number); whether gradients overflowed (no); and
        transformers' about the attention mask (yes: a synthesized batch has no padding and one sequence a row)."""
        if self._is_on_host(tensor):
            self.builder.host("aten::item")
            return STEADY_STEP
        frame = asking_frame()
        module = frame.f_globals.get("__name__", "") if frame is not None else ""
        if tensor.dtype == torch.bool and module == MASKING:
            answer: bool | float = True
        elif module == SCALER:
            answer = 0.0
        elif module.startswith(OPTIMIZERS):
            answer = STEADY_STEP
        else:
            where = f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "an unknown place"
            raise UserError(f"{where}: reads the value of a tensor, which a synthesized run does not have")
        if not self.stopped:
            block = self._block(tensor, "unknown", READ_VALUE)
            self.builder.copy("Memcpy DtoH (Device -> Pageable)", "d2h", nbytes([tensor]), [block])
            self.builder.synchronize("cudaStreamSynchronize")
        return answer

    def _collective(self, kind: CollectiveKind, call: Call, blocks: list[int]) -> None:
        first = call.inputs[0]
        if kind == "all_reduce":
            # The functional all-reduce clones its input, then reduces in place.
            self.builder.kernel(Work("aten::clone", (meta(first),), (meta(call.outputs[0]),)), blocks)
        whole = max(nbytes(call.inputs), nbytes(call.outputs))
        index = self.builder.collective(kind, whole, self.group_of(call.args), dtype_of(first), blocks)
        for output in call.outputs:
            self._in_flight[self._block(output, "communication", kind)] = index
        self.categorize(call.outputs, "communication")

    def _in_place_collective(self, kind: CollectiveKind, call: Call, blocks: list[int]) -> None:
        self.categorize(call.inputs, "communication")
        asynchronous = dict(named_arguments(call)).get("async_op", dict(named_arguments(call)).get("asyncOp", True))
        self.issued = self.builder.collective(
            kind, max(map(_size, call.inputs)), self.group_of(call.args), dtype_of(call.inputs[0]), blocks,
            own_stream=bool(asynchronous),
        )  # fmt: skip

    def group_of(self, args: Iterable[Any]) -> str:
        """The mesh axis whose process group, or its name, is among the arguments."""
        return next((self._groups[name] for name in map(_group_name, args) if name in self._groups), "world")

    # Blocks ----------------------------------------

    def _block(self, tensor: torch.Tensor, category: Category, name: str) -> int:
        storage = tensor.untyped_storage()
        key: int = storage._cdata
        if key not in self._block_of:
            self._watched[key] = weakref.ref(storage, partial(self._gone, key))
            self._allocate(key, storage.nbytes(), category, name)
        return self._block_of[key]

    def _allocate(self, key: int, size: int, category: Category, name: str) -> None:
        """A storage without bytes has no block: the allocator is not asked."""
        if not size:
            self._block_of[key] = NO_BLOCK
            return
        block = self._next_block
        self._next_block += 1
        self._block_of[key] = block
        self._live.add(block)
        if category == "temporary" and not self._in_backward:
            self._forward.append(block)
        self.builder.alloc(block, size, category, name)

    def _gone(self, key: int, _reference: Any) -> None:
        self._watched.pop(key, None)
        self._release(self._block_of.pop(key, NO_BLOCK))

    def _release(self, block: int) -> None:
        self._live.discard(block)
        if self._held_back is not None:
            self._held_back.append(block)
        elif block != NO_BLOCK and not self.stopped:
            self.builder.free(block)

    def _free_in_order(self, let_go: Callable[[], None]) -> None:
        """What is let go of all at once is freed in the order in which it was allocated."""
        self._held_back = []
        let_go()
        blocks, self._held_back = self._held_back, None
        for block in sorted(blocks):
            self._release(block)

    def resized(self, storage: Any, name: str, category: Category) -> None:
        """A storage was given up (size 0) or filled again, as FSDP does with unsharded parameters."""
        key: int = storage._cdata
        if key not in self._watched:
            self._watched[key] = weakref.ref(storage, partial(self._gone, key))
        self._release(self._block_of.get(key, NO_BLOCK))
        self._allocate(key, storage.nbytes(), category, name)

    def _keep_on_host(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key: int = storage._cdata
        self._on_host[key] = weakref.ref(storage, lambda _: self._on_host.pop(key, None))

    def _is_on_host(self, tensor: torch.Tensor) -> bool:
        return bool(self._on_host) and tensor.untyped_storage()._cdata in self._on_host


def _writes(call: Call) -> bool:
    """FSDP's copy-in writes an argument and does not say so in its schema."""
    return bool(call.func._schema.is_mutable) or call.name == "fsdp::all_gather_copy_in"


def _asked_by(package: str) -> bool:
    frame = asking_frame()
    return frame is not None and bool(frame.f_globals.get("__name__", "").startswith(package))


def asking_frame() -> FrameType | None:
    """Who reads a value: the innermost frame outside torch and this package, or torch's optimizers and scaler."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith((SCALER, OPTIMIZERS)) or name.partition(".")[0] not in ("torch", "sim"):
            return frame
        frame = frame.f_back
    return None


# What the autograd engine does when no mode is active ----------------------------------------


def _engine_adds_in_place(args: tuple[Any, ...]) -> bool:
    """Whether this ``add`` is the engine summing two gradients of which nobody else holds the first."""
    if torch.is_grad_enabled() or torch._C._current_autograd_node() is None:
        return False
    first, second = args[0], args[1]
    if not isinstance(second, torch.Tensor) or first.shape != second.shape or first.dtype != second.dtype:
        return False
    return _holders(first) == _alone()


def _holders(tensor: torch.Tensor) -> tuple[int, int]:
    """How many references the tensor and its storage have, those of this call included."""
    return tensor._use_count(), torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


@cache
def _alone() -> tuple[int, int]:
    """The counts that a dispatch mode sees of a gradient which only the engine holds, found by having one summed."""
    counts: list[tuple[int, int]] = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.add.Tensor and not torch.is_grad_enabled():
                counts.append(_holders(args[0]))
            return func(*args, **(kwargs or {}))

    with unset_fake_temporarily(), torch.enable_grad():
        x = torch.zeros(1, requires_grad=True)
        total = x.sin() + x.cos()
        with Look():
            total.backward()
    assert len(counts) == 1, f"two gradients are summed once, not {len(counts)} times"
    return counts[0]


def _group_name(argument: Any) -> str:
    if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
        return str(torch.distributed.ProcessGroup.unbox(argument).group_name)
    return argument if isinstance(argument, str) else ""


# Describing tensors ----------------------------------------


@cache
def _dtensor() -> Any:
    from torch.distributed.tensor import DTensor

    return DTensor


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """The bytes of tensors' elements."""
    return sum(t.numel() * t.element_size() for t in tensors)


def _size(tensor: torch.Tensor) -> int:
    return nbytes([tensor])


def dtype_of(tensor: torch.Tensor) -> str:
    """torch's name of a tensor's dtype, without ``torch.``."""
    return str(tensor.dtype).removeprefix("torch.")


def meta(tensor: torch.Tensor) -> TensorMeta:
    """Shape, dtype and, where it is not contiguous, strides of a tensor."""
    stride = None if tensor.is_contiguous() else tuple(tensor.stride())
    return TensorMeta(dtype_of(tensor), tuple(tensor.shape), stride)


def named_arguments(call: Call) -> list[tuple[str, Any]]:
    """The arguments of a call with their names."""
    arguments = call.func._schema.arguments
    return [(a.name, v) for a, v in zip(arguments, call.args, strict=False)] + sorted(call.kwargs.items())


def work_of(call: Call) -> Work:
    """The op, its tensors and its scalar arguments; an op over lists of tensors is summed up.

    What an op writes is its outputs, whether it returns them or changes arguments in place.
    """
    arguments = call.func._schema.arguments
    named = named_arguments(call)
    changed = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}
    written = {a.name for a in arguments if a.is_out}  # given as out=: not read
    if call.name == "fsdp::all_gather_copy_in":
        # Only this rank's part of the output, which is the first result, is written; nothing of it is read.
        return summed(call.name, named, call.outputs[:1], ("all_gather_output",))
    outputs = call.outputs or list(_tensors([value for key, value in named if key in changed]))
    if is_foreach(call.name):
        return summed(call.name, named, outputs, written)
    scalars = tuple((key, _writable(value)) for key, value in named if isinstance(value, bool | int | float | str))
    read = _tensors([value for key, value in named if key not in written])
    return Work(call.name, tuple(map(meta, read)), tuple(map(meta, outputs)), scalars)


def _writable(value: bool | int | float | str) -> bool | int | float | str:
    """JSON has no infinity and no not-a-number: these are written as words."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
