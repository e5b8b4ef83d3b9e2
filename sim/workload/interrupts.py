"""Ctrl-C stops a synthesis wherever it falls.

Python raises KeyboardInterrupt in whatever runs at the moment.  Where that is a weak reference's callback, of which
following storages takes thousands, or a script's own ``except``, it is lost: it is then raised again at the next op.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

_asked = threading.Event()


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Remember Ctrl-C until it is heard, and be silent where Python would say that it was not; nothing is changed
    where somebody else takes the signal."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    tell = sys.unraisablehook

    def tell_others(lost: sys.UnraisableHookArgs) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            tell(lost)

    signal.signal(signal.SIGINT, _ask)
    sys.unraisablehook = tell_others
    try:
        yield
        stop_if_asked()
    finally:
        sys.unraisablehook = tell
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _asked.clear()


def stop_if_asked() -> None:
    """Raise KeyboardInterrupt where Ctrl-C was pressed and not heard."""
    if _asked.is_set():
        raise KeyboardInterrupt


def _ask(number: int, frame: FrameType | None) -> None:
    _asked.set()
    raise KeyboardInterrupt
