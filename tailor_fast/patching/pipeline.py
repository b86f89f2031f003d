"""BASE and TUNED through a ring of memory: read ahead, worked on in order, written behind.

One thread reads each input, one writes; reading, hashing and writing release the GIL. The caller's
thread alone takes memory and gives it back, so that all of it happens in one order.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from tailor_fast._core.closing import Closing
from tailor_fast.checkpoint import Hashed, Side, StagedCheckpoint, TensorInfo
from tailor_fast.checkpoint.files import byte_view
from tailor_fast.patching.ring import Ring, Span

T = TypeVar("T")

# Small enough to be hashed while it is in the cache, and for Ctrl-C not to wait.
PIECE_BYTES = 1 << 20
WRITE_BYTES = 4 << 20


class StoppedError(Exception):
    """The run is over; never reaches a caller."""


class Worker(Closing):
    """Threads, as a rule one, that work off tasks in order, and end when they are stopped."""

    def __init__(self, name: str, threads: int = 1) -> None:
        """Threads start with the first tasks."""
        self._pool = ThreadPoolExecutor(threads, f"tailor-{name}")
        self._stopping = threading.Event()

    def submit(self, task: Callable[[], T]) -> Future[T]:
        """Add a task; its result or error is the future's."""
        return self._pool.submit(task)

    def pieces(self, begin: int, end: int, size: int = PIECE_BYTES) -> Iterator[tuple[int, int]]:
        """Cut ``[begin, end)`` into pieces between which a task can be stopped.

        Raises:
            StoppedError: ``close`` was called.
        """
        for at in range(begin, end, size):
            if self._stopping.is_set():
                raise StoppedError
            yield at, min(end, at + size)

    def finish(self) -> None:
        """Wait for all tasks."""
        self._pool.shutdown()

    def close(self) -> None:
        """Drop what has not begun and wait for the piece that is at work."""
        self._stopping.set()
        self._pool.shutdown(cancel_futures=True)


class Writer(Closing):
    """Writes tensors behind the caller's back, in order.

    Args:
        staged: where to.
        facts: what a later run is to know of a tensor that is written.
    """

    def __init__(
        self, staged: StagedCheckpoint, facts: Callable[[str], dict[str, Any]] | None = None
    ) -> None:
        self._staged = staged
        self._facts = facts
        self._worker = Worker("write")
        self._writes: deque[Future[None]] = deque()

    def put(
        self, name: str, tensor: torch.Tensor, arrived: Callable[[], object] | None = None
    ) -> None:
        """Write a whole tensor, contiguous on the CPU; one at a time waits for the disk.

        Args:
            name: its name.
            tensor: its words.
            arrived: waits until they are there; called in the writer's thread.
        """
        self.drain()
        after = None if arrived is None else self._worker.submit(arrived)
        self.write(name, 0, byte_view(tensor, writable=False), after)

    def write(
        self, name: str, begin: int, data: memoryview, after: Future[Any] | None = None
    ) -> Future[None]:
        """Write ``data``, which must stay as it is until then.

        Args:
            name: tensor.
            begin: byte of the tensor at which ``data`` starts.
            data: the bytes.
            after: what must be done before; its error becomes that of the write.

        Raises:
            DiskFullError, TransferError: an earlier write failed.
        """
        while self._writes and self._writes[0].done():
            self._writes.popleft().result()

        def task() -> None:
            if after is not None:
                after.result()
            for at, end in self._worker.pieces(0, len(data), WRITE_BYTES):
                self._staged.write(name, begin + at, data[at:end])
            if self._facts is not None and self._staged.is_written(name):
                self._staged.note(name, self._facts(name))

        self._writes.append(self._worker.submit(task))
        return self._writes[-1]

    def drain(self) -> None:
        """Wait until everything is written; raises the error of a write."""
        while self._writes:
            self._writes.popleft().result()

    def close(self) -> None:
        """Stop; what was not written is lost."""
        self._worker.close()


@dataclass(frozen=True)
class Part:
    """Bytes ``[begin, end)`` of a tensor, as they are handed to the caller.

    Attributes:
        name: tensor.
        begin: first byte.
        end: one past the last.
        sides: which of the two inputs the caller wants to see; the first is written over.
    """

    name: str
    begin: int
    end: int
    sides: tuple[Side, ...] = ("base", "tuned")


