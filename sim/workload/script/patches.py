"""What of PyTorch is answered otherwise while a script runs, beyond single tensors; all of it is put back afterwards.

``torch.cuda`` says that there is one GPU; autocast for it is the CPU's with CUDA's lists
(:mod:`sim.workload.cuda_choices`); optimizers choose the implementation they choose for CUDA parameters; data loaders
load in this process, really; profilers record nothing.
"""

from __future__ import annotations

import contextlib
import copyreg
import sys
import types
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch._subclasses import fake_tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils import checkpoint

from sim.workload.script.devices import GPU, GpuFace, as_device, device_of, devices
from sim.workload.script.loading import load_here
from sim.workload.script.recorder import KNOWN_INTEGERS, Refused

GIB = 2**30
# A stand-in for the GPU's properties, for scripts that ask; that they were asked is told.
CAPABILITY = (8, 0)
PROPERTIES = types.SimpleNamespace(
    name="a GPU that tracesim stands in for", major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=80 * GIB,
    multi_processor_count=108, warp_size=32, is_integrated=False, is_multi_gpu_board=False, gcnArchName="",
)  # fmt: skip
# Functions of torch.cuda with one plain answer, and those of which it is told that they had a stand-in.
PLAIN: dict[str, Any] = {
    "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "init": None,
    "_lazy_init": None, "set_device": None, "is_bf16_supported": True, "is_tf32_supported": True,
    "empty_cache": None, "ipc_collect": None, "is_current_stream_capturing": False, "manual_seed": None,
    "manual_seed_all": None, "seed": None, "seed_all": None, "reset_peak_memory_stats": None,
    "reset_accumulated_memory_stats": None, "set_per_process_memory_fraction": None,
    "set_rng_state": None, "set_rng_state_all": None, "initial_seed": 0, "get_rng_state_all": [],
    "get_arch_list": [f"sm_{CAPABILITY[0]}{CAPABILITY[1]}"],
}  # fmt: skip
STAND_INS: dict[str, Any] = {
    "get_device_name": PROPERTIES.name, "get_device_capability": CAPABILITY, "get_device_properties": PROPERTIES,
    "memory_allocated": 0, "max_memory_allocated": 0, "memory_reserved": 0, "max_memory_reserved": 0,
    "mem_get_info": (PROPERTIES.total_memory, PROPERTIES.total_memory), "memory_stats": dict,
    "memory_summary": "", "utilization": 0,
}  # fmt: skip

Put = Callable[[Any, str, Any], None]


class Patching(Protocol):
    """Who replaces a part of PyTorch, each by one call."""

    def patch(self, put: Put) -> None: ...


@contextlib.contextmanager
def as_on_a_gpu(face: GpuFace, several: Sequence[Patching]) -> Iterator[None]:
    """PyTorch as a script on one GPU finds it; ``several`` replace what concerns more than one."""
    with contextlib.ExitStack() as stack:

        def put(place: Any, name: str, value: Any) -> None:
            if hasattr(place, name):
                stack.enter_context(unittest.mock.patch.object(place, name, value))

        for patch in (
            _cuda,
            _autocast,
            _backward,
            _optimizers,
            _modules,
            load_here,
            _profilers,
            _files,
            _generators,
            _refusals,
        ):
            patch(face, put)
        for patching in several:
            patching.patch(put)
        yield


def _cuda(face: GpuFace, put: Put) -> None:
    device, cuda = face.streams, torch.cuda

    def asked(what: str, answer: Any) -> Callable[..., Any]:
        def told(*_: Any, **__: Any) -> Any:
            place = face.recorder.place_of_script()
            if place.line:
                face.recorder.told[f"torch.cuda.{what} at {place} was answered with a stand-in"] += 1
            return answer() if callable(answer) else answer

        return told

    for name, answer in PLAIN.items():
        put(cuda, name, _constant(answer))
    for name, answer in STAND_INS.items():
        put(cuda, name, asked(name, answer))
    put(cuda, "get_rng_state", lambda *_: torch.get_rng_state())
    for name in ("_record_memory_history", "_dump_snapshot", "_snapshot"):
        put(cuda.memory, name, asked(f"memory.{name}", None))
    put(cuda, "synchronize", device.synchronize)
    for name, kind in zip(("Stream", "Event"), device.classes(), strict=True):
        put(cuda, name, kind)
    for name in ("current_stream", "default_stream", "stream", "set_stream"):
        put(cuda, name, getattr(device, name))
    put(torch.Tensor, "record_stream", lambda tensor, stream: device.record_use())
    put(cuda, "device", lambda *_: contextlib.nullcontext())
    _accelerator(face, put)
    for name in ("range_push", "range_pop", "mark", "range_start", "range_end"):
        put(cuda.nvtx, name, _constant(0))


