"""Pipeline parallelism: torch.distributed.pipelining's own stages and schedules, run for each rank of a pipeline.

The schedule's code decides which micro-batch runs when, what is sent and what is waited for, and what is kept; its
sends and receives are written down (:mod:`sim.workload.p2p`), and each forward and backward really runs on the stage's
part of the model (:mod:`sim.workload.stages`).  Ranks at one place of the pipeline run the same program.

What passes between stages is told to PyTorch (``input_args``, ``output_args``), which would otherwise find it out in
the first step.  Outputs of the last stage are not collected (``return_outputs=False``).
"""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from sim.errors import UserError
from sim.workload.ddp import DataParallel
from sim.workload.heads import TARGET, Shape
from sim.workload.optimizers import clip_gradients
from sim.workload.p2p import PointToPoint
from sim.workload.parallel import to_local
from sim.workload.record import Recorder
from sim.workload.spec import SynthSpec
from sim.workload.stages import Stage, parts_of, passed_dtype, passed_shape
from sim.workload.tasks import Batch, Task
from sim.workload.train import TrainingStep


class Vote(NamedTuple):
    """All stages know what they receive: none has to ask."""

    @staticmethod
    def item() -> int:
        return 1


class RecordedStage(PipelineStage):
    """A stage whose backward runs on the autograd engine's thread, with DistributedDataParallel's part where there
    is one; ``recorder`` is who writes down now."""

    recorder: Recorder
    wrapper: DataParallel | None = None

    def backward_maybe_with_nosync(self, backward_type: str, bwd_kwargs: Any, last_backward: bool = False) -> Any:
        """One micro-batch's backward; DistributedDataParallel reduces in the last one."""
        if self.wrapper is not None:
            self.wrapper.before_backward(last_backward)
        with self.recorder.builder.autograd_thread():
            result = super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
            if self.wrapper is not None:
                self.wrapper.after_backward()
        return result

    # PyTorch 2.13 has the stages vote on whether what passes between them is known.

    def _warmup_forward_vote(self, *args: Any, **kwargs: Any) -> Any:
        return Vote()

    def _warmup_backward_result(self, *args: Any, **kwargs: Any) -> Any:
        return Vote()


