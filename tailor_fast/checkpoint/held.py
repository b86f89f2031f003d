"""A checkpoint that several jobs read one after the other, and the disk once."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tailor_fast.checkpoint.errors import AnyPath
from tailor_fast.checkpoint.files import Snapshot, window
from tailor_fast.checkpoint.header import CHECKPOINT_LIMITS
from tailor_fast.checkpoint.hub import local_path
from tailor_fast.checkpoint.index import locate
from tailor_fast.checkpoint.reader import Checkpoint

State = tuple[tuple[Path, Snapshot, str], ...]


@dataclass
class Words:
    """One tensor's memory, of which the first ``filled`` bytes are read."""

    view: memoryview
    filled: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Held:
    """Words of a checkpoint that stay in memory when it is closed, for whoever opens it next.

    Each byte is read from disk at most once between ``keep`` and ``drop``. Files that are not what
    they were (place, identity, size, time, header) are read anew.

    Attributes:
        size: bytes of all tensors of what was opened last.
        digests: of tensors that were read whole while all was kept.
    """

    def __init__(self) -> None:
        """Nothing is kept yet."""
        self.size = 0
        self.digests: dict[str, str] = {}
        self._state: State = ()
        self._sizes: dict[str, int] = {}
        self._words: dict[str, Words] = {}

    def open(self, path: AnyPath) -> Checkpoint:
        """``open_checkpoint``, with tensors from memory as far as they are there.

        Raises:
            CheckpointError: as for ``open_checkpoint``.
        """
        checkpoint = _HeldCheckpoint(self, local_path(path))
        found = ((s.path.resolve(), s.snapshot, s.header_sha256) for s in checkpoint.shards)
        if (state := tuple(found)) != self._state:
            self.drop()
            self._state = state
        self.size = checkpoint.total_bytes
        self._sizes = {name: info.nbytes for name, info in checkpoint.tensors.items()}
        return checkpoint

    @property
    def kept_bytes(self) -> int:
        """Memory that is taken, in bytes."""
        return self.size if self._words else 0

    def keep(self) -> bool:
        """Keep from now on what is read of the checkpoint that was opened last.

        Returns:
            Whether the system gives the memory for all of it.
        """
        if self._words:
            return True
        try:
            memory = torch.empty(self.size, dtype=torch.uint8)
        except RuntimeError:  # torch's for memory that there is not
            return False
        view, begin = memory.numpy().data, 0
        for name, size in self._sizes.items():
            self._words[name] = Words(view[begin : begin + size])
            begin += size
        return True

    def drop(self) -> None:
        """Give the memory back."""
        self._words, self.digests = {}, {}

    def words(self, name: str) -> Words | None:
        """Memory of tensor ``name``; None while nothing is kept."""
        return self._words.get(name)


class _HeldCheckpoint(Checkpoint):
    """Reads through a ``Held``."""

    def __init__(self, held: Held, path: Path) -> None:
        self._held = held
        super().__init__(path, locate(path), drop_cache=False, limits=CHECKPOINT_LIMITS)

    def read_into(self, name: str, buffer: object, begin: int = 0, end: int | None = None) -> int:
        """See ``Checkpoint.read_into``; what lies before ``end`` is read and kept, too."""
        words = self._held.words(name)
        if words is None:
            return super().read_into(name, buffer, begin, end)
        view, end = window(name, self.tensors[name].nbytes, buffer, begin, end)
        self._vouched = False
        with words.lock:
            if words.filled < end:
                super().read_into(name, words.view[words.filled : end], words.filled, end)
                words.filled = end
        if begin < end:  # unlike an assignment of slices, this lets other threads run
            source = torch.frombuffer(
                words.view, dtype=torch.uint8, count=end - begin, offset=begin
            )
            torch.frombuffer(view, dtype=torch.uint8).copy_(source)
        return end - begin
