"""A training step on real CPU tensors, profiled: what synthesized steps are compared with."""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from sim.workload import tasks
from sim.workload.cards import find_config
from sim.workload.spec import SynthSpec
from sim.workload.train import TrainingStep, checkpoint_activations

# Ops of the CPU that launch nothing: views, allocations, metadata, and dropout with probability 0.
_NO_KERNEL = (
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "contiguous", "detach", "detach_", "dropout",
    "empty", "empty_like", "empty_strided", "expand", "expand_as", "flatten", "is_nonzero", "item", "lift_fresh",
    "_local_scalar_dense", "narrow", "new_empty", "new_empty_strided", "permute", "reshape", "resize_",
    "resolve_conj", "resolve_neg", "result_type", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "to",
    "transpose", "unbind", "unflatten", "unsqueeze", "view", "view_as",
)  # fmt: skip
_FILLS = ("zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full", "arange")
NO_KERNEL, FILLS = (frozenset("aten::" + name for name in names) for names in (_NO_KERNEL, _FILLS))


class NotRecording:
    """Stands in for a Recorder and a builder."""

    @property
    def builder(self) -> NotRecording:
        return self

    @contextlib.contextmanager
    def autograd_thread(self) -> Any:
        yield

    def categorize(self, tensors: Iterable[Any], category: str) -> None:
        list(tensors)


def profiled_step(spec: SynthSpec) -> Any:
    """The profile of a second step, whose optimizer has its state."""
    config = find_config(spec.model)
    task = tasks.task_of(spec, config)
    model = tasks.build_model(spec, config, task)
    with unittest.mock.patch("sim.workload.train.CudaChoices", contextlib.nullcontext):
        checkpoint_activations(spec, model)
        return _profile(spec, config, task, TrainingStep(spec, model))


def _profile(spec: SynthSpec, config: Any, task: tasks.Task, step: TrainingStep) -> Any:
    batches = [task.batch(spec, config) for _ in range(spec.micro_batches)]
    recorder: Any = NotRecording()
    step.prepare(batches, recorder)
    step.run(batches, recorder)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True, profile_memory=True) as profiled:
        step.run(batches, recorder)
    return profiled


def kernels_of(profiled: Any, known: Collection[str]) -> list[str]:
    """The ops that ran, in order: the outermost of ``known`` names, and whatever else is no view."""
    ran: list[str] = []

    def walk(event: Any) -> None:
        if event.name in FILLS:
            ran.append("aten::fill_")
        elif event.name in known:
            ran.append(event.name)
        else:
            children = sorted(event.cpu_children, key=lambda e: e.time_range.start)
            if not children and event.name.startswith("aten::") and event.name not in NO_KERNEL:
                ran.append(event.name)
            for child in children:
                walk(child)

    for event in sorted(profiled.events(), key=lambda e: e.time_range.start):
        if event.cpu_parent is None:
            walk(event)
    return ran


def peak_bytes(profiled: Any) -> int:
    """The most that the step had allocated at once, above what was there when it began."""
    changes: list[tuple[int, int]] = []

    def walk(event: Any) -> None:
        if event.tag == torch._C._profiler._EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
        for child in event.children:
            walk(child)

    for event in profiled.profiler.kineto_results.experimental_event_tree():
        walk(event)
    live = most = 0
    for _, change in sorted(changes, key=lambda c: c[0]):
        live += change
        most = max(most, live)
    return most
