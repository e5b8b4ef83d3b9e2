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
from typing import Any, cast

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
        self._own = False
        self._original: Any = None
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
        """``step`` of this one object, so that the cut comes after its return; a method, as schedulers expect.

        No reference to the optimizer stays here: when the script lets go of it, it is gone.
        """
        self._own = "step" in vars(optimizer)
        self._original = original = _function_of(optimizer.step)

        @functools.wraps(original)
        def step(self_: Any, *args: Any, **kwargs: Any) -> Any:
            self._inside = True
            try:
                result = original(self_, *args, **kwargs)
            finally:
                self._inside = False
            if self._due:
                self._due = False
                self._step_ended()
            return result

        self._wrapper = step
        optimizer.step = types.MethodType(step, optimizer)

    def release(self) -> None:
        """Take the wrapper off, where the optimizer still is and nobody has wrapped it again."""
        optimizer = self._counts() if self._counts is not None else None
        if optimizer is None or getattr(vars(optimizer).get("step"), "__func__", None) is not self._wrapper:
            return
        if self._own:
            optimizer.step = types.MethodType(self._original, optimizer)
        else:
            del optimizer.step


def _function_of(method: Any) -> Callable[..., Any]:
    """What takes the object first: the method's function, or whatever callable was put in its place."""
    function = getattr(method, "__func__", None)
    if function is not None:
        return cast(Callable[..., Any], function)

    @functools.wraps(method)  # with the mark by which a scheduler knows its own wrapper
    def unbound(_: Any, *args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return unbound
