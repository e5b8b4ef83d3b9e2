"""Master weights: parameters and gradients in half precision, an optimizer that works on copies in float32.

As apex's O2, DeepSpeed's and Megatron-LM's half-precision optimizers do it: gradients are copied into float32, clipped
and applied there, and the result is copied back into the model's parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from sim.workload.parallel import to_local


class Masters:
    """The float32 copies of a model's parameters, which live as long as the optimizer."""

    def __init__(self, parameters: list[Any]) -> None:
        self._parameters = parameters
        self.weights = [torch.empty_like(p, dtype=torch.float32, requires_grad=True) for p in parameters]

    def named(self) -> Iterator[tuple[str, Any]]:
        return (("master_weight", weight) for weight in self.weights)

    def take_gradients(self) -> None:
        """The gradients that there are become float32, and those in half precision are given up."""
        given = [(m, p) for m, p in zip(self.weights, self._parameters, strict=True) if p.grad is not None]
        for master, parameter in given:
            master.grad = torch.empty_like(parameter, dtype=torch.float32)
        _copy((m.grad for m, _ in given), (p.grad for _, p in given))
        for _, parameter in given:
            parameter.grad = None

    def give_weights(self) -> None:
        """The model's parameters become what the optimizer made of their copies."""
        _copy(self._parameters, self.weights)


def _copy(targets: Iterable[Any], sources: Iterable[Any]) -> None:
    """One op over what this rank holds: DTensor has none over a list of copies."""
    with torch.no_grad():
        torch._foreach_copy_(list(map(to_local, targets)), list(map(to_local, sources)))
