"""Tensor parallelism: each family's plan, run by DTensor's parallelize_module.

A block's projections into attention and MLP are split by columns, those out of them by rows: one all-reduce each in
forward and one each in backward.  Embeddings, norms and heads are whole on every rank.  A fused projection (GPT-2's
q, k and v in one) is split by heads: its columns are dealt out in an order that gives each rank the q, k and v of its
own heads, as Megatron-LM stores them.  A decoder's cross attention reads the encoder's output, which is distributed
once: its gradient is reduced once for the whole decoder.

Sequence parallelism (arXiv 2205.05198; torch.distributed.tensor.parallel.SequenceParallel) splits what lies between
the projections, norms and residuals, over the same ranks by tokens: each all-reduce becomes a reduce-scatter and an
all-gather.  What enters the first block is cut, what leaves the last norm is gathered for the head.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from sim.errors import UserError
from sim.workload.fsdp import blocks_of
from sim.workload.spec import SynthSpec


class Family(NamedTuple):
    """How a family's blocks are split; names are the ends of module paths inside a block.

    ``counts`` are numbers that an attention stores and reshapes by: they become the rank's own.  ``norms`` are those
    of a block, ``last`` the one behind the blocks; a family without norms has no sequence parallelism.  ``flat`` are
    modules that get batch and sequence as one dimension.
    """

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    counts: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    last: str = ""
    flat: tuple[str, ...] = ()


_LLAMA = Family(
    columns=("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
    rows=("o_proj", "down_proj"),
    norms=("input_layernorm", "post_attention_layernorm"),
    last="norm",
)
FAMILIES = {
    "bert": Family(
        columns=("self.query", "self.key", "self.value", "intermediate.dense"),
        rows=("output.dense",),
        norms=("output.LayerNorm",),
    ),
    "gpt2": Family(
        columns=("attn.c_attn", "mlp.c_fc"),
        rows=("attn.c_proj", "mlp.c_proj"),
        counts=("split_size",),
        norms=("ln_1", "ln_2"),
        last="ln_f",
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "opt": Family(
        columns=("q_proj", "k_proj", "v_proj", "fc1"),
        rows=("out_proj", "fc2"),
        counts=("num_heads",),
        norms=("self_attn_layer_norm", "final_layer_norm"),
        last="final_layer_norm",
        flat=("fc1", "fc2", "final_layer_norm"),
    ),
    "qwen2": _LLAMA,
    "t5": Family(
        # The bias of relative positions is an embedding with a column a head.
        columns=(
            "Attention.q", "Attention.k", "Attention.v", "relative_attention_bias",
            "DenseReluDense.wi", "DenseReluDense.wi_0", "DenseReluDense.wi_1",
        ),
        rows=("Attention.o", "DenseReluDense.wo"),
        counts=("n_heads", "inner_dim"),
    ),
    "vit": Family(columns=("q_proj", "k_proj", "v_proj", "fc1"), rows=("o_proj", "fc2")),
}  # fmt: skip
FEED_FORWARD = ("ffn_dim", "intermediate_size", "d_ff", "n_inner")


Hook = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


def tensor_parallel(spec: SynthSpec, model: Any, config: Any, mesh: Any) -> None:
    """Split a model's blocks in place over a one-axis mesh.  Raises UserError where it cannot be split so."""
    from torch.distributed.tensor import Replicate

    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            f"{spec.model}: no tensor-parallel plan for model type {config.model_type!r}; there is one for "
            f"{', '.join(FAMILIES)}"
        )
    _check_divides(config, mesh.size(), spec.model)
    if spec.sequence_parallel:
        _check_sequence(spec, family, mesh.size())
    for block in blocks_of(model):
        _split_block(family, block, mesh, spec.sequence_parallel)
    if getattr(config, "is_encoder_decoder", False):
        enter = _distributing("encoder_hidden_states", mesh, Replicate())
        model.get_decoder().register_forward_pre_hook(enter, with_kwargs=True)
    if spec.sequence_parallel:
        _split_stream(family, model, mesh)


