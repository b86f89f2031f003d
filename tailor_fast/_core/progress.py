"""What a job says about itself while it runs. How that is shown is the caller's business."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told about each step of a job, in the calling thread; must be quick."""

    def start(self, total_groups: int) -> None:
        """The number of groups is known; the first one begins."""

    def group(self, name: str, done: int, total: int, bytes_done: int) -> None:
        """A group is finished.

        Args:
            name: its first layer.
            done: groups finished so far.
            total: groups in all.
            bytes_done: bytes of patched weights so far.
        """

    def note(self, text: str) -> None:
        """A stage begins, or something was decided that the user should know; one sentence."""

    def finish(self) -> None:
        """The job is done; its output is complete."""


class Silent:
    """Says nothing."""

    def start(self, total_groups: int) -> None:
        """Do nothing."""

    def group(self, name: str, done: int, total: int, bytes_done: int) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""
