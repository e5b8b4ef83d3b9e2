"""Make traces/seed: the twelve workloads of the published table as they were run.

The table (TorchCAP, MIT licence, RTX A5000) was measured with transformers 4.48.2, whose loss and masks differ from
today's; so this script needs an environment of its own, which ``make seed`` builds and runs: constraints-seed.txt
says with what.  By hand::

    python3 -m venv .venv-seed
    .venv-seed/bin/python -m pip install -r constraints-seed.txt
    .venv-seed/bin/python tools/make_seed_workloads.py        # all twelve; or name some: clm-60m-x1

Each model really goes through torch.export, without weights and without a GPU; the exported module is then run under
the project's Recorder, node by node, and every intermediate is freed at its last use.  Nothing of the resulting list
of operations is written by hand.  What is written here is how each row was run:

* x1: AutoModelForCausalLM with labels, only the loss returned, one GPU.
* x8: a world of two ranks on GPUs 1 and 2 of eight.  CLM: gate and up by columns, down by rows, one all-reduce a layer,
  all else replicated; loss and logits returned.  OPT: AutoModel with its key-value cache; every projection but
  out_proj split by rows, so that each makes a partial sum; the cache holds partial sums until the end.

The same script with the same environment writes the same bytes.
"""

from __future__ import annotations

import contextlib
import sys
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._pytree import tree_leaves
from transformers import AutoModel, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sim.graph import OpGraph, Program, RankProgram, write
from sim.workload.attention import attend
from sim.workload.builder import ProgramBuilder
from sim.workload.cards import find_config
from sim.workload.liveness import free_at_last_use
from sim.workload.parallel import axis_of_group, parse_plan
from sim.workload.record import Recorder

FOLDER = Path(__file__).resolve().parent.parent / "traces" / "seed"
MODELS = ("opt-1.3b", "opt-6.7b", "clm-60m", "clm-200m", "clm-400m", "clm-1.1b")
BATCH, SEQ = 16, 1024
TRANSFORMERS = "4.48.2"
MADE_ON = "2026-11-23"
# The published memory estimates of the x8 rows fit two ranks only; they ran on these GPUs of the machine.
WORLD = 2
GPUS = (1, 2)

Reduce = Callable[[torch.Tensor], torch.Tensor]


# The plans of the x8 rows ----------------------------------------


class RowSplit(nn.Module):
    """A linear layer split by rows of the sum: this rank's slice of the input gives a partial sum of the output."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.share = linear.in_features // WORLD
        self.weight = nn.Parameter(torch.empty(linear.out_features, self.share, dtype=linear.weight.dtype))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x[..., : self.share].clone(), self.weight, self.bias)


def _completed(layer: nn.Module, reduce: Reduce) -> nn.Module:
    """The same layer with an all-reduce behind it."""
    layer.register_forward_hook(lambda _layer, _inputs, partial: reduce(partial))
    return layer


class Step(nn.Module):
    """What was exported: a model, called as it was called, returning what was returned."""

    def __init__(self, model: nn.Module, returned: Callable[[Any], Any], **options: Any) -> None:
        super().__init__()
        self.model = model
        self.returned = returned
        self.options = options

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        labels = {"labels": input_ids} if self.options.get("labels") else {}
        options = {key: value for key, value in self.options.items() if key != "labels"}
        return self.returned(self.model(input_ids=input_ids, attention_mask=attention_mask, **labels, **options))


def one_gpu(config: Any) -> Step:
    return Step(_model(AutoModelForCausalLM, config), lambda out: out.loss, labels=True, use_cache=False)


def two_ranks(config: Any, reduce: Reduce) -> Step:
    return _opt_by_rows(config, reduce) if config.model_type == "opt" else _clm_by_mlp(config, reduce)


def _clm_by_mlp(config: Any, reduce: Reduce) -> Step:
    model = _model(AutoModelForCausalLM, config)
    hidden, own = config.hidden_size, config.intermediate_size // WORLD
    for layer in model.model.layers:
        layer.mlp.gate_proj = _linear(hidden, own)
        layer.mlp.up_proj = _linear(hidden, own)
        layer.mlp.down_proj = _completed(_linear(own, hidden), reduce)
    return Step(model, lambda out: (out.loss, out.logits), labels=True, use_cache=False)


def _opt_by_rows(config: Any, reduce: Reduce) -> Step:
    model = _model(AutoModel, config)
    for layer in model.decoder.layers:
        attention = layer.self_attn
        attention.q_proj = _completed(RowSplit(attention.q_proj), reduce)
        # Keys and values stay partial sums through reshaping and in the cache; see _attending_to_whole.
        attention.k_proj = RowSplit(attention.k_proj)
        attention.v_proj = RowSplit(attention.v_proj)
        layer.fc1 = _completed(RowSplit(layer.fc1), reduce)
        layer.fc2 = _completed(RowSplit(layer.fc2), reduce)

    def returned(out: Any) -> Any:
        return out.last_hidden_state, tuple((reduce(key), reduce(value)) for key, value in out.past_key_values)

    return Step(model, returned, use_cache=True)


def _attending_to_whole(reduce: Reduce) -> Any:
    """Attention needs whole keys and values: all-reduce the partial sums just before it, beside the cached ones."""
    attend_as_given = functional.scaled_dot_product_attention

    def attend_to_whole(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        return attend_as_given(query, reduce(key), reduce(value), **options)

    return unittest.mock.patch.object(functional, "scaled_dot_product_attention", attend_to_whole)


def _model(family: Any, config: Any) -> Any:
    return family.from_config(config, torch_dtype=torch.float16, attn_implementation="sdpa").eval()


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False, dtype=torch.float16)


# Exporting and recording ----------------------------------------


class ExportedRun(torch.fx.Interpreter):
    """Runs an exported module node by node and tells the builder which module of the model a node is from."""

    def __init__(self, module: torch.fx.GraphModule, builder: ProgramBuilder) -> None:
        super().__init__(module)
        self.builder = builder

    def run_node(self, n: torch.fx.Node) -> Any:
        stack = list(n.meta.get("nn_module_stack", {}).values())
        self.builder.module = stack[-1][0].removeprefix("model.") if stack else ""
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.aten.scaled_dot_product_attention.default:
            target = attend  # by the kernel that a GPU takes
        return super().call_function(target, args, kwargs)


def make(model: str, ranks: int) -> OpGraph:
    """The workload of one row: ``ranks`` is 1 or WORLD."""
    config = find_config(model)
    plan = parse_plan(f"tp={ranks}" if ranks > 1 else "")
    builder = ProgramBuilder()
    with plan.device_mesh() as mesh, FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        step, inputs = _build(config, mesh)
        module = _export(step, inputs, mesh)
        returned = _record(module, step, inputs, Recorder(builder, axis_of_group(mesh)))
    graph = OpGraph(
        name=f"{model} forward {BATCH}x{SEQ} float16, as the published x{8 if ranks > 1 else 1} row was run",
        programs=(Program(builder.lanes, tuple(free_at_last_use(builder.ops, builder.uses, returned))),),
        ranks=tuple(RankProgram(rank, 0) for rank in range(ranks)),
        works=tuple(builder.works),
        groups=plan.groups(),
        gpus=GPUS if ranks > 1 else (),
        provenance=_provenance(model, ranks),
    )
    graph.check()
    return graph


def _build(config: Any, mesh: Any) -> tuple[Step, dict[str, torch.Tensor]]:
    ids = torch.zeros(BATCH, SEQ, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if mesh is None:
        return one_gpu(config), inputs
    return two_ranks(config, _all_reduce_over(mesh)), inputs


def _all_reduce_over(mesh: Any) -> Reduce:
    """Out of place; under export a functional collective is waited for at once."""
    group = mesh.get_group("tp")
    return lambda x: collectives.all_reduce(x, "sum", group)


def _export(step: Step, inputs: dict[str, torch.Tensor], mesh: Any) -> torch.fx.GraphModule:
    """The step as torch.export gives it, without the checks of metadata that today's export adds to it."""
    opt_by_rows = mesh is not None and step.options["use_cache"]
    with _attending_to_whole(_all_reduce_over(mesh)) if opt_by_rows else contextlib.nullcontext():
        module = torch.export.export(step.eval(), (), inputs, strict=False).module(check_guards=False)
    for part in module.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.find_nodes(
                op="call_function", target=torch.ops.aten._assert_tensor_metadata.default
            ):
                part.graph.erase_node(node)
            part.recompile()
    return module


