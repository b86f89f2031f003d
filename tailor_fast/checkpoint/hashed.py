"""A checkpoint whose tensors are hashed as they pass by, so that each is read once."""

from collections.abc import Iterator

import torch

from tailor_fast.checkpoint.hashing import TensorHasher, checkpoint_root
from tailor_fast.checkpoint.reader import Checkpoint


class Hashed:
    """An open checkpoint and the digests of what was read whole so far.

    Attributes:
        checkpoint: the open files.
        digests: tensor name -> digest of what was read whole so far.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.digests: dict[str, str] = {}

    def read(self, name: str) -> torch.Tensor:
        """Return tensor ``name``, owned by the caller."""
        tensor = self.checkpoint.read(name)
        if name not in self.digests:
            hasher = self._hasher(name)
            hasher.update(tensor)
            self.digests[name] = hasher.hexdigest()
        return tensor

    def blocks(self, name: str, buffer: bytearray) -> Iterator[tuple[int, memoryview]]:
        """Read tensor ``name`` through ``buffer``: yields (first byte, bytes)."""
        hasher = self._hasher(name)
        size = self.checkpoint.tensors[name].nbytes
        for begin in range(0, size, len(buffer)):
            end = min(size, begin + len(buffer))
            self.checkpoint.read_into(name, buffer, begin, end)
            view = memoryview(buffer)[: end - begin]
            hasher.update(view)
            yield begin, view
        self.digests[name] = hasher.hexdigest()

    def finish(self, buffer: bytearray) -> dict[str, str]:
        """Hash what was not read so far, and return every digest."""
        for name in self.checkpoint.tensors:
            if name not in self.digests:
                for _ in self.blocks(name, buffer):
                    pass
        return self.digests

    def _hasher(self, name: str) -> TensorHasher:
        info = self.checkpoint.tensors[name]
        return TensorHasher(info.dtype, info.shape)

    def root(self, buffer: bytearray) -> str:
        """Identity of the whole checkpoint, however it is distributed over files."""
        return checkpoint_root(self.finish(buffer))
