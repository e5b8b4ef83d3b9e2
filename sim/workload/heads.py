"""Heads: what a task's model reads and answers, for the first and the last stage of a pipeline.

A pipeline is given a batch in three parts: what enters the first stage, what each stage is told beside it, and one
target for the loss, which the schedule cuts into micro-batches and hands to the last stage with its answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch

from sim.workload.spec import SynthSpec
from sim.workload.tasks import Batch, Task

Shape = tuple[int, ...]
Answers: TypeAlias = torch.Tensor | tuple[torch.Tensor, ...]
TARGET = "labels"
# Read by embeddings alone, which the first stage has; all else beside what enters, such as masks, each stage reads.
FOR_EMBEDDINGS = ("token_type_ids",)


class Head(NamedTuple):
    """The head of a task's models.

    ``enters`` of a batch goes into the first stage and ``targets`` into the loss.  ``module`` is the head's name in
    the model, ``answers`` the fields of its output that the loss reads, ``shape`` that of each of them.
    """

    module: str
    enters: str
    targets: tuple[str, ...]
    answers: tuple[str, ...]
    shape: Callable[[SynthSpec, Any], Shape]
    loss: Callable[[Any, Any, torch.Tensor], torch.Tensor]

    def answers_of(self, output: Any) -> Answers:
        """One tensor by itself, several in a tuple: as PyTorch hands them on from stage to loss."""
        answers = tuple(getattr(output, name) for name in self.answers)
        return answers if len(answers) > 1 else answers[0]

    def with_one_target(self, batch: Batch) -> Batch:
        """Where the loss reads several targets they become the columns of one: a schedule cuts no more."""
        if self.targets == (TARGET,):
            return batch
        rest = {name: tensor for name, tensor in batch.items() if name not in self.targets}
        return {**rest, TARGET: torch.stack([batch[name] for name in self.targets], dim=-1)}

    def beside(self, batch: Batch, has_embeddings: bool) -> Batch:
        """What stages are told beside what enters, those with the embeddings or others."""
        return {
            name: tensor
            for name, tensor in batch.items()
            if name not in (self.enters, TARGET) and (has_embeddings or name not in FOR_EMBEDDINGS)
        }


def head_of(task: Task) -> Head:
    """The head of a task that models are cut into stages for."""
    return HEADS[task.auto_class]


def _seq(spec: SynthSpec) -> int:
    assert spec.seq is not None, "checked before a model is built"
    return spec.seq


# Each loss is the model's own, called as its forward calls it.


def _next_token(model: Any, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model.loss_function(logits=logits, labels=target, vocab_size=model.config.vocab_size)
    return loss


def _where_the_answer_is(model: Any, answers: tuple[torch.Tensor, ...], target: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model.loss_function(*answers, *target.unbind(-1))
    return loss


def _which_class(model: Any, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model.loss_function(target, logits, model.config)
    return loss


HEADS = {
    "AutoModelForCausalLM": Head(
        module="lm_head", enters="input_ids", targets=("labels",), answers=("logits",),
        shape=lambda spec, config: (spec.batch, _seq(spec), config.vocab_size), loss=_next_token,
    ),
    "AutoModelForQuestionAnswering": Head(
        module="qa_outputs", enters="input_ids", targets=("start_positions", "end_positions"),
        answers=("start_logits", "end_logits"),
        shape=lambda spec, config: (spec.batch, _seq(spec)), loss=_where_the_answer_is,
    ),
    "AutoModelForImageClassification": Head(
        module="classifier", enters="pixel_values", targets=("labels",), answers=("logits",),
        shape=lambda spec, config: (spec.batch, config.num_labels), loss=_which_class,
    ),
}  # fmt: skip
