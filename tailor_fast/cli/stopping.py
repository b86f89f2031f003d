"""Ctrl-C and SIGTERM where a job stands well: between two groups, when what it has is finished."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tailor_fast._core.progress import Progress

_STOPS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stopped_between_groups(progress: Progress) -> Iterator[Progress]:
    """Hold the first Ctrl-C or SIGTERM back until the group that is at work is finished.

    A second one is not held back, nor is one before the first group or after the last.

    Args:
        progress: told about each step.

    Yields:
        The same, which also stops the job.
    """
    if threading.current_thread() is not threading.main_thread():
        yield progress  # only the main thread may set handlers, or is told of signals
        return
    stopper = _Stopper(progress)
    stopper.handlers = {number: signal.signal(number, stopper.caught) for number in _STOPS}
    try:
        yield stopper
    finally:
        for number, handler in stopper.handlers.items():
            signal.signal(number, handler)


class _Stopper:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._between = False
        self._number: int | None = None
        self.handlers: dict[signal.Signals, Any] = {}

    def caught(self, number: int, frame: FrameType | None) -> None:
        if not self._between or self._number is not None:
            self._stop(number, frame)
            return
        self._number = number
        with contextlib.suppress(RuntimeError):  # the stream was being written to
            self._progress.note("stopping when this group is finished; once more to stop at once")

    def start(self, total_groups: int) -> None:
        self._progress.start(total_groups)
        self._between = total_groups > 0

    def group(self, name: str, done: int, total: int, bytes_done: int) -> None:
        self._progress.group(name, done, total, bytes_done)
        self._between = done < total
        if self._number is not None:
            self._stop(self._number, None)

    def note(self, text: str) -> None:
        self._progress.note(text)

    def finish(self) -> None:
        self._progress.finish()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        handler = self.handlers[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)
        elif handler == signal.SIG_DFL:
            raise KeyboardInterrupt
