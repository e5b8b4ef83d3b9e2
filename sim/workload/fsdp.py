"""FSDP2: PyTorch's own ``fully_shard`` over a fake process group, with the streams that it uses on a CUDA device.

On a CPU mesh fully_shard's code is the same as on a GPU's, but its streams and events do nothing.  Here they are
written down: all-gathers are copied in and issued on streams of their own, reduce-scatters on another, and each waits
for what the code says (torch/distributed/fsdp/_fully_shard, PyTorch 2.13).  Each block of the model is one group of
parameters, what is left (embeddings, head) is the root's.
"""

from __future__ import annotations

import contextlib
import importlib
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh

from sim.errors import UserError
from sim.workload.builder import ProgramBuilder
from sim.workload.record import Recorder
from sim.workload.spec import SynthSpec
from sim.workload.tasks import DTYPES

# In the order in which FSDPCommContext.lazy_init makes them.
STREAMS = ("fsdp:all-gather-copy-in", "fsdp:all-gather", "fsdp:reduce-scatter", "fsdp:all-reduce")
MODULES = tuple(
    f"torch.distributed.fsdp._fully_shard.{module}"
    for module in ("_fsdp_collectives", "_fsdp_param_group", "_fsdp_state")
)


class RecordedStream:
    """A stream of the device, by the lane it has in the builder that records now."""

    def __init__(self, device: Device, name: str) -> None:
        self._device = device
        self.name = name

    @property
    def lane(self) -> int:
        builder = self._device.builder
        return builder.stream_named(self.name) if self.name else self._device.default_lane

    def record_event(self, event: RecordedEvent | None = None) -> RecordedEvent:
        event = event or RecordedEvent(self._device)
        event.record(self)
        return event

    def wait_event(self, event: RecordedEvent) -> None:
        self._device.builder.stream_waits(self.lane, event.awaited)

    def wait_stream(self, other: RecordedStream) -> None:
        self.wait_event(other.record_event())


class RecordedEvent:
    """What a stream had been given when it was recorded."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.awaited: tuple[int, ...] = ()

    def record(self, stream: RecordedStream | None = None) -> None:
        self.awaited = self._device.builder.event((stream or self._device.current_stream()).lane)


class Device:
    """Stands in for ``torch.cuda`` in FSDP's code and writes streams and events down."""

    def __init__(self, builder: ProgramBuilder) -> None:
        self.builder = builder
        self.default_lane = builder.stream
        self._made = 0
        self._current = self._default = RecordedStream(self, "")

    def Stream(self, priority: int = 0) -> RecordedStream:  # noqa: N802 (the name it has in torch.cuda)
        root, which = divmod(self._made, len(STREAMS))
        self._made += 1
        return RecordedStream(self, STREAMS[which] + (f" {root + 1}" if root else ""))

    def Event(self) -> RecordedEvent:  # noqa: N802
        return RecordedEvent(self)

    def current_stream(self, device: Any = None) -> RecordedStream:
        return self._current

    @contextlib.contextmanager
    def stream(self, stream: RecordedStream) -> Iterator[None]:
        before, self._current = self._current, stream
        self.builder.stream = stream.lane
        try:
            yield
        finally:
            self._current = before
            self.builder.stream = before.lane


class Sharding:
    """fully_shard applied to a model, or to each stage of one; ``recorder`` is who writes down now."""

    def __init__(self, spec: SynthSpec, models: Sequence[Any], mesh: Any) -> None:
        self._device = Device(ProgramBuilder())
        self._recorder: Recorder | None = None
        self._contexts = contextlib.ExitStack()
        for place, name, value in replacements(self._device, lambda: self._recorder):
            self._contexts.enter_context(unittest.mock.patch.object(place, name, value))
        for model in models:
            _shard(spec, model, mesh)

    def close(self) -> None:
        """Put back what was replaced in PyTorch."""
        self._contexts.close()

    def record_into(self, recorder: Recorder) -> None:
        """From now on this recorder writes down."""
        self._recorder = recorder
        self._device.builder = recorder.builder
        handle_copies(recorder)


def replacements(device: Device, recording: Callable[[], Recorder | None]) -> Iterator[tuple[Any, str, Any]]:
    """What FSDP's code finds in place of PyTorch's own: where, under which name, and what.  ``recording`` answers who
    writes down at the time."""
    for module in MODULES:
        yield importlib.import_module(module), "_get_device_handle", lambda device_type: device
    yield torch.UntypedStorage, "resize_", _resizer(recording)
    yield DeviceMesh, "_concatenate", _really_concatenate


def _resizer(recording: Callable[[], Recorder | None]) -> Any:
    original = torch.UntypedStorage.resize_

    def resize_(storage: Any, size: int) -> Any:
        result = original(storage, size)
        recorder = recording()
        if recorder is not None and not recorder.stopped:
            recorder.resized(storage, "unsharded_parameter", "parameter")
        return result

    return resize_


def handle_copies(recorder: Recorder) -> None:
    """The recorder knows what FSDP's copy into the buffer that is reduce-scattered takes: whole gradients."""
    recorder.handlers["fsdp::chunk_cat"] = _copied_in(recorder)


_concatenate = DeviceMesh._concatenate


def _really_concatenate(meshes: Any) -> Any:
    """A mesh of FSDP's and tensor parallelism's axes is made of real tensors of ranks, which are looked at."""
    with unset_fake_temporarily():
        return _concatenate(meshes)


def _copied_in(recorder: Recorder) -> Any:
    def handle(call: Any, blocks: list[int]) -> None:
        """Gradients of whole parameters are copied into the buffer that is reduce-scattered."""
        recorder.categorize(call.args[0], "gradient")
        recorder.launch(call, blocks)

    return handle


def _shard(spec: SynthSpec, model: Any, mesh: Any) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[spec.fsdp_dtype] if spec.fsdp_dtype else None,
        reduce_dtype=DTYPES[spec.fsdp_reduce_dtype] if spec.fsdp_reduce_dtype else None,
    )
    options = {"mesh": mesh, "mp_policy": policy}
    blocks = blocks_of(model)
    if not blocks:
        raise UserError(f"{spec.model}: {type(model).__name__} names no blocks for FSDP to shard one by one")
    for block in blocks:
        fully_shard(block, reshard_after_forward=spec.reshard_after_forward, **options)
    fully_shard(model, **options)


def blocks_of(model: Any) -> list[Any]:
    """The repeated blocks of a model: those that transformers does not split over devices, in lists of modules."""
    whole = set(model._no_split_modules or ())
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return [block for blocks in lists for block in blocks if type(block).__name__ in whole]
