"""Allocation by allocation: the lifetimes of a synthesized step are those that PyTorch's own MemTracker sees in a real
one on this CPU, between the same module boundaries."""

from __future__ import annotations

import contextlib
import unittest.mock
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch.distributed._tools.mem_tracker import MemTracker, _UpdateType

from sim.ops import Alloc, Free, Op
from sim.workload import tasks
from sim.workload.builder import ProgramBuilder
from sim.workload.cards import find_config
from sim.workload.modules import ModuleTracker
from sim.workload.parallel import parse_plan
from sim.workload.spec import SynthSpec
from sim.workload.synth import _Synthesis
from sim.workload.train import TrainingStep
from tests.workload.real_step import NotRecording
from tests.workload.tiny_models import model_folder

MOD_TRACKER = "torch.distributed._tools.mod_tracker"


class Seen(NamedTuple):
    """What happened: a module is entered or left, or memory is taken or given back."""

    what: str
    size: int = 0


class Tracker(MemTracker):
    """PyTorch's, which also writes down in what order it sees things."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Seen] = []
        self.over = False

    def _update_snap(self, u_type: _UpdateType, winfo: Any, *args: Any, **kwargs: Any) -> None:
        super()._update_snap(u_type, winfo, *args, **kwargs)
        if not self.over and u_type in (_UpdateType.ADD, _UpdateType.DEL):
            self.seen.append(Seen("taken" if u_type is _UpdateType.ADD else "given back", winfo.mem_consumed))

    def _pre_fw_hook(self, module: Any, inputs: Any) -> None:
        super()._pre_fw_hook(module, inputs)
        self.seen.append(Seen(f"enter {type(module).__name__}"))

    def _post_fw_hook(self, module: Any, inputs: Any, outputs: Any) -> None:
        super()._post_fw_hook(module, inputs, outputs)
        self.seen.append(Seen(f"leave {type(module).__name__}"))


def tracked(spec: SynthSpec) -> Tracker:
    """A real second step, whose optimizer has its state."""
    config = find_config(spec.model)
    task = tasks.task_of(spec, config)
    recorder: Any = NotRecording()
    with unittest.mock.patch("sim.workload.train.CudaChoices", contextlib.nullcontext):
        step = TrainingStep(spec, tasks.build_model(spec, config, task))
        batches = [task.batch(spec, config)]
        step.prepare(batches, recorder)
        step.run(batches, recorder)
        tracker = Tracker()
        tracker.track_external(step.model, step.optimizer, batches)
        tracker.seen.clear()
        with tracker, no_hooks_on_gradients():
            step.run(batches, recorder)
        tracker.over = True  # the model is given back when this returns
    return tracker


def no_hooks_on_gradients() -> Any:
    """MemTracker's hooks on modules' gradients hold some of these longer than an untracked step does (BERT's)."""
    return unittest.mock.patch(f"{MOD_TRACKER}.register_multi_grad_hook", lambda *args, **kwargs: None)


class Synthesized(NamedTuple):
    ops: list[Op]
    boundaries: list[tuple[int, str]]


def synthesized(spec: SynthSpec) -> Synthesized:
    """A synthesized step under the conditions of MemTracker's: its mode too keeps the engine from adding gradients
    in place, which the Recorder puts right and here does not."""
    builder = ProgramBuilder()
    boundaries: list[tuple[int, str]] = []
    enter, leave = ModuleTracker._enter, ModuleTracker._leave

    def entered(self: ModuleTracker, module: Any, args: Any) -> None:
        boundaries.append((len(builder.ops), f"enter {type(module).__name__}"))
        enter(self, module, args)

    def left(self: ModuleTracker, module: Any, args: Any, output: Any) -> None:
        boundaries.append((len(builder.ops), f"leave {type(module).__name__}"))
        leave(self, module, args, output)

    with (
        parse_plan("").device_mesh() as mesh,
        unittest.mock.patch("sim.workload.record._engine_adds_in_place", lambda args: False),
        unittest.mock.patch.object(ModuleTracker, "_enter", entered),
        unittest.mock.patch.object(ModuleTracker, "_leave", left),
    ):
        _Synthesis(spec, find_config(spec.model), parse_plan(""), mesh).record(builder)
    return Synthesized(builder.ops, boundaries)


def seen_in(made: Synthesized) -> Iterator[Seen]:
    """The synthesized step as a tracker would have seen it."""
    boundaries = iter([*made.boundaries, (len(made.ops) + 1, "")])
    place, name = next(boundaries)
    sizes: dict[int, int] = {}
    begun = False
    for i, op in enumerate(made.ops):
        while place <= i:
            yield Seen(name)
            place, name = next(boundaries)
        begun = begun or type(op).__name__ == "Mark"
        if isinstance(op, Alloc):
            sizes[op.block] = op.bytes
            if begun:
                yield Seen("taken", op.bytes)
        elif isinstance(op, Free):
            yield Seen("given back", sizes[op.block])


# The number of a step, which AdamW's foreach adds to its counters: 4 bytes, in the host's memory on a CUDA run.
NUMBER = [Seen("taken", 4), Seen("given back", 4)]


def without_the_number(seen: list[Seen]) -> list[Seen]:
    """Without what AdamW makes on the host, right before it first takes memory of its own (square roots, as large as
    the first parameter)."""
    i = max(i for i in range(len(seen) - 1) if seen[i : i + 2] == NUMBER)
    return seen[:i] + seen[i + 2 :]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_every_lifetime_is_that_of_a_real_step(tmp_path: Path, family: str, optimizer: Any) -> None:
    spec = SynthSpec(
        model=model_folder(tmp_path / "model", family), batch=2, seq=16, mode="train", attention="eager",
        optimizer=optimizer, momentum=0.9 if optimizer == "sgd" else 0.0,
    )  # fmt: skip
    real = tracked(spec).seen
    if optimizer == "adamw":
        real = without_the_number(real)
    assert len([seen for seen in real if seen.size]) > 300
    assert real == list(seen_in(synthesized(spec)))


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_the_peak_has_the_parts_of_a_real_steps(tmp_path: Path, family: str) -> None:
    spec = SynthSpec(
        model=model_folder(tmp_path / "model", family), batch=2, seq=16, mode="train", attention="eager",
        optimizer="sgd", momentum=0.9,
    )  # fmt: skip
    (peak,) = tracked(spec).get_tracker_snapshot("peak").values()
    real = {str(getattr(kind, "value", kind)): size for kind, size in peak.items()}
    made = at_peak(synthesized(spec).ops)
    assert sum(made.values()) == real["Total"]
    assert made["parameter"] == real["Parameter"] + real["Buffer"]
    assert made["optimizer"] == real["Optstate"] and made["input"] == real["Other"]
    # A gradient is one to MemTracker when it is accumulated, here from its allocation on; what forward makes and
    # gives back in forward is an activation there, temporary here.
    working = real["Gradient"] + real["Activation"] + real["Temp"]
    assert made["gradient"] + made["activation"] + made["temporary"] == working > 0


def at_peak(ops: list[Op]) -> Counter[str]:
    """What is live, by category, when the most is."""
    live: dict[int, Alloc] = {}
    now = most = 0
    parts: Counter[str] = Counter()
    for op in ops:
        if isinstance(op, Alloc):
            live[op.block] = op
            now += op.bytes
        elif isinstance(op, Free):
            now -= live.pop(op.block).bytes
        if now > most:
            most, parts = now, Counter()
            for alloc in live.values():
                parts[alloc.category] += alloc.bytes
    return parts
