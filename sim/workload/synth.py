"""synth: a model's name becomes the operation graph of one step, without weights and without a GPU.

transformers builds the model under FakeTensorMode; the real code of forward, backward and optimizer runs under a
Recorder.  One rank's program is recorded and shared by all ranks that run the same one.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sim.errors import UserError
from sim.graph import OpGraph, Program, RankProgram
from sim.ops import Work
from sim.workload.builder import ProgramBuilder
from sim.workload.cards import find_config
from sim.workload.cuda_choices import CudaChoices
from sim.workload.ddp import DataParallel
from sim.workload.fsdp import Sharding
from sim.workload.heads import head_of
from sim.workload.interrupts import stoppable
from sim.workload.liveness import free_at_last_use
from sim.workload.modules import ModuleTracker, owners_of
from sim.workload.parallel import ParallelPlan, axis_of_group, parse_plan, to_local
from sim.workload.record import Recorder
from sim.workload.spec import SynthSpec
from sim.workload.stages import warnings_of
from sim.workload.tasks import Batch, build_model, check_sequence, eager_masks, no_cache, task_of
from sim.workload.tensor_parallel import tensor_parallel
from sim.workload.train import TrainingStep, checkpoint_activations

__all__ = ["SynthSpec", "synthesize"]
STEP = "ProfilerStep#0"
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
TF32 = ("allow_tf32", True)


def synthesize(spec: SynthSpec, tell: Callable[[str], None] = lambda doing: None) -> OpGraph:
    """The graph of one step; ``tell`` is told what is being done.

    Raises UserError where the model, the sizes or the plan cannot be.
    """
    spec.check()
    config = find_config(spec.model)
    plan = parse_plan(spec.parallel)
    check_sequence(spec, config, task_of(spec, config))
    places = plan.size("pp")
    stride = plan.ranks // places
    groups = plan.groups()
    programs: list[Program] = []
    builder: ProgramBuilder | None = None
    for place in range(places):
        tell(f"building {spec.model} under fake tensors" + (f", place {place + 1} of {places}" if places > 1 else ""))
        builder = ProgramBuilder(builder)
        with stoppable(), plan.device_mesh(place * stride) as mesh:
            synthesis = _Synthesis(spec, config, plan, mesh)
            outputs = synthesis.record(builder)
        ops = free_at_last_use(builder.ops, builder.uses, outputs) if spec.liveness == "export" else builder.ops
        programs.append(Program(builder.lanes, tuple(ops)))
        groups |= synthesis.groups
    assert builder is not None, "a plan has a place at least"
    graph = OpGraph(
        name=_name(spec),
        programs=tuple(programs),
        ranks=tuple(RankProgram(rank, rank // stride) for rank in range(plan.ranks)),
        works=tuple(in_tf32(builder.works)) if spec.tf32 else tuple(builder.works),
        groups=groups,
        warnings=warnings_of(spec, config) if places > 1 else (),
        provenance=_provenance(spec),
    )
    graph.check()
    return graph


def in_tf32(works: Iterable[Work]) -> Iterator[Work]:
    """The works, with products of float32 allowed to run in TF32 (torch.backends.cuda.matmul.allow_tf32)."""
    for work in works:
        product = work.op in PRODUCTS and work.inputs[-1].dtype == "float32"
        yield msgspec.structs.replace(work, scalars=(*work.scalars, TF32)) if product else work


def _name(spec: SynthSpec) -> str:
    plan = f" {spec.parallel}" if spec.parallel else ""
    size = f"{spec.batch}" if spec.seq is None else f"{spec.batch}x{spec.seq}"
    precision = f"{spec.parameter_dtype}" + (f" autocast {spec.autocast}" if spec.autocast else "")
    return f"{spec.model} {spec.mode} {size} {precision}{plan}"


def _provenance(spec: SynthSpec) -> dict[str, str]:
    import transformers

    given = msgspec.to_builtins(msgspec.structs.replace(spec, dtype=spec.parameter_dtype))
    made_from = {key: str(value) for key, value in given.items() if value is not None}
    return {**made_from, "torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}


class _Synthesis:
    """One rank's model on its mesh, recorded."""

    def __init__(self, spec: SynthSpec, config: Any, plan: ParallelPlan, mesh: Any) -> None:
        self.spec = spec
        self.config = config
        self.plan = plan
        self.mesh = mesh
        self.task = task_of(spec, config)
        self.groups: dict[str, tuple[tuple[int, ...], ...]] = {}

    def record(self, builder: ProgramBuilder) -> frozenset[int]:
        """Record the step; the blocks that a forward step returns."""
        with FakeTensorMode(allow_non_fake_inputs=True), eager_masks(), _quiet(), _models_own_errors(self.spec.model):
            if self.plan.size("pp") > 1:
                self._pipeline(builder)
                return frozenset()
            model = build_model(self.spec, self.config, self.task)
            checkpoint_activations(self.spec, model)
            self._split(model)
            if self.spec.training:
                self._train(model, builder)
                return frozenset()
            if self.plan.size("tp") > 1:
                # DTensor works out each op's sharding by running it on whole fake tensors, once: not part of a step.
                self._forward(model, self._recorder(ProgramBuilder(), model))
            return self._forward(model, self._recorder(builder, model))

    def _split(self, model: Any) -> None:
        if self.plan.size("tp") > 1:
            tensor_parallel(self.spec, model, self.config, self.mesh["tp"])

    def _recorder(
        self, builder: ProgramBuilder, model: Any, sharding: Sharding | None = None, roots: Sequence[Any] = ()
    ) -> Recorder:
        """``roots`` are the models that modules are named by, where they are not ``model`` itself."""
        recorder = Recorder(builder, axis_of_group(self.mesh), training=self.spec.training)
        if sharding is not None:
            sharding.record_into(recorder)
        owners = owners_of(roots or [model])
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            recorder.adopt([(name, to_local(tensor))], "parameter", owners.get(id(tensor), ""))
        return recorder

    @contextlib.contextmanager
    def _sharding(self, *models: Any) -> Iterator[Sharding | None]:
        if self.plan.size("fsdp") == 1:
            yield None
            return
        axes = ("dp", "fsdp") if self.plan.size("dp") > 1 else ("fsdp",)
        sharding = Sharding(self.spec, models, self.mesh[axes])
        try:
            yield sharding
        finally:
            sharding.close()

    def _data_parallel(self, model: Any) -> DataParallel | None:
        ranks = self.plan.size("dp")
        if ranks == 1 or self.plan.size("fsdp") > 1:  # with FSDP the outer axis is its own: hybrid sharding
            return None
        spec = self.spec
        return DataParallel(model, "dp", ranks, bucket_mib=spec.bucket_mib, as_view=spec.gradient_as_bucket_view)

    def _forward(self, model: Any, recorder: Recorder) -> frozenset[int]:
        builder = recorder.builder
        batch = self.task.batch(self.spec, self.config)
        recorder.adopt(batch.items(), "input")
        recorder.modules = ModuleTracker(model)
        builder.mark(STEP, 0, "begin")
        with torch.no_grad(), recorder.modules.tracking(), no_garbage_collection(), CudaChoices(), recorder:
            outputs = model(**batch, **no_cache(model))
            loss = recorder.block_of(to_local(outputs.loss))
            builder.synchronize()
            builder.mark(STEP, 0, "end")
            del outputs
        recorder.stopped = True
        return frozenset() if loss is None else frozenset({loss})

    def _train(self, model: Any, builder: ProgramBuilder) -> None:
        with self._sharding(model) as sharding:
            step = TrainingStep(self.spec, model, self._data_parallel(model))
            batches = [self.task.batch(self.spec, self.config) for _ in range(self.spec.micro_batches)]
            step.prepare(batches, self._recorder(ProgramBuilder(), model, sharding))
            self._record_step(step, batches, self._recorder(builder, model, sharding))

    def _pipeline(self, builder: ProgramBuilder) -> None:
        """This rank's stages of a pipeline; all micro-batches are one batch, which the schedule cuts."""
        # PyTorch's pipelining takes a second to import, which other plans need not.
        from sim.workload.p2p import PointToPoint
        from sim.workload.pipeline import PipelineStep, build_stages

        spec = self.spec
        stages = build_stages(spec, self.config, self.task, self.mesh)
        for stage in stages:
            self._split(stage.model)
        batch = self.task.batch(msgspec.structs.replace(spec, batch=spec.batch * spec.micro_batches), self.config)
        batch = head_of(self.task).with_one_target(batch)
        entering = batch[head_of(self.task).enters][: spec.batch]
        places = self.plan.size("pp")
        wires = PointToPoint(self.mesh["pp"].get_local_rank(), self.plan.ranks // places)
        with self._sharding(*stages) as sharding:
            wrappers = [wrapper for stage in stages if (wrapper := self._data_parallel(stage)) is not None]
            step = PipelineStep(spec, stages, entering, wrappers, wires, self.mesh)
            step.prepare([batch], self._recorder(ProgramBuilder(), stages, sharding))
            self._record_step(step, [batch], self._recorder(builder, stages, sharding, step.roots))
        self.groups = wires.groups()

    def _record_step(self, step: TrainingStep, batches: list[Batch], recorder: Recorder) -> None:
        builder = recorder.builder
        step.adopt_state(recorder)
        for batch in batches:
            recorder.adopt(batch.items(), "input")
        recorder.modules = ModuleTracker(*step.roots)
        builder.mark(STEP, 0, "begin")
        with recorder.modules.tracking(), no_garbage_collection(), recorder:
            step.run(batches, recorder)
            builder.synchronize()
            builder.mark(STEP, 0, "end")
        recorder.stopped = True


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Frees come from reference counts alone: the same in every run, whatever else the process has allocated."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Advice of PyTorch's and transformers' to whoever wrote the model and the mesh: not for who asks for a step."""
    loggers = [logging.getLogger(name) for name in ("torch.distributed.tensor._redistribute", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "FSDP2-wrapped module")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _models_own_errors(name: str) -> Iterator[None]:
    """A model's code that fails, or that asks what fake tensors cannot answer, is told with its place."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [f for f in frames if "/torch/" not in f.filename and f.filename != __file__]
        if not theirs or "/sim/workload/" in theirs[-1].filename:
            raise  # an error of this package, not of the model
        where = f"{theirs[-1].filename}:{theirs[-1].lineno}"
        raise UserError(f"{name}: fails under fake tensors at {where}: {type(error).__name__}: {error}") from error
