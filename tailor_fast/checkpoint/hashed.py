"""A checkpoint whose tensors are hashed as they pass by, so that each is read once."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch

from tailor_fast.checkpoint.files import byte_view
from tailor_fast.checkpoint.hashing import TensorHasher, checkpoint_root
from tailor_fast.checkpoint.source import TensorSource


class Hashed:
    """An open checkpoint and the digests of what was read whole so far.

    Different tensors may be read by different threads; the parts of one tensor by one at a time.

    Attributes:
        checkpoint: the open files, or a view over them.
        digests: tensor name -> digest of what was read whole so far.

    Args:
        checkpoint: what is read.
        base: what a view is made of, hashed on its own.
        shared: tensors that are the base's own words, so that one reading serves both.
        digests: what is known already; filled in.
    """

    def __init__(
        self,
        checkpoint: TensorSource,
        *,
        base: Hashed | None = None,
        shared: Collection[str] = (),
        digests: dict[str, str] | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self._base = base
        self._shared = frozenset(shared)
        self.digests: dict[str, str] = {} if digests is None else digests
        self._begun: dict[str, tuple[TensorHasher, int]] = {}  # and how many bytes it has seen

    def read(self, name: str) -> torch.Tensor:
        """Return tensor ``name``, owned by the caller."""
        tensor = self.checkpoint.empty(name)
        self.read_into(name, tensor)
        return tensor

    def read_into(self, name: str, buffer: object, begin: int = 0, end: int | None = None) -> int:
        """``Checkpoint.read_into``; bytes that come in order are hashed on the way."""
        count = self.checkpoint.read_into(name, buffer, begin, end)
        if name not in self.digests:
            self._hash(name, begin, byte_view(buffer, writable=False)[:count])
        return count

    def blocks(self, name: str, buffer: bytearray | memoryview) -> Iterator[tuple[int, memoryview]]:
        """Read tensor ``name`` through ``buffer``: yields (first byte, bytes)."""
        size = self.checkpoint.tensors[name].nbytes
        for begin in range(0, max(1, size), len(buffer)):
            count = self.read_into(name, buffer, begin, min(size, begin + len(buffer)))
            if count:
                yield begin, memoryview(buffer)[:count]

    def unread(self, name: str) -> bool:
        """Whether tensor ``name`` must be read for its digest."""
        if name in self.digests or name not in self.checkpoint.tensors:
            return False
        return self._base is None or name not in self._shared

    def digest(self, name: str, buffer: bytearray | memoryview) -> str:
        """Return the digest of tensor ``name``, which is read if it was not."""
        if name not in self.digests and not self.unread(name) and self._base is not None:
            self.digests[name] = self._base.digest(name, buffer)
        if name not in self.digests:
            for _ in self.blocks(name, buffer):
                pass
        return self.digests[name]

    def finish(self, buffer: bytearray | memoryview) -> dict[str, str]:
        """Hash what was not read so far, and return every digest in the order of the files."""
        return {name: self.digest(name, buffer) for name in self.checkpoint.tensors}

    def root(self, buffer: bytearray | memoryview) -> str:
        """Identity of the whole checkpoint, however it is distributed over files."""
        return checkpoint_root(self.finish(buffer))

    def _hash(self, name: str, begin: int, view: memoryview) -> None:
        info = self.checkpoint.tensors[name]
        if begin == 0:
            self._begun[name] = TensorHasher(info.dtype, info.shape), 0
        hasher, seen = self._begun.get(name, (None, -1))
        if hasher is None or seen != begin:
            return
        hasher.update(view)
        self._begun[name] = hasher, seen + len(view)
        if seen + len(view) == info.nbytes:
            self.digests[name] = hasher.hexdigest()
            del self._begun[name]
