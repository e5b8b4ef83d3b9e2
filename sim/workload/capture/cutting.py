"""Where a script's steps end: where its optimizer's step returns.

The first optimizer that steps is the one that counts (a second one, of a GAN say, steps inside); when it is gone,
the next that steps takes its place.  A step of the profiler ends after ``optimizer.step()`` returned, not in its
hook, which runs inside the ``Optimizer.step`` region: regions that cross are not drawn.
"""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook


@contextlib.contextmanager
def cut_by_optimizer(step_ended: Callable[[], None]) -> Iterator[None]:
    """Call ``step_ended`` after every step of the optimizer that counts."""
    cutter = _Cutter(step_ended)
    handle = register_optimizer_step_post_hook(cutter.hook)
    try:
        yield
    finally:
        handle.remove()
        cutter.release()


class _Cutter:
    def __init__(self, step_ended: Callable[[], None]) -> None:
        self._step_ended = step_ended
        self._counts: weakref.ref[Any] | None = None
        self._inside = False
        self._due = False
        self._before: Any = None
        self._wrapper: Any = None

    def hook(self, optimizer: Any, args: object, kwargs: object) -> None:
        counting = self._counts() if self._counts is not None else None
        if counting is None:
            self._counts = weakref.ref(optimizer)
            self._wrap(optimizer)
        elif counting is not optimizer:
            return
        if self._inside:
            self._due = True
        else:
            self._step_ended()  # its first step, or called by a reference taken earlier

    def _wrap(self, optimizer: Any) -> None:
        """``step`` of this one object, so that the cut comes after its return; a method, as schedulers expect."""
        bound = optimizer.step
        function = getattr(bound, "__func__", None)

        @functools.wraps(function or bound)
        def step(self_: Any, *args: Any, **kwargs: Any) -> Any:
            self._inside = True
            try:
                result = function(self_, *args, **kwargs) if function is not None else bound(*args, **kwargs)
            finally:
                self._inside = False
            if self._due:
                self._due = False
                self._step_ended()
            return result

        self._before = vars(optimizer).get("step")
        self._wrapper = optimizer.step = types.MethodType(step, optimizer)

    def release(self) -> None:
        """Take the wrapper off, where the optimizer still is and nobody has wrapped it again."""
        optimizer = self._counts() if self._counts is not None else None
        if optimizer is None or vars(optimizer).get("step") is not self._wrapper:
            return
        if self._before is None:
            del optimizer.step
        else:
            optimizer.step = self._before
