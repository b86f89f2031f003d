"""Exact selection of the largest integer keys, chunk by chunk: histograms of digits, no sort.

Keys are int32, larger is better. A problem may hold several independent *units* of equal size; a
chunk is ``[units, elements]``, elements in linear order, and chunks come in linear order. Counts
are int64, so the number of elements is bounded by nothing else.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

Chunks = Callable[[], Iterable[torch.Tensor]]  # replays the chunks from the first one

KEY_BITS = 32
DIGITS = 1 << 16  # bins of half a key
NO_KEY = 2**31 - 1  # above every key of a number
# Lowest bits of the digits. Many units share one table of counts, hence the shorter digits.
ONE_UNIT = (16, 0)
MANY_UNITS = (21, 10, 0)
MANY_UNITS_BINS = 1 << 11


class KeyInterval(NamedTuple):
    """Which keys a pass over tensors counts digit by digit, and which it collects.

    Attributes:
        prefix: upper 16 bits, arithmetically shifted, that counted keys have; None counts all.
        low: smallest key collected.
        high: largest key collected; ``low > high`` collects none.
    """

    prefix: int | None
    low: int
    high: int


def float_keys(values: torch.Tensor) -> torch.Tensor:
    """Map float32 values to int32 keys of the same order, with -0 equal to +0.

    The bits are read as sign and magnitude: infinity becomes +-0x7f800000, a NaN lies beyond.
    """
    bits = values.view(torch.int32)
    sign = bits >> 31  # 0 or -1, so that the xor and the difference negate
    return (bits & 0x7FFFFFFF).bitwise_xor_(sign).sub_(sign)


def locate(counts: torch.Tensor, rank: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the bin that holds the element of a rank, counted from the highest bin.

    Args:
        counts: int64 ``[units, bins]``.
        rank: int64 ``[units]``, from 1 to the sum of the unit's counts.

    Returns:
        The bin, int64 ``[units]``, and how many elements lie in higher bins, int64 ``[units]``.
    """
    downwards = counts.flip(1)
    reached = downwards.cumsum(1)
    place = (reached < rank[:, None]).sum(1, keepdim=True)
    above = (reached - downwards).gather(1, place)
    return counts.shape[1] - 1 - place[:, 0], above[:, 0]


def kth_keys(
    chunks: Chunks, units: int, k: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find each unit's k-th largest key; reads the chunks once per digit.

    Args:
        chunks: gives int32 ``[units, elements]``.
        units: number of units.
        k: from 0 to the elements of a unit.
        device: where the keys are.

    Returns:
        The key, int32 ``[units]`` (``NO_KEY`` for k = 0), and how many of the elements equal to it
        belong to the k best, int64 ``[units]``.
    """
    ties = torch.full((units,), k, dtype=torch.int64, device=device)
    if k == 0:
        for _ in chunks():  # a chunk that cannot be scored must raise whatever k is
            pass
        return torch.full_like(ties, NO_KEY, dtype=torch.int32), ties
    prefix = torch.zeros((units,), dtype=torch.int32, device=device)
    offsets = torch.arange(units, dtype=torch.int32, device=device)[:, None]
    high = KEY_BITS
    for low in ONE_UNIT if units == 1 else MANY_UNITS:
        bins = 1 << (high - low)
        counts = torch.zeros((units * bins,), dtype=torch.int64, device=device)
        for keys in chunks():
            if high == KEY_BITS:
                digits = ((keys >> low) + bins // 2 + offsets * bins).flatten()
            else:
                digits = ((keys >> low) & (bins - 1)) + offsets * bins
                digits = digits[(keys >> high) == prefix[:, None]]
            counts += torch.bincount(digits, minlength=units * bins)
        digit, above = locate(counts.view(units, bins), ties)
        ties -= above
        # Multiplied, not shifted: the prefix carries the key's sign.
        prefix = digit.int() - bins // 2 if high == KEY_BITS else prefix * bins + digit.int()
        high = low
    return prefix, ties


def mark_(keys: torch.Tensor, threshold: torch.Tensor, ties: torch.Tensor) -> torch.Tensor:
    """Mark the keys above the threshold and the first of those equal to it.

    Args:
        keys: int32 ``[units, elements]``.
        threshold: int32 ``[units]``.
        ties: int64 ``[units]``, how many equal keys may still be marked; reduced in place by those
            that were.

    Returns:
        bool ``[units, elements]``.
    """
    equal = keys == threshold[:, None]
    found = equal.count_nonzero(1)  # sum would cast to int64 first
    if bool((found > ties).any()):
        equal &= equal.cumsum(1) <= ties[:, None]
    ties -= torch.minimum(found, ties)
    return equal.logical_or_(keys > threshold[:, None])


def select_best(chunks: Chunks, units: int, k: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Yield, chunk by chunk, the mask of each unit's k largest keys; ties to the lowest index."""
    threshold, ties = kth_keys(chunks, units, k, device)
    for keys in chunks():
        yield mark_(keys, threshold, ties)