@dataclass
class Loaded:
    """A part in memory."""

    part: Part
    spans: dict[Side, Span]
    reads: list[Future[None]] = field(default_factory=list)

    def view(self, side: Side) -> memoryview:
        """The bytes of one input."""
        return self.spans[side].view

    def words(self, side: Side, info: TensorInfo) -> torch.Tensor:
        """The bytes of one input as rows of the matrix ``info``, not copied."""
        dtype = info.torch_dtype
        if dtype is None:
            raise TypeError(f"{info.name!r}: torch has no dtype {info.dtype}")
        return torch.frombuffer(self.view(side), dtype=dtype).view(-1, info.shape[-1])


class Pipeline(Closing):
    """The two inputs, the output and the memory in between.

    Leaving the ``with`` block stops the threads; a task is waited for up to its next MiB.

    Args:
        base: BASE.
        tuned: TUNED.
        writer: the output.
        ring: memory for everything on its way.
    """

    def __init__(self, base: Hashed, tuned: Hashed, writer: Writer, ring: Ring) -> None:
        self._inputs: dict[Side, Hashed] = {"base": base, "tuned": tuned}
        self._readers: dict[Side, Worker] = {"base": Worker("base"), "tuned": Worker("tuned")}
        self._writer = writer
        self._ring = ring
        self._unseen: deque[Future[None]] = deque()
        self._held: list[tuple[Future[None], Span]] = []  # until what needs it is done

    def stream(self, parts: Iterable[Part]) -> Iterator[Loaded]:
        """Yield the parts in order, each read while the caller works on those before it.

        Each must be given to ``write`` or ``drop`` before the next is asked for. An input that a
        part does not show is read for its digest, beginning with the tensor's first part.

        Raises:
            TruncatedError, TransferError: an input cannot be read.
            DiskFullError, TransferError: what was given to ``write`` cannot be written.
        """
        waiting: deque[Loaded] = deque()
        for part in parts:
            while (loaded := self._begin(part)) is None:
                if waiting:
                    yield _ready(waiting.popleft())
                elif not self._make_room(wait=True):
                    raise RuntimeError(f"no room for a part of {part.name!r}")
            waiting.append(loaded)
        while waiting:
            yield _ready(waiting.popleft())
        while self._unseen:
            self._unseen.popleft().result()

    def write(self, loaded: Loaded, side: Side, after: Future[None] | None = None) -> None:
        """Write what stands in the memory of ``side`` as the output's bytes of this part.

        Args:
            loaded: the part.
            side: whose memory.
            after: what makes the bytes, in another thread.
        """
        part = loaded.part
        written = self._writer.write(part.name, part.begin, loaded.view(side), after)
        for other, span in loaded.spans.items():
            self._held.append((after if other != side and after is not None else written, span))

    def drop(self, loaded: Loaded) -> None:
        """Give the part's memory back."""
        for span in loaded.spans.values():
            self._ring.give_back(span)

    def _begin(self, part: Part) -> Loaded | None:
        """Start to read a part; None without room for it."""
        self._make_room(wait=False)
        spans: dict[Side, Span] = {}
        for side in part.sides:
            span = self._ring.take(part.end - part.begin)
            if span is None:
                for taken in spans.values():
                    self._ring.give_back(taken)
                return None
            spans[side] = span
        reads = [self._read(side, part, span) for side, span in spans.items()]
        if part.begin == 0:
            unseen = [side for side in self._inputs if side not in spans]
            self._unseen += [self._digest(side, part.name) for side in unseen]
        return Loaded(part, spans, reads)

    def _make_room(self, *, wait: bool) -> bool:
        """Take back what is no longer needed; False when there was nothing to wait for."""
        if wait:
            futures.wait([done for done, _ in self._held], return_when=futures.FIRST_COMPLETED)
        held, self._held = self._held, []
        for done, span in held:
            if done.done():
                done.result()
                self._ring.give_back(span)
            else:
                self._held.append((done, span))
        return bool(held)

    def _read(self, side: Side, part: Part, span: Span) -> Future[None]:
        reader, source = self._readers[side], self._inputs[side]

        def task() -> None:
            for at, end in reader.pieces(part.begin, part.end):
                source.read_into(part.name, span.view[at - part.begin :], at, end)

        return reader.submit(task)

    def close(self) -> None:
        """Stop reading."""
        for reader in self._readers.values():
            reader.close()

    def _digest(self, side: Side, name: str) -> Future[None]:
        reader, source = self._readers[side], self._inputs[side]

        def task() -> None:
            if source.unread(name):
                buffer = bytearray(PIECE_BYTES)
                for at, end in reader.pieces(0, source.checkpoint.tensors[name].nbytes):
                    source.read_into(name, buffer, at, end)

        return reader.submit(task)


def _ready(loaded: Loaded) -> Loaded:
    for read in loaded.reads:
        read.result()
    return loaded
