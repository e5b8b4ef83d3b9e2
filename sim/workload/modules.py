"""Which module an op belongs to, in forward and in backward.

Forward: global module hooks keep the path of the innermost module that runs.  Backward: an autograd node carries the
sequence number it got in forward (torch.autograd.graph.Node._sequence_nr), so the module that ran when the node was
made is found by bisection.  No hook is put on any tensor: the op sequence stays that of an untracked run.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

# torch's AccumulateGrad nodes have the largest number there is: they run as soon as they can.
ACCUMULATES = 2**63


def paths_of(roots: Iterable[Any]) -> dict[Any, str]:
    """Every module below the roots with its path, root class first."""
    return {
        module: f"{type(root).__name__}.{path}" if path else type(root).__name__
        for root in roots
        for path, module in root.named_modules()
    }


def owners_of(roots: Iterable[Any]) -> dict[int, str]:
    """The path of the module that has each parameter and buffer, by the tensor's id; the first of several."""
    owners: dict[int, str] = {}
    for module, path in paths_of(roots).items():
        for _, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            owners.setdefault(id(tensor), path)
    return owners


class ModuleTracker:
    """``current()`` is the path of the module that the op being dispatched belongs to, root class first."""

    def __init__(self, *roots: Any) -> None:
        self._paths = paths_of(roots)
        self._stack: list[str] = []
        self._numbers: list[int] = []
        self._entered: list[str] = []

    @contextlib.contextmanager
    def tracking(self) -> Iterator[None]:
        """Follow module calls while the context is open."""
        before = register_module_forward_pre_hook(self._enter)
        behind = register_module_forward_hook(self._leave, always_call=True)
        try:
            yield
        finally:
            before.remove()
            behind.remove()

    def current(self) -> str:
        node = torch._C._current_autograd_node()
        if node is None or torch.is_grad_enabled():
            return self._stack[-1] if self._stack else "Global"
        return self._where_made(node)

    def _where_made(self, node: Any) -> str:
        number = node._sequence_nr() if hasattr(node, "_sequence_nr") else ACCUMULATES
        if number >= ACCUMULATES or not self._numbers:
            return "Global"
        return self._entered[max(0, bisect.bisect_right(self._numbers, number) - 1)]

    def _enter(self, module: Any, args: Any) -> None:
        self._stack.append(self._paths.get(module, type(module).__name__))
        self._note()

    def _leave(self, module: Any, args: Any, output: Any) -> None:
        self._stack.pop()
        self._note()

    def _note(self) -> None:
        self._numbers.append(torch._C._autograd._get_sequence_nr())
        self._entered.append(self._stack[-1] if self._stack else "Global")
