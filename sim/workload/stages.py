"""Stages: a model cut by layers into the parts of a pipeline, each the model's own code on its own layers.

The first stage has the embeddings, the last one the final norm and the head; layers are dealt out evenly, the ones
left over to the stages in the middle first.  A stage is the transformers model built with its layers alone, its missing
parts taken out, and fed the hidden states of the stage before in place of embedded tokens (``inputs_embeds``) or of an
image.  What the whole model reads beside these, such as a padding mask, each stage reads itself.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from sim.errors import UserError
from sim.workload.cuda_choices import CudaChoices
from sim.workload.heads import FOR_EMBEDDINGS, Answers, Shape, head_of
from sim.workload.spec import SynthSpec
from sim.workload.tasks import DTYPES, TASKS, Task, build_model, no_cache, task_of
from sim.workload.train import checkpoint_activations


class Family(NamedTuple):
    """Where in a model of a type the parts are, by path from its base model: the layers, what comes before them and
    what behind.  ``added`` are embeddings that are added to the hidden states, ``passed`` modules that a later stage
    passes on what they are given.  Hidden states come in as ``stream``, ``tokens`` long; ``tasks`` are what its models
    are cut for."""

    layers: str
    embeddings: tuple[str, ...]
    norms: tuple[str, ...]
    added: tuple[str, ...] = ()
    passed: tuple[str, ...] = ()
    stream: str = "inputs_embeds"
    tokens: Callable[[SynthSpec, Any], int] = lambda spec, config: spec.seq or 0
    tasks: tuple[str, ...] = ("causal-lm", "question-answering")


def _patches(spec: SynthSpec, config: Any) -> int:
    """The patches of an image, and the class token before them."""
    height, width = _both(config.image_size)
    tall, wide = _both(config.patch_size)
    return (height // tall) * (width // wide) + 1


def _both(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


_BERT = Family("encoder.layer", (), (), passed=("embeddings",), tasks=("question-answering",))
_LLAMA = Family("layers", ("embed_tokens",), ("norm",))
FAMILIES = {
    "bert": _BERT,
    "gpt2": Family("h", ("wte",), ("ln_f",), added=("wpe",), passed=("drop",)),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "opt": Family(
        "decoder.layers", ("decoder.embed_tokens", "decoder.project_in"),
        ("decoder.final_layer_norm", "decoder.project_out"), added=("decoder.embed_positions",),
    ),
    "qwen2": _LLAMA,
    "roberta": _BERT,
    "vit": Family(
        "layers", (), ("layernorm",), passed=("embeddings",), stream="pixel_values", tokens=_patches,
        tasks=("image-classification",),
    ),
}  # fmt: skip


class Part(NamedTuple):
    """One stage of ``stages``: the layers from ``begin`` to before ``end`` of the model."""

    number: int
    stages: int
    begin: int
    end: int

    @property
    def is_first(self) -> bool:
        return self.number == 0

    @property
    def is_last(self) -> bool:
        return self.number == self.stages - 1


def parts_of(spec: SynthSpec, config: Any, task: Task, stages: int) -> list[Part]:
    """The layers of each stage.  UserError where the model cannot be cut into so many."""
    if config.model_type not in FAMILIES:
        raise UserError(
            f"{spec.model}: models of type {config.model_type!r} are not cut into pipeline stages yet; those of "
            f"{', '.join(FAMILIES)} are"
        )
    able = FAMILIES[config.model_type].tasks
    if task not in (TASKS[name] for name in able):
        raise UserError(
            f"--task {spec.task}: models of type {config.model_type!r} are cut into pipeline stages for "
            f"{' and '.join(able)} alone"
        )
    layers = config.num_hidden_layers
    if layers < stages:
        raise UserError(
            f"--parallel {spec.parallel}: {spec.model} has {layers} layers for {stages} stages; {layers} at most"
        )
    counts = _counts(spec, layers, stages) if spec.stage_layers else even_counts(layers, stages)
    ends = [sum(counts[: i + 1]) for i in range(stages)]
    return [Part(i, stages, end - count, end) for i, (count, end) in enumerate(zip(counts, ends, strict=True))]


def even_counts(layers: int, stages: int) -> list[int]:
    """Layers a stage; those left over go to the stages in the middle, for the outer ones have embedding and head."""
    counts = [layers // stages] * stages
    middle_first = sorted(range(stages), key=lambda i: (abs(2 * i - (stages - 1)), i))
    for i in middle_first[: layers % stages]:
        counts[i] += 1
    return counts


def _counts(spec: SynthSpec, layers: int, stages: int) -> list[int]:
    counts = [int(part) if part.isdigit() else 0 for part in spec.stage_layers.split(",")]
    if len(counts) != stages or sum(counts) != layers or min(counts) < 1:
        raise UserError(
            f"--stage-layers {spec.stage_layers}: {spec.model} has {layers} layers for {stages} stages; give {stages} "
            f"numbers of at least 1 that add up to {layers}, as {','.join(map(str, even_counts(layers, stages)))}"
        )
    return counts


class Stage(torch.nn.Module):
    """One part of a model: hidden states (or tokens, or images) in, hidden states (or the head's answers) out."""

    def __init__(self, spec: SynthSpec, config: Any, task: Task, part: Part) -> None:
        super().__init__()
        self.spec = spec
        self.part = part
        self.head = head_of(task)
        self.model = _cut(spec, config, task, part)
        self._no_split_modules = self.model._no_split_modules
        self._enters = self.head.enters if part.is_first else FAMILIES[config.model_type].stream

    def forward(self, stream: torch.Tensor, **beside: torch.Tensor) -> Answers:
        given = {name: told for name, told in beside.items() if self.part.is_first or name not in FOR_EMBEDDINGS}
        with self.computing():
            given |= {self._enters: stream, **no_cache(self.model)}
            if self.part.is_last:
                return self.head.answers_of(self.model(**given))
            states: torch.Tensor = self.model.base_model(**given).last_hidden_state
            return states

    def loss(self, answers: Answers, target: torch.Tensor) -> torch.Tensor:
        """The model's own loss, which the schedule asks of the last stage."""
        with self.computing():
            return self.head.loss(self.model, answers, target)

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """As a CUDA device computes, and under autocast where that is asked for."""
        dtype = self.spec.autocast
        autocast = torch.autocast("cpu", dtype=DTYPES[dtype]) if dtype else contextlib.nullcontext()
        with autocast, CudaChoices():
            yield


def passed_shape(spec: SynthSpec, config: Any) -> Shape:
    """The shape of the hidden states of a micro-batch."""
    return spec.batch, FAMILIES[config.model_type].tokens(spec, config), config.hidden_size


def passed_dtype(spec: SynthSpec) -> torch.dtype:
    """Their dtype; under autocast the residual stream stays in that of the parameters."""
    return DTYPES[spec.fsdp_dtype or spec.parameter_dtype]


def is_tied(config: Any, task: Task) -> bool:
    """Whether the head's weights are the embedding's, which two stages then hold."""
    return task is TASKS["causal-lm"] and bool(getattr(config, "tie_word_embeddings", False))


def warnings_of(spec: SynthSpec, config: Any) -> tuple[str, ...]:
    """What a reader of the graph must know."""
    if not is_tied(config, task_of(spec, config)):
        return ()
    return (
        f"{spec.model} ties its head to its embedding: the first and the last stage each train a copy, and nothing "
        f"sums their gradients, as torch.distributed.pipelining leaves it",
    )


def _cut(spec: SynthSpec, config: Any, task: Task, part: Part) -> Any:
    family = FAMILIES[config.model_type]
    model = build_model(spec, _config_of(config, part), task)
    checkpoint_activations(spec, model)  # transformers looks for the embedding, which may go
    body = model.base_model
    _renumber(body.get_submodule(family.layers), part.begin)
    if not part.is_first:
        _replace(body, (*family.embeddings,), lambda: None)
        _replace(body, family.added, _AddsNothing)
        _replace(body, family.passed, lambda: _PassesOn(passed_dtype(spec)))
    if not part.is_last:
        # A norm is called where it is there at all; OPT's is asked for first.
        _replace(body, family.norms, torch.nn.Identity)
        setattr(model, head_of(task).module, None)
    elif not part.is_first and is_tied(config, task):
        # Its copy of the embedding's weights is the head's alone.
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(torch.empty_like(head.weight))
    return model


def _config_of(config: Any, part: Part) -> Any:
    """The model's configuration with this part's layers alone."""
    own = copy.deepcopy(config)
    own.num_hidden_layers = part.end - part.begin
    if getattr(config, "layer_types", None):
        own.layer_types = config.layer_types[part.begin : part.end]
    return own


def _renumber(layers: Any, begin: int) -> None:
    """Layers keep the numbers that they have in the whole model."""
    own = list(layers._modules.values())
    layers._modules.clear()
    layers._modules.update({str(begin + i): layer for i, layer in enumerate(own)})


def _replace(body: Any, paths: Iterable[str], make: Callable[[], Any]) -> None:
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        owner = body.get_submodule(parent)
        if getattr(owner, leaf, None) is not None:
            setattr(owner, leaf, make())


class _PassesOn(torch.nn.Module):
    """Embeddings of a stage that has none: what comes in goes out."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        # ViT asks the projection of its patches which dtype an image should come in.
        projection = SimpleNamespace(weight=torch.empty(0, dtype=dtype))
        self.patch_embeddings = SimpleNamespace(projection=projection)

    def forward(self, stream: Any = None, *, inputs_embeds: Any = None, **others: Any) -> Any:
        return inputs_embeds if stream is None else stream


class _AddsNothing(torch.nn.Module):
    """Position embeddings of a stage that has none."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _Nothing()


class _Nothing:
    """What is added to hidden states where nothing is: ``x + nothing`` is ``x``, without an operation."""

    def to(self, *args: Any) -> _Nothing:
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        assert func in (torch.Tensor.add, torch.Tensor.__add__), f"{func}: nothing can only be added"
        return args[0]
