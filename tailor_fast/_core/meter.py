"""How many bytes of tensors are alive: what a device would hold, measured where there is none.

A dispatch mode sees every tensor that an op makes; each storage counts once, for as long as it
lives, at the size that it has then. Run on ``meta`` tensors it measures what a pass would take
without taking it; on a CPU it stands for the allocator of a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tailor_fast._core.library import NAMESPACE


class Meter(TorchDispatchMode):
    """Counts the storages that ops make while it is entered, also within the ops of this library.

    Args:
        kind: of the device whose storages count, ``cpu`` or ``meta``.

    Attributes:
        peak: most bytes alive at once since the meter was made or ``reset``.
    """

    def __init__(self, kind: str = "cpu") -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no types
        self._kind = kind
        self._alive: dict[int, StorageWeakRef] = {}
        self._sizes: dict[int, int] = {}
        self._live = 0
        self.peak = 0

    @property
    def live(self) -> int:
        """Bytes alive now."""
        self._sweep()
        return self._live

    def reset(self) -> int:
        """Begin a new peak; returns the last one."""
        peak, self.peak = self.peak, self.live
        return peak

    def forget(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count the storage of ``tensor`` no more: it lies elsewhere. Returns ``tensor``."""
        key = tensor.untyped_storage()._cdata
        if self._alive.pop(key, None) is not None:
            self._live -= self._sizes.pop(key)
        return tensor

    def _sweep(self) -> None:
        for key, reference in list(self._alive.items()):
            size = 0
            if not reference.expired():
                storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
                size = 0 if storage is None else storage.nbytes()
            else:
                del self._alive[key]
            self._live += size - self._sizes[key]
            if key in self._alive:
                self._sizes[key] = size
            else:
                del self._sizes[key]

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = StorageWeakRef(storage)
            self._sizes[key] = storage.nbytes()
            self._live += storage.nbytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        output = self._run(func, args, kwargs)
        made = (leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))
        here = [tensor for tensor in made if tensor.device.type == self._kind]
        new = [t for t in here if t.untyped_storage()._cdata not in known]
        if new:
            self._sweep()
            for tensor in new:
                self._note(tensor.untyped_storage())
            self.peak = max(self.peak, self._live)
        return output

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        if func.namespace != NAMESPACE or any(t.device.type != "cpu" for t in tensors):
            return func(*args, **kwargs)
        with self:  # the op's own temporaries
            return func._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
