"""Which bytes of a tensor were written, so that each is written once."""

from bisect import bisect_left


class Coverage:
    """Which bytes of ``[0, size)`` have been taken: sorted, disjoint, merged spans."""

    def __init__(self) -> None:
        """Start empty."""
        self.spans: list[tuple[int, int]] = []

    def take(self, begin: int, end: int) -> bool:
        """Add ``[begin, end)``; False, and nothing added, when a byte of it was taken before."""
        at = bisect_left(self.spans, (begin, end))
        before = self.spans[at - 1] if at else (-1, -1)
        after = self.spans[at] if at < len(self.spans) else (end + 1, end + 1)
        if begin < before[1] or after[0] < end:
            return False
        low, high = at, at
        if before[1] == begin:
            begin, low = before[0], at - 1
        if after[0] == end:
            end, high = after[1], at + 1
        self.spans[low:high] = [(begin, end)]
        return True

    def missing(self, size: int) -> tuple[int, int]:
        """Return the first untaken span of ``[0, size)``; empty when there is none."""
        first = [*self.spans, (size, size)]
        if first[0][0] > 0:
            return 0, first[0][0]
        return first[0][1], first[1][0] if len(first) > 1 else size
