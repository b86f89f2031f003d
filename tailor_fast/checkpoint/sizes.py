"""Sizes in bytes as people write them, both ways."""

import re
from fractions import Fraction

from tailor_fast._core.errors import UsageError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTB]?)(I?B)?", re.ASCII | re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "B": 3, "T": 4}


def parse_size(size: str | int) -> int:
    """Return the bytes of ``size``: ``5GB`` is 5e9, ``512MiB`` is 512 * 2**20, ``1000`` is itself.

    A letter alone counts as with ``B`` (``5G``). ``5B``, five billion, is also 5e9: mergekit
    spells shard sizes so, and no one means five bytes.

    Raises:
        UsageError: not a size, or below one byte.
    """
    match = _SIZE.fullmatch(str(size).strip())
    if match is None or (match[2].upper() in ("", "B") and match[3]):
        raise UsageError(f"a size must be like 5GB, 512MiB or 1000000; got {str(size)!r}")
    base = 1024 if (match[3] or "").upper() == "IB" else 1000
    value = int(Fraction(match[1]) * base ** _POWERS[match[2].upper()])
    if value < 1:
        raise UsageError(f"a size must be at least one byte; got {str(size)!r}")
    return value


def shown_size(size: int) -> str:
    """``12.34 MB``; below 1 kB the exact number of bytes."""
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if size >= 1000**power:
            return f"{size / 1000**power:.2f} {unit}"
    return f"{size} bytes"
