"""synth: a model's name becomes the operation graph of one step, without weights and without a GPU.

transformers builds the model under FakeTensorMode; the real forward code runs under a Recorder.  One rank's
program is recorded and shared by all ranks that run the same one.
"""

from __future__ import annotations

import contextlib
import gc
import unittest.mock
from collections.abc import Iterator
from typing import Any, Literal

import msgspec
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.module_tracker import ModuleTracker

from sim.errors import UserError
from sim.graph import OpGraph, Program, RankProgram
from sim.workload.attention import GpuAttention
from sim.workload.builder import ProgramBuilder
from sim.workload.cards import find_config
from sim.workload.liveness import free_at_last_use
from sim.workload.parallel import axis_of_group, parse_plan, tensor_parallel
from sim.workload.record import Recorder

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class SynthSpec(msgspec.Struct, frozen=True):
    """What to synthesize.  ``batch`` is per rank of a data-parallel axis, ``seq`` in tokens; ``parallel`` is a
    plan such as ``tp=8``; ``liveness`` says when intermediates are freed."""

    model: str
    batch: int
    seq: int
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    mode: Literal["forward"] = "forward"
    parallel: str = ""
    liveness: Literal["eager", "export"] = "eager"


def synthesize(spec: SynthSpec) -> OpGraph:
    """The graph of one step.  Raises UserError where the model, the sizes or the plan cannot be."""
    config = find_config(spec.model)
    plan = parse_plan(spec.parallel)
    _check(spec, config)
    builder = ProgramBuilder()
    with plan.device_mesh() as mesh:
        outputs = _record_forward(spec, config, mesh, builder)
    ops = builder.ops
    if spec.liveness == "export":
        ops = free_at_last_use(ops, builder.uses, outputs)
    graph = OpGraph(
        name=_name(spec),
        programs=(Program(builder.lanes, tuple(ops)),),
        ranks=tuple(RankProgram(rank, 0) for rank in range(plan.ranks)),
        works=tuple(builder.works),
        groups=plan.groups(),
        provenance=_provenance(spec),
    )
    graph.check()
    return graph


def _check(spec: SynthSpec, config: Any) -> None:
    for name, value in (("batch", spec.batch), ("seq", spec.seq)):
        if value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and spec.seq > longest:
        raise UserError(f"--seq {spec.seq}: {spec.model} has positions for {longest} tokens; choose at most {longest}")


def _name(spec: SynthSpec) -> str:
    plan = f" {spec.parallel}" if spec.parallel else ""
    return f"{spec.model} {spec.mode} {spec.batch}x{spec.seq} {spec.dtype}{plan}"


def _provenance(spec: SynthSpec) -> dict[str, str]:
    import transformers

    made_from = {key: str(value) for key, value in msgspec.to_builtins(spec).items()}
    return {**made_from, "torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}


def _record_forward(spec: SynthSpec, config: Any, mesh: Any, builder: ProgramBuilder) -> frozenset[int]:
    """Record one forward step with loss; the blocks that the step returns."""
    with FakeTensorMode(allow_non_fake_inputs=True), _eager_masks():
        model = _build(spec, config)
        ids = torch.zeros(spec.batch, spec.seq, dtype=torch.long)
        if mesh is not None and "tp" in mesh.mesh_dim_names:
            tensor_parallel(model, config, mesh["tp"], spec.model)
            # DTensor works out each op's sharding by running it on whole fake tensors, once: not part of a step.
            _forward(model, ids, Recorder(ProgramBuilder(), axis_of_group(mesh)))
        recorder = Recorder(builder, axis_of_group(mesh))
        recorder.adopt(_local(model.named_parameters()), "parameter")
        recorder.adopt(_local(model.named_buffers()), "parameter")
        recorder.adopt([("input_ids", ids)], "input")
        gc.collect()
        return _forward(model, ids, recorder)


def _forward(model: Any, ids: torch.Tensor, recorder: Recorder) -> frozenset[int]:
    builder = recorder.builder
    builder.mark("ProfilerStep#0", 0, "begin")
    with torch.no_grad(), ModuleTracker() as modules, GpuAttention(), recorder:
        recorder.modules = modules
        outputs = model(input_ids=ids, labels=ids, use_cache=False)
        loss = recorder.block_of(_to_local(outputs.loss))
        builder.synchronize()
        builder.mark("ProfilerStep#0", 0, "end")
        del outputs
    recorder.stopped = True
    return frozenset() if loss is None else frozenset({loss})


@contextlib.contextmanager
def _eager_masks() -> Iterator[None]:
    """transformers takes fake tensors for tracing and then keeps every mask; a real eager run asks whether the mask
    is needed.  Let it ask: the Recorder answers."""
    with unittest.mock.patch("transformers.masking_utils.is_tracing", lambda tensor=None: False):
        yield


def _build(spec: SynthSpec, config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(config, dtype=DTYPES[spec.dtype], attn_implementation="sdpa").eval()
    except ValueError as error:
        raise UserError(f"{spec.model}: transformers cannot build it as a causal language model: {error}") from None


def _local(named: Any) -> list[tuple[str, torch.Tensor]]:
    return [(name, _to_local(tensor)) for name, tensor in named]


def _to_local(tensor: Any) -> torch.Tensor:
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local
