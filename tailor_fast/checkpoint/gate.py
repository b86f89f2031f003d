"""Closing while other threads work: the number of a closed file may already be another file's."""

import threading
import types

from tailor_fast.checkpoint.errors import AnyPath, shown_path


class Gate:
    """A ``with`` block that can be entered until the gate is shut; shutting waits for those inside.

    Without it a thread that reads or writes while another closes would silently read or write
    whatever file was opened next.
    """

    def __init__(self, path: AnyPath) -> None:
        """Start open; ``path`` is for the message."""
        self._path = path
        self._inside = 0
        self._shut = False
        self._left = threading.Condition()

    def __enter__(self) -> None:
        """Go in; raises ``ValueError`` when the gate is shut."""
        with self._left:
            if self._shut:
                raise ValueError(f"{shown_path(self._path)}: is closed")
            self._inside += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        """Come out."""
        with self._left:
            self._inside -= 1
            self._left.notify_all()

    def shut(self) -> bool:
        """Let nobody in any more and wait until all are out; False when it was shut before."""
        with self._left:
            first, self._shut = not self._shut, True
            self._left.wait_for(lambda: self._inside == 0)
            return first
