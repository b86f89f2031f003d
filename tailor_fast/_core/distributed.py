"""Several processes that do one run together, over ``torch.distributed``.

An exchange begins with ``gather``: one small collective of the same shape everywhere, which also
says how each process is. A process that fails joins the next one with its exit code and sentence,
so that all of them end with it, whatever they were about to exchange, without a time limit to wait
for. A process that is killed closes its connections, which ends the others' exchange as well.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from tailor_fast._core import env
from tailor_fast._core.errors import LostPeerError, PeerError, TailorError, UsageError
from tailor_fast._core.processes import ALONE, Device, Processes
from tailor_fast._core.window import Window, open_window

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_SHARED_FROM = 1 << 10  # bytes; the network takes as long to wait for as to send fewer
VALUES = 7  # numbers that a process can gather at once
_GOING, _FAILED, _LEAVING = range(3)
STOPPED_BY_USER = 130
# Nobody waits that long: failures are told, and the dead leave closed connections.
_TIMEOUT = timedelta(days=7)


class Distributed(Processes):
    """The processes of a ``torch.distributed`` group.

    Args:
        group: the group, with a backend for the CPU (gloo), and one for CUDA tensors if there are
            any to exchange (NCCL).
        device: where this process computes.
    """

    def __init__(self, group: ProcessGroup, device: Device = "cpu") -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group), device)
        self._group: ProcessGroup | None = group
        self._broken = False
        self._heard: PeerError | None = None
        self._window: Window | None = None
        self._looked = False  # for the window

    def gather(self, *values: float) -> list[tuple[float, ...]]:
        """Each process's numbers (at most ``VALUES``), in order of rank.

        Raises:
            LostPeerError: a process is gone.
            PeerError: another process failed.
        """
        heard = self._gather(_GOING, values)
        if any(state != _GOING for state, *_ in heard):
            self._listen(heard, "")
        if self._heard is not None:
            raise self._heard
        return [tuple(row[1 : 1 + len(values)]) for row in heard]

    def gather_json(self, value: Any) -> list[Any]:
        """Each process's value, in order of rank, as JSON keeps it."""
        words = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        with self.exchange():
            sizes = [int(size) for (size,) in self.gather(len(words))]
            texts = [torch.empty(size, dtype=torch.uint8) for size in sizes]
            texts[self.rank].copy_(words)
            self.gather()  # all have the memory
            for source, text in enumerate(texts):
                self.broadcast(text, source)
        return [json.loads(bytes(text.tolist())) for text in texts]

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Add the same tensors of all processes up, in place."""
        window = self._window_for(tensors)
        if window is not None:
            for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
                window.add([tensor for tensor in tensors if tensor.dtype == dtype])
            return
        for tensor in tensors:
            self._call(partial(dist.all_reduce, tensor, group=self._group))

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> None:
        """Overwrite ``tensor``, contiguous, with that of process ``source``."""
        if tensor.numel() == 0:
            return
        words = tensor.view(-1).view(torch.uint8)  # as bytes: a backend need not know the dtype
        window = self._window_for([words])
        if window is not None:
            window.broadcast(words, source)
        else:
            self._send(words, source)

    def fail(self, error: BaseException) -> PeerError | None:
        """Tell the others why this process ends, and wait until all have cleaned up.

        Called once everything that this process made is cleaned up itself.

        Returns:
            What ends this process if another failed before or at the same time.
        """
        if self._broken:
            return None
        sentence = str(error) or type(error).__name__
        with self.exchange(), suppress(LostPeerError):
            if self._heard is None:
                size = len(_words(sentence))
                self._listen(self._gather(_FAILED, (_exit_code(error), size)), sentence)
            # A launcher ends the others when the first is gone: it must not find them at it.
            self._gather(_LEAVING, ())
        return self._heard

    def leave(self) -> None:
        """Wait until all are done.

        Raises:
            LostPeerError, PeerError: as for ``gather``.
        """
        with self.exchange():
            heard = self._gather(_LEAVING, ())
            if any(state == _FAILED for state, *_ in heard):
                self._listen(heard, "")
                self._gather(_LEAVING, ())
        if self._heard is not None:
            raise self._heard

    def close(self) -> None:
        """Let go of the group: an error's traceback would keep its threads alive past the end."""
        self._group, self._window, self._broken = None, None, True

    def _gather(self, state: int, values: Sequence[float]) -> list[list[float]]:
        row = torch.zeros(1 + VALUES, dtype=torch.float64)
        row[0] = state
        row[1 : 1 + len(values)] = torch.tensor(values, dtype=torch.float64)
        rows = [torch.empty_like(row) for _ in range(self.count)]
        self._call(lambda: dist.all_gather(rows, row, group=self._group))
        return [row.tolist() for row in rows]

    def _window_for(self, tensors: Sequence[torch.Tensor]) -> Window | None:
        """Memory for a large exchange of CPU tensors, where all processes can map the same."""
        on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
        if not on_cpu or sum(tensor.nbytes for tensor in tensors) < _SHARED_FROM:
            return None
        if not self._looked:
            self._looked = True
            self._window = open_window(
                self.rank, self.count, lambda words: self._send(words, 0), self._all, self._wait
            )
        return self._window

    def _send(self, words: torch.Tensor, source: int) -> None:
        self._call(lambda: dist.broadcast(words, group=self._group, group_src=source))

    def _all(self, fact: bool) -> bool:
        yes = torch.tensor([int(fact)])
        self._call(lambda: dist.all_reduce(yes, dist.ReduceOp.MIN, group=self._group))
        return bool(yes)

    def _wait(self) -> None:
        self._call(lambda: dist.barrier(group=self._group))

    def _listen(self, heard: Sequence[Sequence[float]], sentence: str) -> None:
        """Take over the error of the first process that failed, unless that is this one."""
        failed = [rank for rank, (state, *_) in enumerate(heard) if state == _FAILED]
        if not failed:
            raise RuntimeError("the processes do not make the same exchanges")
        first, (_, code, size, *_) = failed[0], heard[failed[0]]
        words = torch.zeros(int(size), dtype=torch.uint8)
        if first == self.rank:
            words.copy_(_words(sentence))
        self.broadcast(words, first)
        if first != self.rank:
            text = bytes(words.tolist()).decode()
            self._heard = PeerError(f"process {first} of {self.count}: {text}", int(code))

    def _call(self, collective: Callable[[], object]) -> None:
        if self._broken:
            raise LostPeerError(f"process {self.rank}: the others were lost before")
        try:
            collective()
        except RuntimeError as error:
            self._broken = True
            raise LostPeerError(
                f"process {self.rank} of {self.count} lost the others ({error}); expected all of"
                " them to live until the end; look for one that was killed, out of memory perhaps"
            ) from error


