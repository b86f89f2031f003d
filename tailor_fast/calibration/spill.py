"""Activations of suspended forward passes: on the device, past a budget in the machine's memory,
past another in a file.

While a lane runs, a dispatch mode notes each tensor storage that an op of the lane creates. What is
still alive when the lane stops is what the lane needs to go on; past a budget it is copied away and
its storage shrunk to nothing, and brought back before the lane runs again. The lanes run in a fixed
cycle, so the lane that stopped last is the one needed last: it is the one that goes.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tailor_fast._core.errors import StorageError
from tailor_fast.calibration.placement import copy_to_host


@dataclass
class _Held:
    """Storages that one lane keeps alive, and where they are when spilled."""

    live: dict[int, StorageWeakRef] = field(default_factory=dict)
    spilled: list[tuple[torch.UntypedStorage, int, int]] = field(default_factory=list)
    parked: list[tuple[torch.UntypedStorage, torch.Tensor]] = field(default_factory=list)
    offset: int = 0
    capacity: int = 0
    resident: int = 0  # bytes on the device
    waiting: int = 0  # bytes in the machine's memory


class ActivationSpill:
    """Keeps the activations of suspended lanes under ``budget`` bytes.

    Args:
        budget: bytes that may stay in the machine's memory while lanes are suspended.
        directory: where the file is made; it has no name there and vanishes with the process.
        on_device: bytes that may stay where the ops made them, apart from ``budget``; None where
            that is the machine's memory.

    Attributes:
        spilled_bytes: written to the file so far.
        parked_bytes: copied from the device to the machine's memory so far.
        peak_resident: most bytes of suspended lanes on the device, or in memory without one.
        peak_waiting: most bytes of them in the machine's memory beside a device.
    """

    def __init__(self, budget: int, directory: Path, on_device: int | None = None) -> None:
        self._budget = budget
        self._on_device = on_device
        self.parked_bytes = 0
        self.peak_waiting = 0
        self._lanes: dict[int, _Held] = {}
        self._owner: dict[int, int] = {}
        self._end = 0
        self.spilled_bytes = 0
        self.peak_resident = 0
        try:
            self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115  # closed in close()
        except OSError as error:
            raise StorageError(
                f"{directory}: no file for activations can be made ({error.strerror}); expected a"
                " writable directory; raise --max-ram"
            ) from error

    def close(self) -> None:
        """Drop the file."""
        self._file.close()

    @contextmanager
    def running(self, lane: int) -> Iterator[None]:
        """Bring the lane's activations back, and note what it creates while it runs."""
        self.restore(lane)
        with _Tracker(self, lane):
            yield

    def note(self, lane: int, storage: torch.UntypedStorage) -> None:
        """Note a storage that an op of the lane created."""
        key = storage._cdata
        self._lanes.setdefault(lane, _Held()).live[key] = StorageWeakRef(storage)
        self._owner[key] = lane

    def touch(self, storage: torch.UntypedStorage, lane: int) -> None:
        """Bring back another lane's storage that an op of this lane reads (a shared cache)."""
        owner = self._owner.get(storage._cdata)
        if owner is not None and owner != lane and storage.nbytes() == 0:
            self.restore(owner)

    def settle(self, lane: int) -> None:
        """Count what the stopped lane holds; write it out when the budget is exceeded."""
        held = self._lanes.get(lane)
        if held is None:
            return
        storages = self._alive(held)
        held.resident = sum(storage.nbytes() for storage in storages)
        lanes = self._lanes.values()
        resident = sum(other.resident for other in lanes)
        if resident > (self._budget if self._on_device is None else self._on_device):
            resident -= held.resident
            waiting = sum(other.waiting for other in lanes) + held.resident
            if self._on_device is not None and waiting <= self._budget:
                self._park(held, storages)
                self.peak_waiting = max(self.peak_waiting, waiting)
            else:
                self._write(held, storages)
            held.resident = 0
        self.peak_resident = max(self.peak_resident, resident)

    def restore(self, lane: int) -> None:
        """Bring the lane's storages back; nothing happens when they are there."""
        held = self._lanes.get(lane)
        if held is None:
            return
        for storage, offset, size in held.spilled:
            storage.resize_(size)
            self._transfer(storage, offset, write=False)
            held.resident += size
        for storage, host in held.parked:
            storage.resize_(host.numel())
            _bytes(storage).copy_(host)
            held.resident += host.numel()
        held.spilled, held.parked, held.waiting = [], [], 0

    def _alive(self, held: _Held) -> list[torch.UntypedStorage]:
        storages = []
        for key, reference in list(held.live.items()):
            if reference.expired():
                del held.live[key]
                self._owner.pop(key, None)
                continue
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is not None and storage.nbytes() and storage.resizable():
                storages.append(storage)
        return storages

    def _park(self, held: _Held, storages: list[torch.UntypedStorage]) -> None:
        for storage in storages:
            held.parked.append((storage, copy_to_host(_bytes(storage))))
            storage.resize_(0)
        held.waiting = held.resident
        self.parked_bytes += held.resident

    def _write(self, held: _Held, storages: list[torch.UntypedStorage]) -> None:
        total = sum(storage.nbytes() for storage in storages)
        if total > held.capacity:
            held.offset, held.capacity = self._end, total
            self._end += total
        offset = held.offset
        for storage in storages:
            size = storage.nbytes()
            self._transfer(storage, offset, write=True)
            held.spilled.append((storage, offset, size))
            storage.resize_(0)
            offset += size
        self.spilled_bytes += total

    def _transfer(self, storage: torch.UntypedStorage, offset: int, *, write: bool) -> None:
        words = _bytes(storage)
        host = words
        if words.device.type != "cpu":
            host = words.cpu() if write else torch.empty(words.shape, dtype=words.dtype)
        # Not through numpy, which would forbid ever resizing the storage.
        view = memoryview((ctypes.c_ubyte * host.numel()).from_address(host.data_ptr())).cast("B")
        done = 0
        try:
            while done < len(view):
                if write:
                    step = os.pwrite(self._file.fileno(), view[done:], offset + done)
                else:
                    step = os.preadv(self._file.fileno(), [view[done:]], offset + done)
                if step == 0:
                    raise OSError(0, "the file is shorter than what was written to it")
                done += step
        except OSError as error:
            raise StorageError(
                f"activations cannot be {'written to' if write else 'read from'} disk"
                f" ({error.strerror}) at {offset + done} bytes; free disk space, or raise --max-ram"
            ) from error
        if not write and host is not words:
            words.copy_(host)


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class _Tracker(TorchDispatchMode):
    """Notes the storages that ops create while one lane runs."""

    def __init__(self, spill: ActivationSpill, lane: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no types
        self._spill = spill
        self._lane = lane

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = set()
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                storage = leaf.untyped_storage()
                known.add(storage._cdata)
                self._spill.touch(storage, self._lane)
        output = func(*args, **kwargs)
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                storage = leaf.untyped_storage()
                if storage._cdata not in known:
                    self._spill.note(self._lane, storage)
        return output
