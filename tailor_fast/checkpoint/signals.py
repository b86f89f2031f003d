"""Ctrl-C and SIGTERM held back for a moment."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_HELD = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def signals_held() -> Iterator[None]:
    """Let the handlers of Ctrl-C and SIGTERM run at the end of the block instead of inside it.

    For steps that must not be left half done. Outside the main thread, which alone runs handlers,
    nothing needs to be held.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[tuple[int, FrameType | None]] = []
    before = {}
    for number in _HELD:
        if signal.getsignal(number) is not None:  # None: installed by something that is not Python
            before[number] = signal.signal(number, lambda *signalled: caught.append(signalled))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for signalled, frame in caught:
            handler = before[signal.Signals(signalled)]
            if callable(handler):
                handler(signalled, frame)
            elif handler == signal.SIG_DFL:
                signal.raise_signal(signalled)
