"""ScriptRecorder: follows a script from its first tensor on, and writes down the step that is asked for.

Until then it watches: which storages live, where they are, and which values the script itself knows, because it made
them from numbers on the host.  Reading any other value ends the run, or is answered where an answer was given.
"""

from __future__ import annotations

import contextlib
import linecache
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from sim.ops import Category, CollectiveKind
from sim.workload.builder import ProgramBuilder
from sim.workload.record import (
    FACTORIES,
    FILLED,
    MASKING,
    NO_BLOCK,
    NOT_RECORDED,
    OPTIMIZERS,
    READ_VALUE,
    SCALER,
    STEADY_STEP,
    Call,
    Recorder,
    asking_frame,
    named_arguments,
    nbytes,
)
from sim.workload.script.places import Places, held

COPIES = ("aten::_to_copy", "aten::lift_fresh", "aten::lift_fresh_copy")
# Ops that take tensors of the host beside the GPU's on a real GPU too: copies, indices, moves of what a tensor is.
MIXING = (*COPIES, "aten::copy_", "aten::index", "aten::index_put", "aten::index_put_", "aten::set_")
RANDOM = frozenset("aten::" + name for name in ("rand", "randn", "randint", "randperm"))
# What a script makes so, outside of its modules, is its data.
GIVEN = RANDOM | FACTORIES
# The name of a process group of which not all ranks have an instance.
PARTIAL = ""
# Larger tensors are hardly looked into: so many integers, or other numbers, are computed where the host makes them.
KNOWN_INTEGERS, KNOWN_NUMBERS = 1 << 20, 1 << 12
FIRST_SCALE = 65536.0
# Of torch.optim: what reads a loss, or how often it was called, and does one thing or another by it.
DECIDING = tuple(OPTIMIZERS + name for name in ("lbfgs", "lr_scheduler", "swa_utils"))


class Refused(BaseException):
    """The script does what fake tensors cannot: no ``except Exception`` of the script's catches it."""


class Place(NamedTuple):
    """A line of the script."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}"

    @property
    def text(self) -> str:
        return linecache.getline(self.file, self.line).strip()


class Owner(NamedTuple):
    """What a tensor that is there when the step begins is to the script."""

    category: Category
    name: str
    module: str = ""


class Ends(NamedTuple):
    """A copy's two tensors."""

    source: torch.Tensor
    target: torch.Tensor


