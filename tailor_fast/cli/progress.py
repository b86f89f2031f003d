"""Progress on stderr: a bar on a terminal, a plain line now and then when piped."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from tailor_fast._core.progress import Progress, Silent

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

_SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def shown(quiet: bool, stream: TextIO | None = None) -> Iterator[Progress]:
    """Show progress on ``stream`` (stderr) for as long as the context lasts.

    Args:
        quiet: show nothing.
        stream: where to; a bar if it is a terminal, lines otherwise.
    """
    stream = sys.stderr if stream is None else stream
    if quiet:
        yield Silent()
    elif stream.isatty():
        from rich.console import Console

        bar = Bar(Console(file=stream, highlight=False, markup=False, emoji=False))
        try:
            yield bar
        finally:
            bar.close()
    else:
        yield Lines(stream)


class _Speed:
    """Groups and bytes per second since the first group began."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._start = clock()

    def text(self, done: int, total: int, bytes_done: int) -> str:
        """``1.9/s  0.42 GB/s  ETA 0:01:07``."""
        elapsed = max(self._clock() - self._start, 1e-9)
        left = round(elapsed / max(done, 1) * (total - done))
        eta = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        return f"{done / elapsed:.1f}/s  {bytes_done / elapsed / 1e9:.2f} GB/s  ETA {eta}"


class Lines:
    """A line for every note, and one about the groups every few seconds and at the end.

    Args:
        stream: text file.
        clock: seconds.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._speed = _Speed(clock)
        self._last = clock()

    def start(self, total_groups: int) -> None:  # noqa: ARG002  the total comes with each group
        """Begin to count."""
        self._speed = _Speed(self._clock)
        self._last = self._clock()

    def group(self, name: str, done: int, total: int, bytes_done: int) -> None:
        """Print a line if the last one is old enough or this group is the last."""
        if done == total or self._clock() - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = self._clock()
            self._print(f"{done}/{total} {name}  {self._speed.text(done, total, bytes_done)}")

    def note(self, text: str) -> None:
        """Print the note."""
        self._print(text)

    def finish(self) -> None:
        """Do nothing: the last group has its line."""

    def _print(self, line: str) -> None:
        self._stream.write(f"{line}\n")
        self._stream.flush()


class Bar:
    """One line that is drawn again and again, notes above it.

    Args:
        console: rich's, on a terminal.
        clock: seconds.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._clock = clock
        self._speed = _Speed(clock)
        self._task: TaskID | None = None
        self._progress = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}", markup=False),
            console=console,
        )
        self._progress.start()

    def start(self, total_groups: int) -> None:
        """Draw an empty bar."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task("", total=total_groups, speed="")
        self._speed = _Speed(self._clock)

    def group(self, name: str, done: int, total: int, bytes_done: int) -> None:
        """Move the bar."""
        if self._task is not None:
            speed = self._speed.text(done, total, bytes_done)
            self._progress.update(
                self._task, completed=done, total=total, description=name, speed=speed
            )

    def note(self, text: str) -> None:
        """Print the note above the bar."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def finish(self) -> None:
        """Leave the bar as it is."""
        self.close()

    def close(self) -> None:
        """Give the terminal back; safe to repeat."""
        self._progress.stop()
