"""What a model is trained for: the transformers class with the task's head, and a batch for it."""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from sim.errors import UserError
from sim.workload.spec import SynthSpec

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
FLASH = "tracesim_fused"  # transformers looks for a kernel of its own in any name with "flash"
Batch = dict[str, torch.Tensor]


class Task(NamedTuple):
    """``auto_class`` is the transformers class that builds the model; ``has_seq``: it reads sequences of tokens."""

    auto_class: str
    what: str
    has_seq: bool
    batch: Callable[[SynthSpec, Any], Batch]


def _tokens(spec: SynthSpec) -> torch.Tensor:
    assert spec.seq is not None, "checked before a model is built"
    return torch.zeros(spec.batch, spec.seq, dtype=torch.long)


def _causal_batch(spec: SynthSpec, config: Any) -> Batch:
    ids = _tokens(spec)
    return {"input_ids": ids, "labels": ids}


def _answering_batch(spec: SynthSpec, config: Any) -> Batch:
    """As a padded SQuAD batch: which tokens are real, which segment they are in, where the answer is."""
    where = {name: torch.zeros(spec.batch, dtype=torch.long) for name in ("start_positions", "end_positions")}
    segments = {"token_type_ids": _tokens(spec)} if getattr(config, "type_vocab_size", 0) else {}
    return {"input_ids": _tokens(spec), "attention_mask": torch.ones_like(_tokens(spec)), **segments, **where}


def _seq2seq_batch(spec: SynthSpec, config: Any) -> Batch:
    return {"input_ids": _tokens(spec), "labels": _tokens(spec)}


def _image_batch(spec: SynthSpec, config: Any) -> Batch:
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    pixels = torch.zeros(spec.batch, config.num_channels, height, width, dtype=DTYPES[spec.parameter_dtype])
    if spec.channels_last:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    return {"pixel_values": pixels, "labels": torch.zeros(spec.batch, dtype=torch.long)}


TASKS = {
    "causal-lm": Task("AutoModelForCausalLM", "a causal language model", True, _causal_batch),
    "question-answering": Task("AutoModelForQuestionAnswering", "a question answering model", True, _answering_batch),
    "seq2seq-lm": Task("AutoModelForSeq2SeqLM", "a sequence-to-sequence language model", True, _seq2seq_batch),
    "image-classification": Task("AutoModelForImageClassification", "an image classifier", False, _image_batch),
}


def task_of(spec: SynthSpec, config: Any) -> Task:
    """The task that was asked for, or what models of this type are for: an encoder-decoder translates, a type with a
    masked-language head answers questions, an image model classifies, all else continues text."""
    if spec.task != "auto":
        return TASKS[spec.task]
    from transformers.models.auto import modeling_auto as auto

    if getattr(config, "is_encoder_decoder", False):
        return TASKS["seq2seq-lm"]
    if config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return TASKS["question-answering"]
    if config.model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return TASKS["causal-lm"]
    if config.model_type in auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return TASKS["image-classification"]
    return TASKS["causal-lm"]


def check_sequence(spec: SynthSpec, config: Any, task: Task) -> None:
    """Raise UserError where a sequence length is missing, of no use, or longer than the model has positions for."""
    if not task.has_seq:
        if spec.seq is not None:
            raise UserError(f"--seq {spec.seq}: {spec.model} reads images, not sequences; leave it out")
        return
    if spec.seq is None:
        raise UserError(f"--seq is missing: how many tokens a sequence of {spec.model} has")
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and spec.seq > longest:
        raise UserError(f"--seq {spec.seq}: {spec.model} has positions for {longest} tokens; choose at most {longest}")


def build_model(spec: SynthSpec, config: Any, task: Task) -> Any:
    """The model under the fake tensor mode that is active, in training mode where a training step is asked for."""
    import transformers

    auto_class = getattr(transformers, task.auto_class)
    implementation = _attention_implementation(spec)
    try:
        # Values are never looked at, and some families' initialization asks for them.
        with unittest.mock.patch.object(transformers.PreTrainedModel, "initialize_weights", lambda self: None):
            model = auto_class.from_config(
                config, dtype=DTYPES[spec.parameter_dtype], attn_implementation=implementation
            )
    except (ValueError, ImportError) as error:
        why = str(error).partition(" for this kind of AutoModel")[0]  # then it lists every model that could be
        raise UserError(f"{spec.model}: transformers cannot build it as {task.what}: {why}") from None
    if implementation == FLASH and not getattr(model, "_supports_flash_attn", False):
        raise UserError(f"--attention flash: transformers has no flash attention for {type(model).__name__}; use sdpa")
    if spec.channels_last:
        _channels_last(model, spec, task)
    return model.train(spec.training)


def _channels_last(model: Any, spec: SynthSpec, task: Task) -> None:
    """``model.to(memory_format=torch.channels_last)``, which would swap parameters that fake tensors do not let go."""
    if task.has_seq:
        raise UserError(f"--channels-last: is a memory format of images; {spec.model} reads sequences")
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() == 4:
                turned = parameter.detach().contiguous(memory_format=torch.channels_last)
                module.register_parameter(name, torch.nn.Parameter(turned))


def _attention_implementation(spec: SynthSpec) -> str | None:
    """transformers' name of it; without one it takes sdpa for every family that has it."""
    if spec.attention != "flash":
        return "eager" if spec.attention == "eager" else None
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    AttentionInterface.register(FLASH, _flash_attention)
    AttentionMaskInterface.register(FLASH, flash_attention_mask)
    return FLASH


def _flash_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, *,
    dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """The flash kernel without a mask, for every family that takes it; a sliding window is left out."""
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, None, dropout, causal and query.shape[2] > 1, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2), None


def no_cache(model: Any) -> dict[str, bool]:
    """Training and scoring generate nothing: models that keep keys and values are told not to."""
    return {"use_cache": False} if hasattr(model.config, "use_cache") else {}


@contextlib.contextmanager
def eager_masks() -> Iterator[None]:
    """transformers takes fake tensors for tracing and then keeps every mask; a real eager run asks whether the mask
    is needed.  Let it ask: the Recorder answers."""
    with unittest.mock.patch("transformers.masking_utils.is_tracing", lambda tensor=None: False):
        yield
