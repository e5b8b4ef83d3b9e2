"""Run a script as ``python SCRIPT ARGS`` would, under fake tensors, until the step that is to be recorded has ended."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import runpy
import sys
import traceback
import unittest.mock
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sim.errors import InputError, UserError
from sim.graph import OpGraph, RankProgram
from sim.ops import Collective
from sim.workload.builder import ProgramBuilder
from sim.workload.capture.cutting import cut_by_optimizer
from sim.workload.interrupts import stoppable
from sim.workload.modules import ModuleTracker, owners_of
from sim.workload.optimizers import state_tensors
from sim.workload.script.devices import GpuFace
from sim.workload.script.job import SET_BY_TORCHRUN, Job
from sim.workload.script.meshes import Meshes
from sim.workload.script.patches import as_on_a_gpu
from sim.workload.script.places import Places, held
from sim.workload.script.pretrained import without_weights
from sim.workload.script.recorder import Owner, Refused, ScriptRecorder
from sim.workload.script.replicas import Replicas
from sim.workload.script.spec import ScriptSpec, provenance
from sim.workload.synth import STEP, no_garbage_collection

Tell = Callable[[str], None]
LONGEST = 400  # characters of an error's message
NO_VALUES = "values, which a run without data does not have"
UNKNOWN = (
    (DynamicOutputShapeException, f"makes a tensor whose shape depends on {NO_VALUES}"),
    (DataDependentOutputException, f"depends on {NO_VALUES}"),
    (UnsupportedFakeTensorException, "is not possible without data"),
    (UnsupportedOperatorException, "runs a kernel that says nothing of its shapes: give it a fake implementation"
     " (torch.library.register_fake)"),
)  # fmt: skip


class _Enough(BaseException):
    """Unwinds the script when its step is recorded; no ``except Exception`` of the script's catches it."""


def synthesize_script(spec: ScriptSpec, tell: Tell = lambda doing: None) -> OpGraph:
    """The graph of one training step of a script, as it would run on one GPU, or as the first rank of a job.

    Raises UserError, with the script's line, where it does what cannot be without data.
    """
    spec.check()
    run = _Run(spec, tell)
    with stoppable():
        run.to_the_step()
    several = spec.parallel or (f"on {spec.ranks} rank{'s' * (spec.ranks > 1)}" if spec.ranks is not None else "")
    graph = OpGraph(
        name=" ".join([spec.path.name, *spec.args, *([several] if several else [])]),
        programs=(run.builder.program(),),
        ranks=tuple(RankProgram(rank, 0) for rank in range(spec.job or 1)),
        groups=run.job.groups,
        works=tuple(run.builder.works),
        warnings=tuple(
            f"{what}{f' ({times} times)' if times > 1 else ''}" for what, times in run.recorder.told.items()
        ),
        provenance={**provenance(spec), "torch": torch.__version__.split("+")[0]},
    )
    graph.check()
    return graph


