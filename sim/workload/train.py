"""One steady training step: forward, loss, backward, clipping, optimizer, with autograd really running.

The optimizer's state is there before the step and gradients are set to None after it, as in a loop's second and later
iterations.  Backward runs on the autograd engine's own thread, as on a CUDA device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from sim.errors import UserError
from sim.workload.cuda_choices import CudaChoices
from sim.workload.ddp import DataParallel
from sim.workload.masters import Masters
from sim.workload.modules import owners_of
from sim.workload.optimizers import begin_state, clip_gradients, make_optimizer, state_tensors
from sim.workload.parallel import to_local
from sim.workload.record import Recorder
from sim.workload.spec import SynthSpec
from sim.workload.tasks import DTYPES, Batch, no_cache

# What selective checkpointing keeps: the results of matrix products and of attention, the usual policy.
KEPT_OPS = (
    "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
)  # fmt: skip


class TrainingStep:
    """A model with its optimizer; ``wrapper`` is DistributedDataParallel's part where there is one."""

    def __init__(self, spec: SynthSpec, model: Any, wrapper: DataParallel | None = None) -> None:
        self.spec = spec
        self.model = model
        self.roots = [model]
        self.wrapper = wrapper
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.masters = Masters(self.parameters) if spec.master_weights else None
        self.updated = self.masters.weights if self.masters is not None else self.parameters
        self.optimizer = make_optimizer(spec, self.updated)
        self.scaler = torch.amp.GradScaler("cpu") if spec.loss_scaling else None

    def prepare(self, batches: Iterable[Batch], scratch: Recorder) -> None:
        """Bring model and optimizer to the state that a steady step finds.  In parallel that is a step of its own:
        DistributedDataParallel learns the order of gradients in it, FSDP and DTensor make plans."""
        if self.wrapper is not None or torch.distributed.is_initialized():
            if self.wrapper is not None:
                self.wrapper.adopt_state(scratch)
            with scratch:
                self.run(batches, scratch)
            if self.wrapper is not None:
                self.wrapper.rebuild_buckets()
        elif self.optimizer is not None:
            begin_state(self.optimizer, self.updated)

    def adopt_state(self, recorder: Recorder) -> None:
        """Make the optimizer's state and the buckets known to a recorder."""
        if self.wrapper is not None:
            self.wrapper.adopt_state(recorder)
        modules = owners_of(self.roots)
        owners = {id(u): modules.get(id(p), "") for u, p in zip(self.updated, self.parameters, strict=True)}
        if self.masters is not None:
            for (name, tensor), whose in zip(self.masters.named(), owners.values(), strict=True):
                recorder.adopt([(name, to_local(tensor))], "optimizer", whose)
        if self.optimizer is not None:
            for state in state_tensors(self.optimizer):
                if state.on_host:
                    recorder.adopt_on_host([to_local(state.tensor)])
                else:
                    whose = owners[id(state.parameter)]
                    recorder.adopt([(state.name, to_local(state.tensor))], "optimizer", whose)
        if self.scaler is not None:
            self.scaler.scale(torch.zeros(()))
            scale, tracker = self.scaler._scale, self.scaler._growth_tracker
            recorder.adopt([("loss_scale", scale), ("growth_tracker", tracker)], "optimizer")

    def run(self, batches: Iterable[Batch], recorder: Recorder) -> None:
        """One step over its micro-batches, recorded."""
        batches = list(batches)
        for i, batch in enumerate(batches):
            self._accumulate(batch, recorder, last=i == len(batches) - 1, parts=len(batches))
        self._update(recorder)

    def _accumulate(self, batch: Batch, recorder: Recorder, *, last: bool, parts: int) -> None:
        if self.wrapper is not None:
            self.wrapper.before_forward(last)
        with self._autocast(), CudaChoices():
            loss = self.model(**batch, **no_cache(self.model)).loss
        if parts > 1:
            loss = loss / parts
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        ones = torch.ones_like(loss)
        with recorder.builder.autograd_thread():
            loss.backward(ones)
            del loss, ones
            if self.wrapper is not None:
                self.wrapper.after_backward()
        recorder.categorize((to_local(p.grad) for p in self.parameters if p.grad is not None), "gradient")

    def _update(self, recorder: Recorder) -> None:
        if self.masters is not None:
            self.masters.take_gradients()
            recorder.categorize((to_local(m.grad) for m in self.updated if m.grad is not None), "gradient")
        if self.spec.max_grad_norm is not None:
            if self.scaler is not None and self.optimizer is not None:
                self.scaler.unscale_(self.optimizer)
            self.clip(self.spec.max_grad_norm)
        if self.optimizer is None:
            for parameter in self.parameters:
                parameter.grad = None
            return
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        if self.masters is not None:
            self.masters.give_weights()
        self.optimizer.zero_grad(set_to_none=True)

    def clip(self, most: float) -> None:
        """Scale the gradients down to a norm of at most this."""
        clip_gradients(self.updated, most)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.spec.autocast is None:
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[Any] = torch.autocast("cpu", dtype=DTYPES[self.spec.autocast])
        return context


def checkpoint_activations(spec: SynthSpec, model: Any) -> None:
    """Recompute each block in backward, by transformers' own switch: all of it, or all but products and attention."""
    if spec.checkpoint == "none":
        return
    contexts = _keep_products if spec.checkpoint == "selective" else _keep_nothing
    options: dict[str, Any] = {"use_reentrant": False, "context_fn": contexts}
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable(options)
    except ValueError as error:
        raise UserError(f"--checkpoint {spec.checkpoint}: {error}") from None


Contexts = tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]


def _keep_nothing() -> Contexts:
    """The contexts of a block's forward and of its recomputation, which no longer runs inside the model's call."""
    return contextlib.nullcontext(), CudaChoices()


def _keep_products() -> Contexts:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
        kept = op._schema.name in KEPT_OPS
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    forward, recomputation = create_selective_checkpoint_contexts(policy)
    return forward, _both(recomputation, CudaChoices())


@contextlib.contextmanager
def _both(first: Any, second: Any) -> Iterator[None]:
    with first, second:
        yield