def _accelerator(face: GpuFace, put: Put) -> None:
    """``torch.accelerator``: the same GPU, by the names that it has for any maker's."""
    accelerator = torch.accelerator
    for name in ("synchronize", "current_stream", "set_stream", *PLAIN, *STAND_INS):
        put(accelerator, name, getattr(torch.cuda, name, None))
    for name, answer in (("current_device_index", 0), ("current_device_idx", 0), ("set_device_index", None)):
        put(accelerator, name, _constant(answer))
    put(accelerator, "set_device_idx", _constant(None))
    put(accelerator, "current_accelerator", _constant(torch.device("cuda")))
    put(accelerator, "device_index", lambda *_: contextlib.nullcontext())
    put(torch._C, "_get_accelerator", _constant(torch.device("cuda")))


def _constant(answer: Any) -> Callable[..., Any]:
    return lambda *_, **__: answer


def _autocast(face: GpuFace, put: Put) -> None:
    make = torch.amp.autocast_mode.autocast.__init__

    def init(
        self: Any, device_type: Any, dtype: Any = None, enabled: bool = True, cache_enabled: bool | None = None
    ) -> None:
        if device_type == "cuda":
            device_type, dtype = "cpu", dtype or torch.float16
        make(self, device_type, dtype, enabled, cache_enabled)

    put(torch.amp.autocast_mode.autocast, "__init__", init)
    for name in ("is_autocast_enabled", "get_autocast_dtype", "set_autocast_enabled", "set_autocast_dtype"):
        put(torch, name, _for_the_gpu(getattr(torch, name)))
    put(torch, "get_autocast_gpu_dtype", lambda: torch.get_autocast_dtype("cpu"))


def _for_the_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of autocast's state, of which one device's is kept: the GPU's, as the CPU's."""

    def answer(device_type: Any = "cuda", *args: Any) -> Any:
        if isinstance(device_type, bool):  # set_autocast_enabled(True) is the GPU's
            device_type, args = "cuda", (device_type,)
        return function("cpu" if device_type == "cuda" else device_type, *args)

    return answer


def _backward(face: GpuFace, put: Put) -> None:
    run = torch.autograd.graph._engine_run_backward

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        """On the engine's own thread; recomputation in it makes a GPU's choices too."""
        with contextlib.ExitStack() as stack:
            if face not in _get_current_function_mode_stack():
                stack.enter_context(face)
            if torch._C._current_graph_task_id() == -1:
                stack.enter_context(face.recorder.backward())
            return run(*args, **kwargs)

    put(torch.autograd.graph, "_engine_run_backward", run_backward)
    put(torch.autograd, "_engine_run_backward", run_backward)


def _optimizers(face: GpuFace, put: Put) -> None:
    """Fake parameters are of a class of their own, which the choice of an implementation does not know."""
    import torch.distributed.tensor  # adds its own class to the list when it is first imported
    from torch.optim import optimizer
    from torch.utils import _foreach_utils

    put(optimizer, "_foreach_supported_types", [*optimizer._foreach_supported_types, fake_tensor.FakeTensor])
    kinds = [*_foreach_utils._foreach_supported_types, torch.nn.Parameter, fake_tensor.FakeTensor]
    put(_foreach_utils, "_foreach_supported_types", kinds)
    group = torch._C._group_tensors_by_device_and_dtype

    def grouped(lists: Any, with_indices: bool = False) -> Any:
        found = group(lists, with_indices)
        return {
            (GPU if device.type == "cpu" and face.places.on_gpu(tensors[0][0][0]) else device, dtype): tensors
            for (device, dtype), tensors in found.items()
        }

    put(torch._C, "_group_tensors_by_device_and_dtype", grouped)


def _modules(face: GpuFace, put: Put) -> None:
    def swap(first: torch.Tensor, second: torch.Tensor) -> None:
        """torch.utils.swap_tensors, without its refusal of tensors that weak references watch: fake tensors' own."""
        first.__dict__, second.__dict__ = second.__dict__, first.__dict__
        first.__class__, second.__class__ = second.__class__, first.__class__
        for slot in copyreg._slotnames(type(first)):  # type: ignore[attr-defined]
            kept = getattr(first, slot)
            setattr(first, slot, getattr(second, slot))
            setattr(second, slot, kept)
        torch._C._swap_tensor_impl(first, second)

    def set_default(device: Any) -> None:
        face.places.default_is_gpu = device is not None and device_of(device).type == "cuda"

    real = fake_tensor.FakeTensor.device

    def device(tensor: Any) -> torch.device:
        """As the function mode answers for other tensors; inside of torch's functions, where no mode is, as it is."""
        here: torch.device = real.__get__(tensor)
        asked_by_script = torch._C._is_torch_function_mode_enabled() and here.type == "cpu"
        return GPU if asked_by_script and face.places.on_gpu(tensor) else here

    parse = torch._C._nn._parse_to

    def parse_to(*args: Any, **kwargs: Any) -> Any:
        return parse(*map(as_device, args), **devices(kwargs))

    put(torch._C._nn, "_parse_to", parse_to)
    put(fake_tensor.FakeTensor, "device", property(device, real.__set__))
    put(torch.utils, "swap_tensors", swap)
    # Draws again until no value is too large; none is ever seen.
    put(torch.nn.init, "_no_grad_trunc_normal_", lambda tensor, *_, **__: torch.nn.init.normal_(tensor))
    # A tensor says where it is to the script, and to what runs inside of a torch function that it is on the CPU.
    checks = {
        **checkpoint._allowed_determinism_checks_to_fns,
        "default": lambda t: {"shape": t.shape, "dtype": t.dtype},
    }
    put(checkpoint, "_allowed_determinism_checks_to_fns", checks)
    put(torch, "set_default_device", set_default)
    put(torch, "get_default_device", lambda: GPU if face.places.default_is_gpu else torch.device("cpu"))
    put(fake_tensor, "CONSTANT_NUMEL_LIMIT", KNOWN_INTEGERS)