def _split_block(family: Family, block: Any, mesh: Any, by_sequence: bool) -> None:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

    def outside(path: str) -> Any:
        """The layout of what comes from and goes to the stream between the projections."""
        return Shard(0 if path.endswith(family.flat) else 1) if by_sequence else Replicate()

    columns = _found(block, family.columns)
    sharing = Counter(_parent(path) for path in columns)
    styles: dict[str, Any] = {}
    for path, module in columns.items():
        layout = outside(path) if sharing[_parent(path)] == 1 else Replicate()
        styles[path] = _style("Colwise", module)(input_layouts=layout)
    for path, module in _found(block, family.rows).items():
        styles[path] = _style("Rowwise", module)(output_layouts=outside(path))
    if by_sequence:
        for path in _found(block, family.norms):
            styles[path] = SequenceParallel(sequence_dim=outside(path).dim, use_local_output=True)
    for module in block.modules():
        _keep_own(module, family.counts, mesh.size())
    parallelize_module(block, mesh, styles)
    for path, count in sharing.items():
        if count > 1:
            enter = _distributing("hidden_states", mesh, outside(path))
            block.get_submodule(path).register_forward_pre_hook(enter, with_kwargs=True)


def _split_stream(family: Family, model: Any, mesh: Any) -> None:
    """What enters the first block is cut by tokens; what leaves the norm behind the last is whole again."""
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

    def cut(module: Any, args: tuple[Any, ...]) -> Any:
        whole = DTensor.from_local(args[0], mesh, [Replicate()], run_check=False)
        return (whole.redistribute(placements=[Shard(1)]).to_local(), *args[1:])

    def gather(module: Any, args: Any, output: Any) -> Any:
        part = DTensor.from_local(output, mesh, [Shard(1)], run_check=False)
        return part.redistribute(placements=[Replicate()]).to_local()

    blocks = blocks_of(model)
    stack = next(m for m in model.modules() if any(blocks[0] in child.children() for child in m.children()))
    last = getattr(stack, family.last, None) if family.last else None
    blocks[0].register_forward_pre_hook(cut)
    if last is not None:
        parallelize_module(last, mesh, SequenceParallel(use_local_output=True))
    (blocks[-1] if last is None else last).register_forward_hook(gather)


def _distributing(argument: str, mesh: Any, layout: Any) -> Hook:
    """A module's input becomes a replicated DTensor before the projections that share it, as PrepareModuleInput makes
    it: so the gradients that they send back are summed first and reduced once, not once each."""
    from torch.distributed.tensor import DTensor, Replicate

    def whole(tensor: Any) -> Any:
        distributed = DTensor.from_local(tensor, mesh, [layout], run_check=False)
        return distributed.redistribute(placements=[Replicate()])

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if argument in kwargs:
            return args, {**kwargs, argument: whole(kwargs[argument])}
        return (whole(args[0]), *args[1:]), kwargs

    return hook


def _style(kind: str, module: Any) -> Any:
    from torch.distributed.tensor import parallel

    if type(module).__name__ != "Conv1D":
        return getattr(parallel, f"{kind}Parallel")
    from sim.workload import conv1d

    return getattr(conv1d, f"{kind}Conv1D")


def _found(block: Any, endings: tuple[str, ...]) -> dict[str, Any]:
    """The modules with parameters whose paths end so."""
    named = block.named_modules()
    return {path: m for path, m in named if path.endswith(endings) and getattr(m, "weight", None) is not None}


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _keep_own(module: Any, counts: tuple[str, ...], tp: int) -> None:
    for count in counts:
        if isinstance(getattr(module, count, None), int):
            setattr(module, count, getattr(module, count) // tp)


def _check_divides(config: Any, tp: int, name: str) -> None:
    heads = config.num_attention_heads
    widths = (getattr(config, field, None) for field in FEED_FORWARD)
    counts = {
        "attention heads": heads,
        "key and value heads": getattr(config, "num_key_value_heads", None) or heads,
        "feed-forward columns": next(filter(None, widths), 4 * config.hidden_size),
    }
    common = math.gcd(*counts.values())
    able = [str(size) for size in range(2, common + 1) if common % size == 0]
    cure = f"; {', '.join(able)} would do" if able else "; no number would: leave tp out"
    for what, count in counts.items():
        if count % tp:
            raise UserError(f"--parallel tp={tp} does not divide the {count} {what} of {name}{cure}")


def _check_sequence(spec: SynthSpec, family: Family, tp: int) -> None:
    if not family.norms:
        able = ", ".join(kind for kind, plan in FAMILIES.items() if plan.norms)
        raise UserError(f"--sequence-parallel: no plan for {spec.model}; there is one for {able}")
    if spec.seq is not None and spec.seq % tp:
        raise UserError(f"--sequence-parallel: --parallel tp={tp} does not divide --seq {spec.seq}")