class ScriptRecorder(Recorder):
    """``fake`` is the mode below this one; ``told`` counts what the graph's warnings are to say; ``groups`` maps the
    names of c10d process groups to those of the graph, as they are made."""

    def __init__(self, script: Path, fake: FakeTensorMode, places: Places, assume: float | None) -> None:
        self.groups: dict[str, str] = {}
        super().__init__(ProgramBuilder(), self.groups, training=True)
        self.stopped = True
        self.told: Counter[str] = Counter()
        self.after_backward: Callable[[], None] = lambda: None
        self._script = script
        self._folder = str(script.resolve().parent) + "/"
        self._fake = fake
        self._places = places
        self._assume = assume
        self._seen: dict[int, weakref.ref[Any]] = {}
        self._given: dict[int, Owner] = {}
        self._parameters: Sequence[Any] = ()

    # Watching ----------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunction():  # what fake tensors do inside is not the script's doing
            known = self._computed(func, args, kwargs or {})
            if known is None:
                return super().__torch_dispatch__(func, types, args, kwargs)
            self._notice(func._schema.name, [], [known])
            if not self.stopped:
                self._record(Call(func, func._schema.name, [], [known], args, kwargs or {}), True)
            return known

    def _computed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
        """A small tensor that the script makes on the host from numbers, with its values."""
        name: str = func._schema.name
        if (name not in FILLED and name not in RANDOM) or self._places.moving or any(map(torch.is_tensor, args)):
            return None
        shape = func(*args, **kwargs)
        if shape.device.type != "cpu" or shape.numel() > (
            KNOWN_NUMBERS if shape.is_floating_point() else KNOWN_INTEGERS
        ):
            return None
        with unset_fake_temporarily():
            real = func(*args, **kwargs)
        tensor: torch.Tensor = self._fake.fake_tensor_converter.from_real_tensor(self._fake, real, make_constant=True)
        return tensor

    def _notice(self, name: str, inputs: list[torch.Tensor], fresh: list[torch.Tensor]) -> None:
        self._places.place(inputs, fresh)
        if name not in MIXING and self._places.are_mixed(inputs):
            self.told[f"{name} at {self.place_of_script()} takes tensors of the host and of the GPU"] += 1
        for tensor in fresh:
            storage = tensor.untyped_storage()
            key: int = storage._cdata
            self._seen[key] = weakref.ref(storage, partial(self._forget, key))
            if (name in COPIES and not self._places.on_gpu(inputs[0])) or (not inputs and name in GIVEN):
                frame = asking_frame()
                of_scaler = frame is not None and frame.f_globals.get("__name__") == SCALER
                self._given[key] = Owner("optimizer", "loss_scale") if of_scaler else Owner("input", name)

    def _forget(self, key: int, _reference: Any) -> None:
        self._seen.pop(key, None)
        self._given.pop(key, None)

    # The step ----------------------------------------

    def begin(self, builder: ProgramBuilder, owners: Mapping[int, Owner], parameters: Sequence[Any]) -> None:
        """Write down from here on; what lives now was there before, in the order in which it was made."""
        self.builder = builder
        self._parameters = parameters
        for key, reference in list(self._seen.items()):
            storage = reference()
            if storage is None or not self._places.holds(key):
                continue
            self._watched[key] = weakref.ref(storage, partial(self._gone, key))
            owner = owners.get(key) or self._given.get(key) or Owner("temporary", "from before")
            self.builder.module = owner.module
            self._allocate(key, storage.nbytes(), owner.category, owner.name)
        self.builder.module = ""
        self._forward.clear()
        self.stopped = False

    @contextlib.contextmanager
    def backward(self) -> Iterator[None]:
        """Backward runs: on the engine's thread; what it leaves in ``grad`` are gradients."""
        if self.stopped:
            yield
            self.after_backward()
            return
        with self.builder.autograd_thread():
            yield
            self.after_backward()
        self.categorize((held(p.grad) for p in self._parameters if p.grad is not None), "gradient")

    def communicate(self, kind: CollectiveKind, tensor: torch.Tensor, group: str) -> int:
        return NOT_RECORDED if self.stopped else super().communicate(kind, tensor, group)

    def wait(self, collective: int) -> None:
        if collective != NOT_RECORDED and not self.stopped:
            super().wait(collective)

    def group_of(self, args: Iterable[Any]) -> str:
        name = super().group_of(args)
        if name == PARTIAL:
            place = self.place_of_script()
            raise Refused(
                f"{place}: `{place.text}` communicates in a group that not every rank has one like: let every rank make"
                " the groups of all, as in init_device_mesh"
            )
        return name

    def resized(self, storage: Any, name: str, category: Category) -> None:
        if self._places.holds(storage._cdata):
            super().resized(storage, name, category)

    def adopt_on_host(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            self._places.keep_on_host(tensor)

    def _is_on_host(self, tensor: torch.Tensor) -> bool:
        return not self._places.on_gpu(tensor)

    def _runs_on_host(self, call: Call) -> bool:
        return not any(map(self._places.on_gpu, (*call.inputs, *call.outputs)))

    def _block(self, tensor: torch.Tensor, category: Category, name: str) -> int:
        if not self._places.on_gpu(tensor):
            return NO_BLOCK
        # What comes from outside of the modes is what a loader has loaded.
        return super()._block(tensor, "input" if category == "unknown" else category, name)

    def _compute(self, call: Call, blocks: list[int], fresh: bool) -> None:
        ends = _ends(call)
        if ends is None or self._places.on_gpu(ends.source) == self._places.on_gpu(ends.target):
            super()._compute(call, blocks, fresh)
        else:
            self._move(ends, bool(dict(named_arguments(call)).get("non_blocking", False)), blocks)

    def _move(self, ends: Ends, non_blocking: bool, blocks: list[int]) -> None:
        """Between host and GPU.  The call returns when the copy is done, unless it was asked not to wait and the
        host's memory is pinned, as a copy to the host that need not be waited for makes it (at::native::_to_copy)."""
        to_gpu = self._places.on_gpu(ends.target)
        host = ends.source if to_gpu else ends.target
        if non_blocking and not to_gpu:
            self._places.pin([host])
        pinned = self._places.is_pinned(host)
        memory = "Pinned" if pinned else "Pageable"
        name = f"Memcpy HtoD ({memory} -> Device)" if to_gpu else f"Memcpy DtoH (Device -> {memory})"
        if to_gpu:
            self._is_input(ends.target)
        self.builder.copy(name, "h2d" if to_gpu else "d2h", nbytes([ends.target]), [b for b in blocks if b != NO_BLOCK])
        if not (non_blocking and pinned):
            self.builder.synchronize("cudaStreamSynchronize")

    def _is_input(self, tensor: torch.Tensor) -> None:
        block = self.block_of(tensor)
        if block in self._forward:
            self._forward.remove(block)
            self.builder.categorize(block, "input")

    # Values ----------------------------------------

    def _value_read(self, tensor: torch.Tensor) -> bool | float:
        frame = asking_frame()
        module = frame.f_globals.get("__name__", "") if frame is not None else ""
        if module.startswith(OPTIMIZERS) and module not in DECIDING:
            answer: bool | float = STEADY_STEP
        elif module == SCALER:
            answer = FIRST_SCALE if frame is not None and frame.f_code.co_name == "get_scale" else 0.0
        else:
            with outside():
                answer = self._values_of(tensor, masking=module == MASKING).item()
        self._waited_for(tensor)
        return answer

    def _values_of(self, tensor: torch.Tensor, *, masking: bool = False) -> torch.Tensor:
        """A tensor's values, in a real tensor: what the script made from numbers, or what reads are answered with.

        transformers asks whether a mask masks anything: no, as in :meth:`Recorder._value_read`.
        """
        known = tensor.constant if isinstance(tensor, FakeTensor) else tensor
        if known is not None:
            return known
        if masking and tensor.dtype == torch.bool:
            answer: float | None = True
        else:
            answer = self._answer()
        return torch.full(tuple(tensor.shape), answer, dtype=tensor.dtype)

    def _answer(self) -> float:
        place = self.place_of_script()
        if self._assume is None:
            raise Refused(
                f"{place}: `{place.text}` reads the value of a tensor, which a run without data does not have; leave"
                " it out, or answer such reads with a number, as in --assume-value 0"
            )
        self.told[f"values read at {place} were answered with {self._assume:g}"] += 1
        return self._assume

    def read(self, tensor: torch.Tensor, use: Callable[[torch.Tensor], Any]) -> Any:
        """What ``use`` makes of all values of a tensor, as ``tolist`` and ``numpy`` do."""
        with outside():
            answer = use(self._values_of(tensor))
        self._waited_for(tensor)
        return answer

    def _waited_for(self, tensor: torch.Tensor) -> None:
        """The host has waited for a copy of the values, where they were on the GPU."""
        if self.stopped:
            return
        if not self._places.on_gpu(tensor):
            self.builder.host("aten::item")
            return
        block = self._block(tensor, "unknown", READ_VALUE)
        self.builder.copy("Memcpy DtoH (Device -> Pageable)", "d2h", nbytes([tensor]), [block])
        self.builder.synchronize("cudaStreamSynchronize")

    def place_of_script(self) -> Place:
        """The line of the script that is being run: its own file's, or one of a file beside it."""
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if self.is_scripts(frame.f_code.co_filename):
                return Place(frame.f_code.co_filename, frame.f_lineno)
            frame = frame.f_back
        return Place(str(self._script), 0)

    def is_scripts(self, file: str) -> bool:
        return file == str(self._script) or (file.startswith(self._folder) and "site-packages" not in file)


@contextlib.contextmanager
def outside() -> Iterator[None]:
    """What is done really, on real tensors."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


def _ends(call: Call) -> Ends | None:
    if call.name == "aten::copy_":
        return Ends(call.inputs[1], call.inputs[0]) if len(call.inputs) == 2 else None
    return Ends(call.inputs[0], call.outputs[0]) if call.name in COPIES else None
