"""Copies between the machine's memory and a GPU that run beside the GPU's work.

All streams and events of the package are here. Four ways are offered, and each keeps two rules:
nothing is read before its copy is done, and no memory is written again before its last reader is.

- ``to_device``: a tensor that is read once, on the stream of its readers.
- ``panels``: matrices that wait in the machine's memory, brought to the device piece by piece, the
  next piece while the caller computes with this one.
- ``Outbox``: results on their way to a writer's thread, while the device goes on.
- ``own_stream`` and ``page_locked``: threads that each bring their own work and take it back.

Where both sides are one memory nothing is copied, and nothing waits.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

_log = logging.getLogger("tailor_fast")
_streams = threading.local()


def to_device(
    tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """``tensor`` on ``device``, itself where it is there; the host waits for no page-locked one.

    Page-locked memory of torch's own is not given out again before the copy is done, even if the
    caller drops the tensor at once.
    """
    beside = device.type == "cuda" and tensor.is_pinned()
    return tensor.to(device, dtype, non_blocking=beside)


def panels(
    matrix: torch.Tensor, rows: int, device: torch.device
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Some rows of ``matrix`` at a time, on ``device``; two pieces are there at once.

    A piece belongs to the current stream, as anything that is made there. It must not be used after
    the next one is asked for.

    Args:
        matrix: ``[all rows, cols]``; on another device page-locked, or copies do not overlap.
        rows: of a piece; the last one may have fewer.
        device: where the pieces are wanted.

    Yields:
        Which rows they are, and the piece ``[rows, cols]``.
    """
    places = [slice(at, min(at + rows, len(matrix))) for at in range(0, len(matrix), rows)]
    if matrix.device == device:
        for place in places:
            yield place, matrix[place]
        return
    current = torch.cuda.current_stream(device)
    beside = torch.cuda.Stream(device)
    slots = [_Slot(matrix, places[0], beside) for _ in places[:2]]
    beside.wait_stream(current)  # the slots' memory may still be read by what had it before
    for number, place in enumerate(places[:2]):
        slots[number].fill(matrix[place])
    for number, place in enumerate(places):
        slot = slots[number % 2]
        current.wait_event(slot.filled)
        yield place, slot.piece
        slot.read.record(current)
        if number + 2 < len(places):
            slot.fill(matrix[places[number + 2]])


class _Slot:
    """Room for one piece, and when it was filled and read."""

    def __init__(self, like: torch.Tensor, place: slice, stream: Any) -> None:
        """On the device of ``stream``, which alone writes."""
        shape = (place.stop - place.start, *like.shape[1:])
        self._room = torch.empty(shape, dtype=like.dtype, device=stream.device)
        self._room.record_stream(stream)  # its memory is not given out before the last copy is done
        self._stream = stream
        self.filled, self.read = torch.cuda.Event(), torch.cuda.Event()
        self.piece = self._room

    def fill(self, source: torch.Tensor) -> None:
        """Begin to copy ``source``; it waits for what reads the piece before."""
        self._stream.wait_event(self.read)  # of the first piece nothing was recorded: no wait
        with torch.cuda.stream(self._stream):
            self.piece = self._room[: len(source)]
            self.piece.copy_(source, non_blocking=True)
        self.filled.record(self._stream)


class Outbox:
    """Tensors on their way from a device to a thread that writes them.

    There is room for two in page-locked memory: what was sent before the last one must have been
    written when the next is sent. For one thread.
    """

    def __init__(self) -> None:
        """Room is made as it is needed."""
        self._rooms: list[torch.Tensor | None] = [None, None]
        self._beside: Any = None

    def send(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Callable[[], object]]:
        """Begin to copy ``tensor``, which is contiguous.

        Returns:
            Its words in the machine's memory, and what waits for them to be there: to be called by
            any thread before it reads them.
        """
        if tensor.device.type == "cpu":
            return tensor, _nothing
        if self._beside is None:
            self._beside = torch.cuda.Stream(tensor.device)
        words = tensor.view(-1).view(torch.uint8)
        room = self._rooms.pop(0)
        if room is None or len(room) < len(words):
            room = torch.empty(len(words), dtype=torch.uint8, pin_memory=True)
        self._rooms.append(room)
        there = room[: len(words)]
        self._beside.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._beside):
            there.copy_(words, non_blocking=True)
        tensor.record_stream(self._beside)  # the caller may drop it at once
        arrived = torch.cuda.Event()
        arrived.record(self._beside)
        return there.view(tensor.dtype).view(tensor.shape), arrived.synchronize


def _nothing() -> None:
    """What there is to wait for on a CPU."""


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Give this thread's work a stream of its own, and wait for all of it at the end.

    So threads that each copy, compute and copy back do so beside each other, and nothing passes
    from stream to stream: what the block makes on the device must not outlive it.
    """
    if device.type != "cuda":
        yield
        return
    stream = _stream_of_this_thread(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        stream.synchronize()


def _stream_of_this_thread(device: torch.device) -> Any:
    """The same each time, so that the allocator finds what the last block gave back."""
    known = _streams.__dict__.setdefault("by_device", {})
    if device not in known:
        known[device] = torch.cuda.Stream(device)
    return known[device]


@contextmanager
def page_locked(memory: memoryview, device: torch.device) -> Iterator[None]:
    """Lock ``memory`` for copies to and from a GPU: faster by far, and beside other work.

    Where the system does not allow it, copies are as slow as they are without, and the log says so.
    """
    if device.type != "cuda":
        yield
        return
    runtime: Any = torch.cuda.cudart()
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    with torch.cuda.device(device):
        failed = int(runtime.cudaHostRegister(address, len(memory), 0))
    if failed:
        _log.warning("%d bytes cannot be page-locked (CUDA error %d)", len(memory), failed)
        with suppress(RuntimeError):  # the error that the next kernel would else report as its own
            torch.zeros(1, device=device)
    try:
        yield
    finally:
        if not failed:
            runtime.cudaHostUnregister(address)
