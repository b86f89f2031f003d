"""Search for the k-th largest key over many named streams of keys, in bounded memory.

A round counts 16 of a key's 32 bits in an exact histogram, which narrows the threshold to one bin.
Meanwhile the keys near the *estimated* threshold are collected, within a budget: when the budget is
exceeded, the interval shrinks around the key that has the target's rank among the keys so far. At
the end counts tell whether the threshold lies in that interval; if so, it and its ties per stream
are known and no other round is needed. The estimate decides only how many rounds it takes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

import torch

from tailor_fast._core.checks import fail
from tailor_fast._core.density import kept_count
from tailor_fast.ops.select.radix import DIGITS, NO_KEY, KeyInterval, kth_keys, locate

EVERYTHING = KeyInterval(None, -NO_KEY, NO_KEY)
_CHUNK = 1 << 20  # keys worked on at a time: what that takes beside them, a few times their size


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
    inside: int = 0  # keys in the interval
    keys: list[torch.Tensor] = field(default_factory=list)  # the latter, unless it is a single key


class ThresholdSearch:
    """Finds the key of rank ``floor(density * n)`` among all keys of all streams.

    Args:
        density: fraction kept.
        budget: how many keys may be held between calls.

    Attributes:
        interval: what the next keys must be counted and collected by (``KeyInterval``).
        counts: int64 ``[65536]`` on cpu, this round's histogram; the caller adds to it.
    """

    def __init__(self, density: float, budget: int) -> None:
        self._density, self._budget = density, budget
        self._k = self._rank = self._population = -1  # known after the first round
        self._begin(EVERYTHING)

    def _begin(self, interval: KeyInterval) -> None:
        self.interval = interval
        self.counts = torch.zeros((DIGITS,), dtype=torch.int64)
        self._streams: dict[str, _Stream] = {}
        self._above = self._inside = 0  # sums over the streams

    def add(self, name: str, keys: torch.Tensor, above: int) -> None:
        """Take what a stretch of a stream holds for ``interval``, already counted in ``counts``.

        Args:
            name: the stream.
            keys: int32 on cpu, its keys inside the interval.
            above: how many lie above it.
        """
        stream = self._streams.setdefault(name, _Stream())
        stream.above += above
        stream.inside += keys.numel()
        self._above += above
        self._inside += keys.numel()
        if keys.numel() and self.interval.low < self.interval.high:
            stream.keys += keys.split(_CHUNK)
        self._make_room()

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

    def _held(self) -> int:
        return self._inside if self.interval.low < self.interval.high else 0

    def _kth(self, rank: int) -> tuple[int, int]:
        """Key of a rank among the collected ones, and how many of its equals that rank includes."""

        def chunks() -> Iterator[torch.Tensor]:
            return (keys[None] for stream in self._streams.values() for keys in stream.keys)

        key, ties = kth_keys(chunks, 1, rank, self.counts.device)
        return int(key), int(ties)

    def _make_room(self) -> None:
        """Shrink the interval around the key that has the target's rank so far."""
        target = kept_count(int(self.counts.sum()), self._density)
        margin = self._budget // 4
        while self._held() > self._budget:
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
        self.interval = self.interval._replace(low=low, high=high)
        for stream in self._streams.values():
            before, stream.keys, stream.inside = stream.keys, [], 0
            few: list[torch.Tensor] = []
            while before:  # each is freed at once: all of them are never there twice
                keys = before.pop()
                stream.above += int((keys > high).count_nonzero())
                few.append(keys[(keys >= low) & (keys <= high)])
                stream.inside += few[-1].numel()
                if low == high:
                    few = []
                elif not before or sum(map(torch.numel, few)) >= _CHUNK:
                    stream.keys.append(torch.cat(few))
                    few = []
        self._above = sum(stream.above for stream in self._streams.values())
        self._inside = sum(stream.inside for stream in self._streams.values())

    def _found(self, rank: int) -> Found:
        single = self.interval.low == self.interval.high
        threshold, left = (self.interval.low, rank) if single else self._kth(rank)
        shares = {}
        for name in sorted(self._streams):
            stream = self._streams[name]
            above = stream.above + sum(
                int((keys > threshold).count_nonzero()) for keys in stream.keys
            )
            equal = sum(int((keys == threshold).count_nonzero()) for keys in stream.keys)
            ties = min(left, stream.inside if single else equal)
            left -= ties
            shares[name] = Share(above + ties, ties)
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


def _fail_changed(got: str) -> NoReturn:
    fail("TopKSelector.finish", "the tensors", "the same in every round", got)
