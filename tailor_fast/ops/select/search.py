"""Search for the k-th largest key over many named streams of keys, in bounded memory.

A round counts 16 of a key's 32 bits in an exact histogram, which narrows the threshold to one bin.
Meanwhile the keys near the *estimated* threshold are collected, within a budget: when the budget is
exceeded, the interval shrinks around the key that has the target's rank among the keys so far. At
the end counts tell whether the threshold lies in that interval; if so, it and its ties per stream
are known and no other round is needed. The estimate decides only how many rounds it takes.
"""

import mmap
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import torch

from tailor_fast._core.checks import fail
from tailor_fast._core.density import kept_count
from tailor_fast.ops.select.radix import DIGITS, NO_KEY, KeyInterval, kth_keys, locate

EVERYTHING = KeyInterval(None, -NO_KEY, NO_KEY)
_CHUNK = 1 << 18  # keys worked on at a time: what that takes beside them, a few times their size
_AT_ONCE = 1 << 24  # keys that memory is taken for at once, which costs nothing until it is used


class Share(NamedTuple):
    """What one stream keeps: elements in all, and how many of them equal the threshold."""

    kept: int
    ties: int


class Found(NamedTuple):
    """The threshold key, and every stream's share."""

    threshold: int
    shares: dict[str, Share]


@dataclass(slots=True)
class _Stream:
    above: int = 0  # keys above the interval
    inside: int = 0  # keys in the interval; all of them are held, unless it is a single key