def _record(
    module: torch.fx.GraphModule, step: Step, inputs: dict[str, torch.Tensor], recorder: Recorder
) -> frozenset[int]:
    """Run the exported step under the recorder; the blocks that it returns."""
    builder = recorder.builder
    recorder.adopt(step.named_parameters(), "parameter")
    recorder.adopt(step.named_buffers(), "parameter")
    recorder.adopt(inputs.items(), "input")
    builder.mark("ProfilerStep#0", 0, "begin")
    with recorder:
        outputs = ExportedRun(module, builder).run(*inputs.values())
        blocks = [recorder.block_of(tensor) for tensor in tree_leaves(outputs)]
        builder.module = ""
        builder.synchronize()
        builder.mark("ProfilerStep#0", 0, "end")
        del outputs
    recorder.stopped = True
    return frozenset(block for block in blocks if block is not None)


def _provenance(model: str, ranks: int) -> dict[str, str]:
    name = file_name(model, ranks).removesuffix(SUFFIX)
    return {
        "model": model,
        "batch": str(BATCH),
        "seq": str(SEQ),
        "dtype": "float16",
        "mode": "forward",
        "parallel": _plan_in_words(model) if ranks > 1 else "",
        "liveness": "export",
        "made": f"synthesized without weights and without a GPU, {MADE_ON}",
        "command": f"tools/make_seed_workloads.py {name}",
        "python": ".".join(map(str, sys.version_info[:2])),
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
    }


def _plan_in_words(model: str) -> str:
    if model.startswith("opt"):
        return "2 ranks: q, k, v, fc1, fc2 by rows, 7 all-reduces a layer, keys and values returned"
    return "2 ranks: gate and up by columns, down by rows, 1 all-reduce a layer, loss and logits returned"


# The files ----------------------------------------

SUFFIX = ".workload.json.gz"
ROWS = [(model, ranks) for model in MODELS for ranks in (1, WORLD)]


def file_name(model: str, ranks: int) -> str:
    """The file is called after the row as it was printed: two ranks stand under "8"."""
    return f"{model}-x{8 if ranks > 1 else 1}{SUFFIX}"


def main(wanted: list[str]) -> None:
    if transformers.__version__ != TRANSFORMERS:
        sys.exit(f"transformers {transformers.__version__} is here; the rows ran with {TRANSFORMERS}: use `make seed`")
    names = [file_name(model, ranks).removesuffix(SUFFIX) for model, ranks in ROWS]
    for unknown in set(wanted) - set(names):
        sys.exit(f"no row {unknown}; there are {', '.join(names)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, (model, ranks) in zip(names, ROWS, strict=True):
        if not wanted or name in wanted:
            path = FOLDER / (name + SUFFIX)
            graph = make(model, ranks)
            write(graph, path)
            print(f"{path.name}: {len(graph.programs[0].ops)} operations, {path.stat().st_size} bytes", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
