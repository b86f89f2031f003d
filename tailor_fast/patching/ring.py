"""Memory that is used again and again: fresh memory costs a page fault for every 4 KiB."""

import mmap
from collections import deque

_ALIGNMENT = 4096  # of every span: whole pages for the system's copies, aligned for any dtype


class Span:
    """A piece of a ring, in use until it is given back.

    Attributes:
        view: its bytes.
    """

    __slots__ = ("_begin", "_end", "_free", "view")

    def __init__(self, view: memoryview, begin: int, end: int) -> None:
        """Made by ``Ring.take``."""
        self.view = view
        self._begin = begin
        self._end = end
        self._free = False


class Ring:
    """A fixed piece of memory from which spans are taken in a circle. For one thread.

    Spans may come back in any order; room is won at the two ends of what is in use.

    Attributes:
        size: bytes in all. Memory that was never taken costs nothing.
        memory: all of them.
    """

    def __init__(self, size: int) -> None:
        """Reserve ``size`` bytes of address space, rounded up to whole pages."""
        self.size = aligned(size)
        memory = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.memory = memoryview(memory)
        self._spans: deque[Span] = deque()

    def take(self, count: int) -> Span | None:
        """Take ``count`` bytes; None when they are not free.

        Raises:
            ValueError: more than the whole ring.
        """
        room = aligned(count)
        if room > self.size:
            raise ValueError(f"Ring.take: count must be at most {self.size}; got {count}")
        begin = self._place(room)
        if begin is None:
            return None
        span = Span(self.memory[begin : begin + count], begin, begin + room)
        self._spans.append(span)
        return span

    def give_back(self, span: Span) -> None:
        """Let the memory of ``span`` be taken again; its view must not be used any more."""
        span._free = True
        while self._spans and self._spans[0]._free:
            self._spans.popleft()
        while self._spans and self._spans[-1]._free:
            self._spans.pop()

    def _place(self, room: int) -> int | None:
        if not self._spans:
            return 0
        head, tail = self._spans[-1]._end, self._spans[0]._begin
        if self._spans[-1]._begin < tail:  # the newest lies before the oldest: one gap between them
            return head if tail - head >= room else None
        if self.size - head >= room:
            return head
        return 0 if tail >= room else None


def aligned(count: int) -> int:
    """Bytes of a ring that a span of ``count`` bytes takes up."""
    return max(1, -(-count // _ALIGNMENT)) * _ALIGNMENT