class ThresholdSearch:
    """Finds the key of rank ``floor(density * n)`` among all keys of all streams.

    The keys of all streams stand in one piece of memory, in the order in which they came.

    Args:
        density: fraction kept.
        budget: how many keys may be held between calls.

    Attributes:
        budget: the same.
        interval: what the next keys must be counted and collected by (``KeyInterval``).
        counts: int64 ``[65536]`` on cpu, this round's histogram; the caller adds to it.
    """

    def __init__(self, density: float, budget: int) -> None:
        self._density, self.budget = density, budget
        self._keys = torch.empty((0,), dtype=torch.int32)
        self._k = self._rank = self._population = -1  # known after the first round
        self._begin(EVERYTHING)

    def _begin(self, interval: KeyInterval) -> None:
        self.interval = interval
        self.counts = torch.zeros((DIGITS,), dtype=torch.int64)
        self._streams: dict[str, _Stream] = {}
        self._spans: list[tuple[_Stream, int]] = []  # whose the keys are, one after the other
        self._above = self._inside = 0  # sums over the streams

    def room(self, count: int) -> torch.Tensor:
        """Memory for ``count`` keys of the next stretch, int32 on cpu, beside those held."""
        held = self._held()
        if held + count > self._keys.numel():
            more = _memory(max(held, min(self.budget, 2 * held + _AT_ONCE)) + count)
            more[:held] = self._keys[:held]
            self._keys = more
        return self._keys[held : held + count]

    def add(self, name: str, found: int, above: int) -> None:
        """Take what a stretch of a stream holds for ``interval``, already counted in ``counts``.

        Args:
            name: the stream.
            found: how many of its keys lie inside the interval: the first ones of ``room``.
            above: how many lie above it.
        """
        stream = self._streams.setdefault(name, _Stream())
        if found and self.interval.low < self.interval.high:
            self._hold(stream, found)
        stream.above += above
        stream.inside += found
        self._above += above
        self._inside += found
        self._make_room()

    def _hold(self, stream: _Stream, count: int) -> None:
        if self._spans and self._spans[-1][0] is stream:
            count += self._spans.pop()[1]
        self._spans.append((stream, count))

    def finish_round(self) -> Found | None:
        """Close the round; None asks for another one over the same keys.

        Raises:
            ValueError: the keys of this round are not those of the one before.
        """
        counted = int(self.counts.sum())
        first = self.interval.prefix is None
        if first:
            self._k = self._rank = kept_count(counted, self._density)
        elif counted != self._population:
            _fail_changed(f"{counted} counted instead of {self._population}")
        if self._k == 0:
            return Found(NO_KEY, dict.fromkeys(self._streams, Share(0, 0)))
        rank = self._k - self._above
        collected = self.interval.low <= self.interval.high
        if collected and 1 <= rank <= self._inside:
            return self._found(rank)
        if collected and not first:
            _fail_changed(f"rank {rank} of {self._inside}")
        self._refine()
        return None

    def drop(self) -> None:
        """Let go of what was counted and collected; the search is over."""
        self.counts = self.counts.new_empty((0,))
        self._keys = self._keys.new_empty((0,))
        self._streams, self._spans = {}, []

    def _held(self) -> int:
        return self._inside if self.interval.low < self.interval.high else 0

    def _kth(self, rank: int) -> tuple[int, int]:
        """Key of a rank among the collected ones, and how many of its equals that rank includes."""
        chunks = self._keys[: self._held()][None].split(_CHUNK, 1)
        key, ties = kth_keys(lambda: chunks, 1, rank, self.counts.device)
        return int(key), int(ties)

    def _make_room(self) -> None:
        """Shrink the interval around the key that has the target's rank so far."""
        target = kept_count(int(self.counts.sum()), self._density)
        margin = self.budget // 4
        while self._held() > self.budget:
            rank = target - self._above
            if self.interval.prefix is not None or not 1 <= rank <= self._inside:
                self._shrink(NO_KEY, NO_KEY - 1)  # the histogram alone goes on
                return
            high, _ = self._kth(max(1, rank - margin))
            low, _ = self._kth(min(self._inside, rank + margin))
            self._shrink(low, high)
            margin //= 2  # still too many where an end lies among many equal keys

    def _shrink(self, low: int, high: int) -> None:
        """Narrow the interval; the keys of a single one are counted and not held."""
        spans, self._spans = self._spans, []
        self.interval = self.interval._replace(low=low, high=high)
        for stream in self._streams.values():
            stream.inside = 0
        begin = held = 0
        for stream, count in spans:
            for keys in self._keys[begin : begin + count].split(_CHUNK):
                stream.above += int((keys > high).count_nonzero())
                few = keys[(keys >= low) & (keys <= high)]
                stream.inside += few.numel()
                if few.numel() and low < high:
                    self._keys[held : held + few.numel()] = few
                    held += few.numel()
                    self._hold(stream, few.numel())
            begin += count
        self._above = sum(stream.above for stream in self._streams.values())
        self._inside = sum(stream.inside for stream in self._streams.values())

    def _found(self, rank: int) -> Found:
        threshold, left = self.interval.low, rank
        if self._held():
            threshold, left = self._kth(rank)
            self._shrink(threshold, threshold)
        shares = {}
        for name, stream in sorted(self._streams.items()):
            ties = min(left, stream.inside)
            left -= ties
            shares[name] = Share(stream.above + ties, ties)
        return Found(threshold, shares)

    def _refine(self) -> None:
        """Begin a round that looks at the one bin of the histogram that holds the threshold."""
        digits, above = locate(self.counts[None], torch.tensor([self._rank]))
        digit, prefix = int(digits), self.interval.prefix
        if prefix is None:
            self._rank -= int(above)
            self._population = int(self.counts[digit])
            prefix = digit - DIGITS // 2
            self._begin(KeyInterval(prefix, prefix * DIGITS, prefix * DIGITS + DIGITS - 1))
        else:
            key = prefix * DIGITS + digit
            self._begin(KeyInterval(prefix, key, key))


def _memory(count: int) -> torch.Tensor:
    """Memory for ``count`` keys, which goes back to the system as a whole.

    Not from the heap: pieces that come and go leave holes there, several times as large as they.
    """
    memory = mmap.mmap(-1, 4 * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.int32)


def _fail_changed(got: str) -> NoReturn:
    fail("TopKSelector.finish", "the tensors", "the same in every round", got)