def _words(sentence: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(sentence.encode() or b" "), dtype=torch.uint8)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, TailorError):
        return error.exit_code
    return STOPPED_BY_USER if isinstance(error, KeyboardInterrupt) else 1


@contextmanager
def join_processes(
    group: ProcessGroup | None = None, *, device: Device = "cpu"
) -> Iterator[Processes]:
    """Let the processes of a group do one run together.

    Every process makes the same calls inside the context, with what this yields as their
    ``processes``. When one of them fails, whatever its error is, all leave the context with it, and
    none leaves before all have cleaned up.

    Args:
        group: a ``torch.distributed`` group that exchanges CPU tensors (gloo), and CUDA tensors if
            the run computes on cards (backend ``"cpu:gloo,cuda:nccl"``); None is the default group.
        device: where this process computes.

    Yields:
        This process among the others.

    Raises:
        LostPeerError: a process was killed.
        PeerError: another process failed; the message is its own.
        UsageError: there is no default group.
    """
    if not dist.is_initialized():
        raise UsageError(
            "join_processes: there is no process group; expected one that"
            " torch.distributed.init_process_group made; start with torchrun"
        )
    group = dist.distributed_c10d._get_default_group() if group is None else group
    processes = Distributed(group, device)
    try:
        yield processes
    except BaseException as error:
        first = processes.fail(error)
        if first is not None and first is not error:
            raise first from error
        raise
    else:
        processes.leave()
    finally:
        processes.close()


@contextmanager
def launched(*, cuda: bool) -> Iterator[Processes]:
    """The processes that a launcher (torchrun) started together; one by itself without one.

    Process 0 alone heeds Ctrl-C and SIGTERM, which a launcher sends to all; the others end with it.

    Args:
        cuda: whether they compute on cards, this one on number ``LOCAL_RANK``.

    Raises:
        UsageError: more processes than cards, or the launcher's environment is not complete.
    """
    launch = env.launch()
    if launch.processes == 1:
        yield ALONE
        return
    device = torch.device("cuda", launch.local_rank) if cuda else torch.device("cpu")
    if cuda and launch.local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"LOCAL_RANK is {launch.local_rank}, but this machine has {torch.cuda.device_count()}"
            " CUDA devices; expected at most one process for each; use --device cpu, or fewer"
        )
    if cuda:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"{launch.processes} processes cannot be joined ({error}); expected the environment"
            " that torchrun makes"
        ) from error
    try:
        with _first_alone_stops(launch.rank), join_processes(device=device) as processes:
            yield processes
    finally:
        dist.destroy_process_group()


@contextmanager
def _first_alone_stops(rank: int) -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM) if rank else ()
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
