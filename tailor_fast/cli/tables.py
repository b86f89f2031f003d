"""What commands print on stdout: facts and tables, aligned, without lines or colours."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence

from tailor_fast.checkpoint import shown_size

__all__ = ["facts", "folded", "share", "shown_size", "table"]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns of text, numbers to the right; the first column is as wide as it must be."""
    cells = [list(head), *([_cell(value) for value in row] for row in rows)]
    right = [False] * len(head)
    for row in cells[1:]:
        right = [
            is_right or bool(re.fullmatch(r"[\d,.]+%?", cell))
            for is_right, cell in zip(right, row, strict=True)
        ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = (
        "  ".join(
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, right, strict=True)
        )
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def facts(pairs: Mapping[str, object]) -> str:
    """``name  value`` lines; a value of several lines is indented; None is left out."""
    given = {name: _cell(value) for name, value in pairs.items() if value is not None}
    width = max(map(len, given), default=0)
    gap = "\n" + " " * (width + 2)
    return "\n".join(
        f"{name.ljust(width)}  {gap.join(value.splitlines())}".rstrip()
        for name, value in given.items()
    )


def folded(
    layers: Iterable[tuple[str, str, Sequence[int]]],
) -> list[tuple[str, int, str, list[int]]]:
    """Put the layers of all blocks that differ in the block's number alone into one row.

    Args:
        layers: (name, shape as text, numbers to add up).

    Returns:
        (name with ``*`` for the block, how many, shape, sums), in the order of the first ones.
    """
    rows: dict[tuple[str, str], tuple[int, list[int]]] = {}
    for name, shape, numbers in layers:
        key = re.sub(r"\.\d+\.", ".*.", name, count=1), shape
        count, sums = rows.get(key, (0, [0] * len(numbers)))
        added = [total + number for total, number in zip(sums, numbers, strict=True)]
        rows[key] = count + 1, added
    return [(name, count, shape, sums) for (name, shape), (count, sums) in rows.items()]


def share(part: int, whole: int) -> str:
    """``9.98%``."""
    return f"{100 * part / whole:.2f}%" if whole else "-"


def show(text: str) -> None:
    """Print on stdout."""
    sys.stdout.write(text + "\n")


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