class _NoProfiler:
    """Stands in for a profiler: every call is possible, and nothing comes of it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> _NoProfiler:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: self

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __str__(self) -> str:
        return ""


def _profilers(face: GpuFace, put: Put) -> None:
    put(torch.profiler, "profile", _NoProfiler)
    put(torch.autograd.profiler, "profile", _NoProfiler)
    put(torch.autograd.profiler, "emit_nvtx", _NoProfiler)
    put(torch.cuda.profiler, "profile", _NoProfiler)
    for name in ("start", "stop", "init"):
        put(torch.cuda.profiler, name, _constant(None))


def _files(face: GpuFace, put: Put) -> None:
    """Checkpoints of tensors without values are not written."""

    def left_out(*_: Any, **__: Any) -> None:
        face.recorder.told[f"a file of tensors at {face.recorder.place_of_script()} was not written"] += 1

    put(torch, "save", left_out)
    if "safetensors.torch" in sys.modules:
        put(sys.modules["safetensors.torch"], "save_file", left_out)


def _generators(face: GpuFace, put: Put) -> None:
    make = torch.Generator

    class Generator:
        """The GPU's random numbers come from a generator of the CPU's, for no value of them is seen."""

        def __new__(cls, device: Any = "cpu") -> Any:
            return make()

    put(torch, "Generator", Generator)


def _refusals(face: GpuFace, put: Put) -> None:
    """What has no graph of ops, or more GPUs than one."""
    compiling = torch.compile

    def refuse(what: str, why: str) -> Callable[..., Any]:
        def refused(*_: Any, **__: Any) -> Any:
            raise Refused(f"{face.recorder.place_of_script()}: {what}: {why}")

        return refused

    compiled = refuse("torch.compile", "compiled models are not synthesized; run the script without it")

    def compile_(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
        return compiling(*args, **kwargs) if caller in ("torch", "transformers") else compiled()

    put(torch, "compile", compile_)
    put(torch.nn.Module, "compile", compiled)
    graphs = refuse("a CUDA graph", "what it launches is not seen; run the script without it")
    put(torch.cuda.CUDAGraph, "__new__", graphs)
    put(torch.cuda.graph, "__init__", graphs)
    processes = "each process is one rank of a job; let the script be one, as under torchrun, and give --ranks 8"
    put(torch.multiprocessing, "spawn", refuse("torch.multiprocessing.spawn", processes))
    put(torch.nn.DataParallel, "__init__", refuse("nn.DataParallel", "it needs several GPUs; leave it out"))
    norms = "its statistics have kernels of CUDA's alone; leave convert_sync_batchnorm out"
    put(torch.nn.SyncBatchNorm, "forward", refuse("SyncBatchNorm", norms))
    flat = "FSDP1 is not synthesized; shard the model with torch.distributed.fsdp.fully_shard (FSDP2)"
    put(torch.distributed.fsdp.FullyShardedDataParallel, "__init__", refuse("FullyShardedDataParallel", flat))
