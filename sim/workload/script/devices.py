"""GpuFace: what a script sees of devices.  It asks for ``cuda`` and is told ``cuda``; fake CPU tensors do the work.

A function mode takes device arguments out of calls and remembers where the result belongs
(:mod:`sim.workload.script.places`); what asks a tensor for its device, or for its values, is answered here too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_leaves

from sim.workload.cuda_choices import CudaChoices
from sim.workload.script.places import Places
from sim.workload.script.recorder import Refused, ScriptRecorder
from sim.workload.script.streams import ScriptDevice

HOST, GPU = torch.device("cpu"), torch.device("cuda", 0)
# Recurrent layers are cuDNN's own kernels on a GPU.
RECURRENT = tuple(getattr(torch, name) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu"))


class GpuFace(CudaChoices):
    """``recorder`` is asked for values, ``streams`` are the GPU's; what CUDA computes otherwise than a CPU is the base
    class' matter."""

    def __init__(self, places: Places, recorder: ScriptRecorder) -> None:
        super().__init__()
        self.places = places
        self.recorder = recorder
        self.streams = ScriptDevice(recorder)
        self._constructors = _device_constructors()
        tensor = torch.Tensor
        answers: dict[Any, Callable[..., Any]] = {
            tensor.device.__get__: self._device,
            tensor.is_cuda.__get__: self.places.on_gpu,
            tensor.is_cpu.__get__: lambda t: not self.places.on_gpu(t),
            tensor.get_device: lambda t: 0 if self.places.on_gpu(t) else -1,
            tensor.to: self._to,
            tensor.cuda: lambda t, device=None, non_blocking=False, **_: self._to(t, GPU, non_blocking=non_blocking),
            tensor.cpu: lambda t, **_: self._to(t, HOST),
            tensor.pin_memory: self._pin,
            tensor.is_pinned: lambda t, *_: self.places.is_pinned(t),
            tensor.tolist: lambda t: self.recorder.read(t, lambda values: values.tolist()),
            tensor.numpy: lambda t, **_: self._numpy(t),
            tensor.__array__: lambda t, *args, **_: self._numpy(t).__array__(*args),
            tensor.__deepcopy__: self._copied,
            tensor.__repr__: self._shown,
            tensor.__format__: self._formatted,
        }
        self._answers = answers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        answer = self._answers.get(func)
        if answer is not None:
            return answer(*args, **kwargs)
        if func in RECURRENT:
            self.recorder.told["a recurrent layer is recorded as the ops of a CPU, not as cuDNN's kernels"] += 1
        asked = self._asked(func, kwargs)
        pinned = bool(kwargs.pop("pin_memory", False))
        around = any(self.places.on_gpu(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
        with self.places.asking(asked, around):
            result = super().__torch_function__(func, types, args, kwargs)
        if pinned:
            self.places.pin([result])
        return result

    def _asked(self, func: Any, kwargs: dict[str, Any]) -> bool | None:
        """Where the result of a call is to be, of which the call itself no longer says so."""
        device = kwargs.get("device")
        if device is None:
            return True if self.places.default_is_gpu and func in self._constructors else None
        device = device_of(device)
        if device.type not in ("cpu", "cuda"):
            return None
        kwargs["device"] = HOST
        self._is_first(device)
        return bool(device.type == "cuda")

    def _is_first(self, device: torch.device) -> None:
        if device.type == "cuda" and device.index:
            place = self.recorder.place_of_script()
            raise Refused(
                f"{place}: `{place.text}` asks for {device}: a script of one GPU is synthesized, which is cuda:0"
            )

    def _device(self, tensor: torch.Tensor) -> torch.device:
        if self.places.on_gpu(tensor):
            return GPU
        device: torch.device = torch.Tensor.device.__get__(tensor)
        return device

    def _to(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        copy = kwargs.pop("copy", False)
        if len(args) > 1 and isinstance(args[-1], bool) and isinstance(args[-2], bool):
            *args, copy = args  # type: ignore[assignment]
        other = args[0] if args and isinstance(args[0], torch.Tensor) else kwargs.pop("other", None)
        if other is not None:
            device, dtype, rest = self._device(other), other.dtype, args[1:]
            non_blocking, layout = (
                bool(rest and rest[0]) or bool(kwargs.get("non_blocking")),
                kwargs.get("memory_format"),
            )
        else:
            device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None:
            self._is_first(device)
        options = {"copy": copy, "non_blocking": non_blocking}
        if layout is not None:
            options["memory_format"] = layout
        if device is None or device.type not in ("cpu", "cuda") or tensor.is_meta:
            where = {} if device is None else {"device": device}
            return tensor.to(dtype=dtype or tensor.dtype, **where, **options)
        moves = (device.type == "cuda") != self.places.on_gpu(tensor)
        with self.places.asking(device.type == "cuda" if moves else None, self.places.on_gpu(tensor)):
            return tensor.to(dtype=dtype or tensor.dtype, **{**options, "copy": copy or moves})

    def _pin(self, tensor: torch.Tensor, *_: Any) -> torch.Tensor:
        if self.places.is_pinned(tensor):
            return tensor
        pinned = tensor.clone()
        self.places.pin([pinned])
        return pinned

    def _copied(self, tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
        """As Tensor.__deepcopy__, which would ask a fake tensor for the address of its data."""
        if id(tensor) not in memo:
            if not tensor.is_leaf:
                raise RuntimeError("Only Tensors created explicitly by the user support the deepcopy protocol")
            with torch.no_grad():
                copy = tensor.detach().clone()
            if isinstance(tensor, torch.nn.Parameter):
                copy = torch.nn.Parameter(copy, tensor.requires_grad)
            else:
                copy.requires_grad_(tensor.requires_grad)
            if tensor.grad is not None:
                copy.grad = self._copied(tensor.grad, memo)
            memo[id(tensor)] = copy
        found: torch.Tensor = memo[id(tensor)]
        return found

    def _numpy(self, tensor: torch.Tensor) -> Any:
        if self.places.on_gpu(tensor) and self.places.gpu_named:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        return self.recorder.read(tensor, lambda values: values.detach().numpy())

    def _shown(self, tensor: torch.Tensor, **_: Any) -> str:
        values: str = self.recorder.read(tensor, repr)
        return f"{values[:-1]}, device='cuda:0')" if self.places.on_gpu(tensor) else values

    def _formatted(self, tensor: torch.Tensor, spec: str) -> str:
        if tensor.dim():
            return format(self._shown(tensor), spec)
        return str(self.recorder.read(tensor, lambda value: format(value.item(), spec)))


def device_of(device: Any) -> torch.device:
    """A device as a script names it: ``0``, ``cuda``, ``cuda:0``, or a torch.device."""
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def as_device(argument: Any) -> Any:
    """An argument of ``to``: a number is a GPU's, which PyTorch looks for an accelerator to understand."""
    return device_of(argument) if isinstance(argument, int) and not isinstance(argument, bool) else argument


def devices(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same for arguments by name."""
    return {k: device_of(v) if k == "device" and v is not None else v for k, v in kwargs.items()}
