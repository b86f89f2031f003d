"""Memory that the processes of one machine share, for what would else go through its network.

Sums of matrices between two processes take gloo 1.3 s for each GB on its way through the loopback
interface, and 0.4 s through memory that both map (two Zen 5 cores, one thread each).
"""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Callable, Iterator, Sequence

import torch

SLOT_BYTES = 8 << 20  # to wait for the others costs as much as to copy 1 MiB
_TURNS = 2  # a slot may be written again while another process still reads the one before
_TOKEN = 16  # random bytes, by which a process knows that it maps the right memory
_ADDRESS = 48  # bytes of an address: process, file, token

_Pieces = list[tuple[torch.Tensor, slice]]

_log = logging.getLogger("tailor_fast")


class Window:
    """The mapped memory: slots for each process, used in turns.

    All processes make the same calls. Between two waits each writes into its own slot, or into its
    own share of slot 0, only.

    Args:
        memory: what ``open_window`` mapped.
        rank: number of this process.
        count: how many there are.
        wait: returns once every process has called it.
    """

    def __init__(
        self, memory: mmap.mmap, rank: int, count: int, wait: Callable[[], object]
    ) -> None:
        words = torch.frombuffer(memory, dtype=torch.uint8)[: _TURNS * count * SLOT_BYTES]
        self._memory = words.view(_TURNS, count, SLOT_BYTES)
        self._rank, self._count, self._wait = rank, count, wait
        self._turn = 0

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Add the same contiguous CPU tensors of all up, in place, in the order of the processes.

        Each process forms its share of the sums, so that all have the same bits.

        Args:
            tensors: of one dtype; small ones share a slot, and so the time to wait.
        """
        for pieces, slots in self._slots_for(tensors):
            for piece, place in pieces:
                slots[self._rank, place] = piece
            self._wait()
            size, count = pieces[-1][1].stop, self._count
            share = slice(size * self._rank // count, size * (self._rank + 1) // count)
            for other in range(1, count):
                slots[0, share] += slots[other, share]
            self._wait()
            for piece, place in pieces:
                piece.copy_(slots[0, place])

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Overwrite a contiguous CPU tensor with that of process ``source``."""
        for pieces, slots in self._slots_for([tensor]):
            ((piece, place),) = pieces
            if self._rank == source:
                slots[source, place] = piece
            self._wait()
            if self._rank != source:
                piece.copy_(slots[source, place])

    def _slots_for(self, tensors: Sequence[torch.Tensor]) -> Iterator[tuple[_Pieces, torch.Tensor]]:
        """Pieces that fit into a slot, where each lies there, and the slots ``[count, elements]``.

        A slot that is given here is free: who still reads it has not come to the wait before.
        """
        memory = self._memory.view(tensors[0].dtype)
        room, used = memory.shape[-1], 0
        pieces: _Pieces = []
        for tensor in tensors:
            words, begin = tensor.view(-1), 0
            while begin < len(words):
                piece = words[begin : begin + room - used]
                pieces.append((piece, slice(used, used + len(piece))))
                begin, used = begin + len(piece), used + len(piece)
                if used == room:
                    yield pieces, memory[self._next_turn()]
                    pieces, used = [], 0
        if pieces:
            yield pieces, memory[self._next_turn()]

    def _next_turn(self) -> int:
        self._turn = (self._turn + 1) % _TURNS
        return self._turn


def open_window(
    rank: int,
    count: int,
    tell: Callable[[torch.Tensor], object],
    all_of: Callable[[bool], bool],
    wait: Callable[[], object],
) -> Window | None:
    """Map the same memory in all processes; None in all where one of them cannot.

    It has no name, so that nothing is left of it when the processes are killed.

    Args:
        rank: number of this process.
        count: how many there are.
        tell: overwrites a uint8 tensor with that of process 0.
        all_of: whether a fact holds in all processes.
        wait: returns once every process has called it.
    """
    size = _TURNS * count * SLOT_BYTES
    made = _create(size + _TOKEN) if rank == 0 else None
    address = torch.zeros(_ADDRESS, dtype=torch.uint8)
    if made is not None:
        file, memory = made
        memory[size:] = os.urandom(_TOKEN)
        text = f"{os.getpid()} {file} ".encode().ljust(_ADDRESS - _TOKEN) + memory[size:]
        address.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    tell(address)
    mapped = _map(bytes(address.tolist()), size) if made is None else made[1]
    found = all_of(mapped is not None)
    if made is not None:
        os.close(made[0])
    _log.debug("exchanges between processes: %s", "shared memory" if found else "the network")
    return Window(mapped, rank, count, wait) if found and mapped is not None else None


def _create(size: int) -> tuple[int, mmap.mmap] | None:
    """A file in memory, and the map of it."""
    if not hasattr(os, "memfd_create"):
        return None
    try:
        file = os.memfd_create("tailor_fast")
    except OSError:
        return None
    try:
        os.posix_fallocate(file, 0, size)  # or a write would end the process for want of memory
        return file, mmap.mmap(file, size)
    except (OSError, ValueError):
        os.close(file)
        return None


def _map(address: bytes, size: int) -> mmap.mmap | None:
    """The memory of process 0, if it runs on this machine and lets this process see it."""
    place, token = address[:-_TOKEN].split(), address[-_TOKEN:]
    if len(place) != 2 or not place[0].isdigit() or not place[1].isdigit():
        return None
    try:
        file = os.open(f"/proc/{int(place[0])}/fd/{int(place[1])}", os.O_RDWR)
    except OSError:
        return None
    try:
        memory = mmap.mmap(file, size + _TOKEN)
    except (OSError, ValueError):
        return None
    finally:
        os.close(file)
    return memory if memory[size:] == token else None
