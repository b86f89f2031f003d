"""What the processes of one run do together; a run in one process does all of it alone.

Every process makes the same exchanges in the same order. ``Processes`` is one process by itself;
``distributed.Distributed`` has the same methods over a group of them.
"""

from __future__ import annotations

import hashlib
import json
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tailor_fast._core.errors import UsageError

Device = torch.device | str


class Processes:
    """One process: there is nobody to exchange anything with.

    Attributes:
        rank: number of this process, from 0; process 0 alone writes and reports.
        count: how many there are.
        device: where tensors are made that a process has nothing to put into.
        seconds: time spent in exchanges, waiting for the others included.
    """

    def __init__(self, rank: int = 0, count: int = 1, device: Device = "cpu") -> None:
        self.rank = rank
        self.count = count
        self.device = torch.device(device)
        self.seconds = 0.0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.rank}, {self.count}, {str(self.device)!r})"

    def share_of(self, rank: int, size: int) -> slice:
        """The part of ``size`` things in a row that is process ``rank``'s; equal to within one."""
        return slice(size * rank // self.count, size * (rank + 1) // self.count)

    def share(self, size: int) -> slice:
        """This process's part of ``size`` things in a row."""
        return self.share_of(self.rank, size)

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Keep signals away while the context lasts, and count its time.

        What is to be allocated for an exchange is allocated before ``gather``, so that nothing can
        fail between it and what follows: the other processes would wait for ever.
        """
        if self.count == 1:
            yield
            return
        start = time.perf_counter()
        try:
            with _signals_later():
                yield
        finally:
            self.seconds += time.perf_counter() - start

    def gather(self, *values: float) -> list[tuple[float, ...]]:
        """Each process's numbers, in order of rank; the place where failures are heard of.

        Raises:
            PeerError: another process failed.
        """
        return [values]

    def gather_json(self, value: Any) -> list[Any]:
        """Each process's value, in order of rank, as JSON keeps it.

        Raises:
            PeerError: another process failed.
        """
        return [value]

    def agree(self, what: str, value: Any) -> None:
        """Check that all processes have the same value, made of what JSON knows.

        Raises:
            PeerError: another process failed.
            UsageError: they differ.
        """
        if self.count == 1:
            return
        text = json.dumps(value, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()
        others = self.gather_json(digest)
        for rank, other in enumerate(others):
            if other != others[0]:
                raise UsageError(
                    f"{what} of process {rank} are not those of process 0; expected the same call"
                    " in every process; start all with the same arguments"
                )

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Add the same tensors of all processes up, in place, bit-equal in all."""

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> None:
        """Overwrite ``tensor`` with that of process ``source``."""

    def wait(self) -> None:
        """Wait until every process has come here.

        Raises:
            PeerError: another process failed.
        """
        with self.exchange():
            self.gather()


ALONE = Processes()


@contextmanager
def _signals_later() -> Iterator[None]:
    """Handle Ctrl-C and SIGTERM when the context ends: half an exchange would hang the others."""
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread alone
        return
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.signal(n, lambda number, _frame: came.append(number)) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    for late in came:
        signal.raise_signal(late)
