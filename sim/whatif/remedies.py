"""A job that does not fit: which of the cheap cures would make it fit, each tried by simulation.

Expandable segments need no change to the job and are tried on the very graph; a smaller micro-batch with more
accumulation, and activation checkpointing, change the job: its workload is synthesized anew from the options that it
says it was made of.  A trace cannot be made anew, so for a trace only the first is tried.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import msgspec

from sim.errors import UserError
from sim.graph import OpGraph
from sim.place.place import place
from sim.replay.allocator.config import AllocatorConfig
from sim.replay.replay import replay
from sim.report.summarize import summarize
from sim.report.summary import RemedyRow
from sim.topology.machine import Machine
from sim.workload.spec import SynthSpec, spec_of

# Halving a batch further than this changes the job more than a cure should.
MOST_HALVINGS = 3

Tell = Callable[[str], None]


def remedies(
    graph: OpGraph, machine: Machine, gpus: Sequence[int], config: AllocatorConfig, tell: Tell = lambda doing: None
) -> tuple[RemedyRow, ...]:
    """Every cure that applies to this job, whether it would fit then, and what its step would take."""
    tried = []
    if not config.expandable_segments:
        tell("out of memory: trying expandable segments")
        expandable = dataclasses.replace(config, expandable_segments=True)
        tried.append(_tried("--alloc-conf expandable_segments:True", graph, machine, gpus, expandable))
    spec = spec_of(graph)
    if spec is not None:
        tried += list(_changed_jobs(spec, machine, gpus, config, tell))
    return tuple(tried)


def _changed_jobs(
    spec: SynthSpec, machine: Machine, gpus: Sequence[int], config: AllocatorConfig, tell: Tell
) -> Iterator[RemedyRow]:
    for option, changed in _changes(spec):
        tell(f"out of memory: trying {option}")
        row = _synthesized(option, changed, machine, gpus, config)
        if row is not None:
            yield row


def _changes(spec: SynthSpec) -> Iterator[tuple[str, SynthSpec]]:
    """Changed jobs that do the same work a step: half the batch, accumulated twice as often; recomputation."""
    batch, times = spec.batch, spec.micro_batches
    for _ in range(MOST_HALVINGS):
        if batch % 2:
            break
        batch, times = batch // 2, times * 2
        if spec.training:
            yield (
                f"--batch {batch} --micro-batches {times}",
                msgspec.structs.replace(spec, batch=batch, micro_batches=times),
            )
        else:
            yield f"--batch {batch}", msgspec.structs.replace(spec, batch=batch)
    if spec.training and spec.checkpoint == "none":
        yield "--checkpoint full", msgspec.structs.replace(spec, checkpoint="full")


def _synthesized(
    option: str, spec: SynthSpec, machine: Machine, gpus: Sequence[int], config: AllocatorConfig
) -> RemedyRow | None:
    from sim.workload.synth import synthesize

    try:
        return _tried(option, synthesize(spec), machine, gpus, config)
    except UserError:
        return None  # not every model can be changed so; a cure that cannot be is no cure


def _tried(option: str, graph: OpGraph, machine: Machine, gpus: Sequence[int], config: AllocatorConfig) -> RemedyRow:
    summary = summarize(replay(place(graph, machine, gpus), allocator=config))
    return RemedyRow(option, not summary.out_of_memory, summary.peak_reserved_bytes or 0, summary.step_ms)