class _Run:
    """One run of the script: its optimizer's steps are counted, one is recorded."""

    def __init__(self, spec: ScriptSpec, tell: Tell) -> None:
        self.spec = spec
        self.builder = ProgramBuilder()
        self.places = Places()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.recorder = ScriptRecorder(spec.path, self._fake, self.places, spec.assume_value)
        self.job = Job(spec.job, spec.hosts, "dp" if spec.parallel else "world", self.recorder)
        self.replicas = Replicas(self.job, bool(spec.parallel), self.recorder, self.places)
        self._tell = tell
        self._steps = 0
        self._depth = 0
        self._roots: list[Any] = []
        self._optimizers: list[Any] = []
        self._tracking = contextlib.ExitStack()

    def to_the_step(self) -> None:
        """Run it; UserError where it ends before its step has, with how it ended."""
        face = GpuFace(self.places, self.recorder)
        self._tell(f"running {self.spec.path.name} under fake tensors")
        try:
            with self._as_main(), self._surroundings(face), self._fake, face, self.recorder:
                runpy.run_path(str(self.spec.path), run_name="__main__")
        except _Enough:
            return
        except Refused as refused:
            raise UserError(str(refused)) from None
        except SystemExit as ended:
            code = ended.code if ended.code is not None else 0
            if not isinstance(code, int):  # a text is what Python prints, and ends with 1 after
                code = f"1 ({' '.join(str(code).split())})"
            raise InputError(self.spec.path, f"ended by itself with exit code {code} {self._too_early()}") from None
        except Exception as error:
            if not isinstance(error, SyntaxError) and not self._lines(error):
                raise  # an error of this package, not of the script
            raise UserError(self._failure(error)) from error
        raise InputError(self.spec.path, f"ended by itself {self._too_early()}")

    @contextlib.contextmanager
    def _surroundings(self, face: GpuFace) -> Iterator[None]:
        """What is otherwise while it runs, and who watches it."""
        surroundings = (
            self._tracking,
            self._watching(),
            cut_by_optimizer(self._step_ended),
            _seeded(),
            _quiet(),
            self.job.environment(),
            contextlib.closing(self.replicas),
            as_on_a_gpu(face, (self.job, self.replicas, Meshes(self.job, self.recorder, face.streams))),
            without_weights(self.recorder),
            no_garbage_collection(),
        )
        with contextlib.ExitStack() as stack:
            for context in surroundings:
                stack.enter_context(context)
            yield

    # Steps ----------------------------------------

    def _step_ended(self) -> None:
        self._steps += 1
        if self.recorder.stopped:
            if self.replicas.are_ready(self._roots) and self._steps >= self.spec.warmup:
                self._begin()
        else:
            self.builder.synchronize()
            self.builder.mark(STEP, 0, "end")
            self.recorder.stopped = True
            if (self.spec.job or 1) > 1 and not any(isinstance(op, Collective) for op in self.builder.ops):
                self.recorder.told["the step has no collective: each rank trains alone"] += 1
            raise _Enough

    def _begin(self) -> None:
        if self.spec.ranks not in (None, 1) and not self.job.begun:
            raise Refused(
                f"--ranks {self.spec.ranks}: {self.spec.path} makes no process group, so each rank would train alone;"
                f" give --parallel dp={self.spec.ranks} to put DistributedDataParallel around its model"
            )
        self._tell("recording a step")
        with torch._C.DisableTorchFunction():
            owners = {**self._owners(), **self.replicas.owners()}
            parameters = [p for o in self._optimizers for group in o.param_groups for p in group["params"]]
            self.recorder.begin(self.builder, owners, parameters)
        self.recorder.modules = ModuleTracker(*self._roots)
        self._tracking.enter_context(self.recorder.modules.tracking())
        self.builder.mark(STEP, 0, "begin")

    def _owners(self) -> dict[int, Owner]:
        """What each storage is to the script: a parameter or buffer of its models, a gradient, an optimizer's state."""
        owners: dict[int, Owner] = {}
        modules = owners_of(self._roots)

        def own(tensor: Any, owner: Owner) -> None:
            if isinstance(tensor, torch.Tensor):
                owners.setdefault(held(tensor).untyped_storage()._cdata, owner)

        for root in self._roots:
            for name, tensor in (*root.named_parameters(), *root.named_buffers()):
                whose = modules.get(id(tensor), "")
                own(tensor, Owner("parameter", name, whose))
                own(tensor.grad if tensor.is_leaf else None, Owner("gradient", name, whose))
        for optimizer in self._optimizers:
            for state in state_tensors(optimizer):
                if state.on_host:
                    self.places.keep_on_host(state.tensor)
                own(state.tensor, Owner("optimizer", state.name, modules.get(id(state.parameter), "")))
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                own(parameter, Owner("parameter", "parameter"))
                own(parameter.grad, Owner("gradient", "gradient"))
        return owners

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        """Which modules are called by the script itself, and which optimizers step."""
        hooks = (
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
            register_optimizer_step_pre_hook(self._stepping),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, module: Any, args: Any) -> None:
        if not self._depth and module not in self._roots:
            self._roots.append(module)
        self._depth += 1

    def _leave(self, module: Any, args: Any, output: Any) -> None:
        self._depth -= 1

    def _stepping(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if optimizer not in self._optimizers:
            self._optimizers.append(optimizer)
        if not self.places.gpu_named and not self.places.all_on_gpu:
            self.places.all_on_gpu = True
            self.recorder.told["the script names no GPU: all of its tensors count as one's"] += 1

    # How it ended ----------------------------------------

    def _too_early(self) -> str:
        if not self._steps:
            return "before its first step: nothing was recorded; steps are cut where an optimizer of torch.optim steps"
        return (
            f"after {self._steps} optimizer step{'s' * (self._steps > 1)}, which came before the one to record: nothing"
            " was recorded; let the script make more steps"
        )

    def _failure(self, error: Exception) -> str:
        """An error of the script's, or what fake tensors cannot do, with the script's line."""
        said = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
        said = said if len(said) <= LONGEST else f"{said[:LONGEST]}..."
        if isinstance(error, SyntaxError) and error.lineno is not None:
            return f"{error.filename}, line {error.lineno}: {type(error).__name__}: {said}"
        frames = self._lines(error)
        where = f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else str(self.spec.path)
        for kind, what in UNKNOWN:
            if isinstance(error, kind):
                return f"{where}: `{frames[-1].line if frames else ''}` {what} ({said})"
        if isinstance(error, KeyError) and error.args and error.args[0] in SET_BY_TORCHRUN and self.spec.job is None:
            return f"{where}: asks for {error.args[0]}, which torchrun sets; give its ranks, as in --ranks 8"
        return f"{where}: {type(error).__name__}: {said or 'no message'}"

    def _lines(self, error: Exception) -> list[traceback.FrameSummary]:
        """The script's own, from the outermost on, through which an error came."""
        return [f for f in traceback.extract_tb(error.__traceback__) if self.recorder.is_scripts(f.filename)]

    @contextlib.contextmanager
    def _as_main(self) -> Iterator[None]:
        """The interpreter's own view of ``python SCRIPT ARGS``, as before afterwards."""
        argv, path, folder, modules = sys.argv, list(sys.path), Path.cwd(), set(sys.modules)
        sys.argv = [str(self.spec.path), *self.spec.args]
        sys.path.insert(0, str(self.spec.path.resolve().parent))
        try:
            with unittest.mock.patch.dict(os.environ):
                yield
        finally:
            sys.argv = argv
            sys.path[:] = path
            os.chdir(folder)
            for name in set(sys.modules) - modules:  # a script's own modules are not another's of the same name
                file = getattr(sys.modules[name], "__file__", None)
                if file and self.recorder.is_scripts(file):
                    del sys.modules[name]


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Random numbers are the same in every run, and afterwards as if there had been none."""
    python, torchs, numpys = random.getstate(), torch.get_rng_state(), numpy.random.get_state()
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    try:
        yield
    finally:
        random.setstate(python)
        numpy.random.set_state(numpys)
        torch.set_rng_state(torchs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What PyTorch says of fake tensors is for its developers."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            warnings.filterwarnings("ignore", "Converting a tensor with requires_grad=True to a scalar")
            yield
    finally:
        logger.setLevel(level)
