"""torch.cuda's streams and events for a script: written down where the step is, and without effect elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from sim.workload.builder import ProgramBuilder
from sim.workload.fsdp import Device, RecordedEvent, RecordedStream
from sim.workload.script.recorder import ScriptRecorder

# A stand-in that scripts can divide by, as they do for tokens a second.
A_TIME_MS = 1.0


class ScriptEvent(RecordedEvent):
    """What a script does with an event beyond what FSDP's code does; times between events are not known here."""

    def __init__(self, device: ScriptDevice) -> None:
        super().__init__(device)
        self._script = device

    def wait(self, stream: RecordedStream | None = None) -> None:
        (stream or self._script.current_stream()).wait_event(self)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self._script.wait_for(self.awaited)

    def elapsed_time(self, end: ScriptEvent) -> float:
        recorder = self._script.recorder
        recorder.told[f"a time between CUDA events at {recorder.place_of_script()} was answered with 1 ms"] += 1
        return A_TIME_MS


class ScriptStream(RecordedStream):
    """A stream that a script can wait for."""

    def __init__(self, device: ScriptDevice, name: str) -> None:
        super().__init__(device, name)
        self._script = device

    def record_event(self, event: RecordedEvent | None = None) -> RecordedEvent:
        return super().record_event(event or ScriptEvent(self._script))

    def synchronize(self) -> None:
        self._script.wait_for(self._script.builder.event(self.lane))

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False


class ScriptDevice(Device):
    """Writes into the builder that the recorder has at the time."""

    def __init__(self, recorder: ScriptRecorder) -> None:
        self.recorder = recorder
        self._of_script = 0
        super().__init__(recorder.builder)
        self._current = self._default = ScriptStream(self, "")

    @property
    def builder(self) -> ProgramBuilder:
        return self.recorder.builder

    @builder.setter
    def builder(self, builder: ProgramBuilder) -> None:
        """The base class sets the one that is there when it begins."""

    def classes(self) -> tuple[type[ScriptStream], type[ScriptEvent]]:
        """``torch.cuda.Stream`` and ``torch.cuda.Event``: classes, for they stand in annotations."""
        device = self

        class Stream(ScriptStream):
            def __init__(self, *_: Any, **__: Any) -> None:
                device._of_script += 1
                super().__init__(device, f"stream {device._of_script}")

        class Event(ScriptEvent):
            def __init__(self, *_: Any, **__: Any) -> None:
                super().__init__(device)

        return Stream, Event

    def Stream(self, priority: int = 0) -> ScriptStream:  # noqa: N802 (as FSDP's code calls it)
        return ScriptStream(self, super().Stream(priority).name)

    def Event(self) -> ScriptEvent:  # noqa: N802
        return ScriptEvent(self)

    def default_stream(self, device: Any = None) -> RecordedStream:
        return self._default

    def set_stream(self, stream: RecordedStream) -> None:
        self._current = stream
        self.builder.stream = stream.lane

    @contextlib.contextmanager
    def stream(self, stream: RecordedStream | None) -> Iterator[None]:
        if stream is None:
            yield
            return
        with super().stream(stream):
            yield

    def synchronize(self, *_: Any) -> None:
        """torch.cuda.synchronize()."""
        if not self.recorder.stopped:
            self.builder.synchronize()

    def record_use(self) -> None:
        """Tensor.record_stream(), which knows PyTorch's own streams only: a call of the host's.  That the block is free
        only when the stream has come so far is left out."""
        if not self.recorder.stopped:
            self.builder.host("aten::record_stream")

    def wait_for(self, awaited: tuple[int, ...]) -> None:
        if not self.recorder.stopped:
            self.builder.synchronize("cudaEventSynchronize", awaited)