@contextlib.contextmanager
def _dividing_by(stage: RecordedStage, micro_batches: int) -> Iterator[None]:
    """Gradients are divided by this number of micro-batches, however many there were."""
    divide = stage.perform_reduce_grad
    with unittest.mock.patch.object(stage, "perform_reduce_grad", lambda factor: divide(micro_batches)):
        yield


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What a stage does that only goes through its motions."""


def _no_ops(*args: Any) -> list[Any]:
    return []


_IDLE: dict[str, Any] = {
    **dict.fromkeys(("forward_one_chunk", "backward_one_chunk", "perform_reduce_grad"), _nothing),
    **dict.fromkeys(("get_fwd_recv_ops", "get_fwd_send_ops", "get_bwd_recv_ops", "get_bwd_send_ops"), _no_ops),
}


class Stages(torch.nn.Module):
    """The stages of one rank."""

    def __init__(self, stages: Iterable[Stage]) -> None:
        super().__init__()
        self.stages = torch.nn.ModuleList(stages)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.stages)


def build_stages(spec: SynthSpec, config: Any, task: Task, mesh: Any) -> Stages:
    """The parts of the model that this rank has: of S stages on P ranks, every P-th."""
    ranks = mesh["pp"].size()
    parts = parts_of(spec, config, task, ranks * spec.stages_of_a_rank)
    return Stages(Stage(spec, config, task, part) for part in parts[mesh["pp"].get_local_rank() :: ranks])


class PipelineStep(TrainingStep):
    """One step of this rank's stages under a schedule; ``entering`` is what a micro-batch is to the first of all."""

    def __init__(
        self, spec: SynthSpec, stages: Stages, entering: torch.Tensor, wrappers: Sequence[DataParallel],
        wires: PointToPoint, mesh: Any,
    ) -> None:  # fmt: skip
        super().__init__(spec, stages)
        self.wrappers = wrappers
        self.wires = wires
        self._group = mesh.get_group("pp")
        self._stages = [_recorded(spec, stage, entering, self._group) for stage in stages]
        for stage, wrapper in zip(self._stages, wrappers, strict=False):
            stage.wrapper = wrapper
        self.roots = [stage.model for stage in stages]
        self._schedule = _schedule(spec, self._stages)

    def prepare(self, batches: Iterable[Batch], scratch: Recorder) -> None:
        """Two micro-batches through each stage, the fewest that accumulate, in which plans and the optimizer's state
        are made; then the schedule makes its buffers."""
        (batch,) = batches
        for wrapper in self.wrappers:
            wrapper.adopt_state(scratch)
        with scratch, self._recording(scratch):
            count = min(2, self.spec.micro_batches)
            first = {name: tensor[: count * self.spec.batch] for name, tensor in batch.items()}
            for stage in self._stages:
                with _dividing_by(stage, self.spec.micro_batches):
                    self._call(ScheduleGPipe(stage, count, _loss_of([stage])), [stage], first)
            if self.spec.training:
                self._update(scratch)
            with self._computing_nothing():
                self._call(self._schedule, self._stages, batch)
        for wrapper in self.wrappers:
            wrapper.rebuild_buckets()
        self.wires.pairs.clear()

    @contextlib.contextmanager
    def _computing_nothing(self) -> Iterator[None]:
        """The schedule goes through its motions: stages compute and send nothing."""
        with contextlib.ExitStack() as patched:
            for stage in self._stages:
                patched.enter_context(unittest.mock.patch.multiple(stage, **_IDLE))
            patched.enter_context(unittest.mock.patch.object(self._schedule, "_maybe_compute_loss", _nothing))
            yield

    def adopt_state(self, recorder: Recorder) -> None:
        """Also the buffers that activations and gradients are received into: one a micro-batch, for good."""
        super().adopt_state(recorder)
        for wrapper in self.wrappers:
            wrapper.adopt_state(recorder)
        recorder.adopt(self._buffers(), "communication")

    def _buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        for stage in self._stages:
            for name, infos in (
                ("received_activation", stage.args_recv_info),
                ("received_gradient", stage.grad_recv_info),
            ):
                for info in (info for chunk in infos.values() for info in chunk):
                    if getattr(info, "buffer", None) is not None:
                        yield name, info.buffer

    def run(self, batches: Iterable[Batch], recorder: Recorder) -> None:
        """One step over all micro-batches, recorded; or all of them forward, with their losses."""
        (batch,) = batches
        with self._recording(recorder):
            self._call(self._schedule, self._stages, batch)
        if not self.spec.training:
            return
        recorder.categorize((to_local(p.grad) for p in self.parameters if p.grad is not None), "gradient")
        self._update(recorder)

    def _call(self, schedule: Any, stages: Sequence[RecordedStage], batch: Batch) -> None:
        head = stages[0].submod.head
        has_first = any(stage.is_first for stage in stages)
        inputs = (batch[head.enters],) if has_first else ()
        target = {"target": batch[TARGET]} if any(stage.is_last for stage in stages) else {}
        call = schedule.step if self.spec.training else schedule.eval
        with torch.set_grad_enabled(self.spec.training):
            call(*inputs, **target, **head.beside(batch, has_first), return_outputs=False)

    @contextlib.contextmanager
    def _recording(self, recorder: Recorder) -> Iterator[None]:
        self.wires.recorder = recorder
        for stage in self._stages:
            stage.recorder = recorder
        with self.wires.recording(), _own_errors():
            yield

    def clip(self, most: float) -> None:
        """By the norm over all stages."""
        clip_gradients(self.updated, most, self._group)


def _recorded(spec: SynthSpec, stage: Stage, entering: torch.Tensor, group: Any) -> RecordedStage:
    part, head, config = stage.part, stage.head, stage.model.config

    def computed(shape: Shape) -> torch.Tensor:
        return torch.empty(shape, dtype=passed_dtype(spec), requires_grad=spec.training)

    hidden = computed(passed_shape(spec, config))
    return RecordedStage(
        stage, part.number, part.stages, torch.device("cpu"), group=group,
        input_args=(entering if part.is_first else hidden,),
        output_args=tuple(computed(head.shape(spec, config)) for _ in head.answers) if part.is_last else (hidden,),
    )  # fmt: skip


def _schedule(spec: SynthSpec, stages: Sequence[RecordedStage]) -> Any:
    """PyTorch's schedule.  UserError with its own words where it refuses these micro-batches."""
    loss = _loss_of(stages)
    try:
        if not spec.training:
            return ScheduleGPipe(stages[0], spec.micro_batches, loss)
        if spec.schedule == "interleaved":
            return ScheduleInterleaved1F1B(list(stages), spec.micro_batches, loss)
        single = Schedule1F1B if spec.schedule == "1f1b" else ScheduleGPipe
        return single(stages[0], spec.micro_batches, loss)
    except ValueError as error:
        theirs = " ".join(str(error).replace("\\", "").split())
        raise UserError(f"--micro-batches {spec.micro_batches}: PyTorch's {spec.schedule} says: {theirs}") from None


def _loss_of(stages: Sequence[RecordedStage]) -> Any:
    return next((stage.submod.loss for stage in stages if stage.is_last), _no_loss)


def _no_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The loss of a stage that is not the last: never asked for; that there is one says that backward follows."""
    raise AssertionError("only the last stage has a loss")


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """PyTorch wraps what a stage raises: tell what was raised."""
    try:
        yield
    except RuntimeError as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        raise
