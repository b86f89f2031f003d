"""Scope ``row``: the keys of a row, written by ``scores_kernel``, are held on chip and bisected.

Rows longer than ``LONGEST`` are read again for every step, from the L2 cache.
"""

import triton
import triton.language as tl

from tailor_fast._core.launch import Launch
from tailor_fast.ops.select.triton.scores import LEAST_KEY, NO_KEY

LONGEST = 16384  # keys of a row on chip
SHORT = 8192  # keys of the rows that a program takes together
KEPT = 1 << 24  # keys written at a time: 64 MiB


def rows_tile(cols: int) -> tuple[int, int]:
    """Rows that a program takes, and keys of each that are on chip."""
    width = min(1 << (cols - 1).bit_length(), LONGEST)
    return max(1, SHORT // width), width


def rows_launch(tile: tuple[int, int], on_chip: bool) -> Launch:
    """64 keys a thread: each step is a reduction, for which few warps wait less.

    Half of that beside the keys of a long row that are read again, or they spill.
    """
    return Launch(num_warps=tile[0] * tile[1] // (2048 if on_chip else 1024))


@triton.jit
def _load_keys(keys_ptr, row, rows, cols, start, WIDTH: tl.constexpr):
    column = start + tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (column < cols)
    key = tl.load(keys_ptr + row * cols + column, mask=inside, other=LEAST_KEY)
    return key, column, inside


@triton.jit
def _chosen(key, column, threshold, last):
    return (key > threshold) | ((key == threshold) & (column <= last))


@triton.jit
def _reached(
    keys_ptr, row, rows, cols, key, column, threshold, last,
    WIDTH: tl.constexpr, ON_CHIP: tl.constexpr,
):  # fmt: skip
    """How many keys of each row lie above a threshold, or equal it and lie no further than last."""
    count = tl.sum(_chosen(key, column, threshold, last).to(tl.int64), axis=1)[:, None]
    if not ON_CHIP:
        for start in range(WIDTH, cols, WIDTH):
            more, there, _ = _load_keys(keys_ptr, row, rows, cols, start, WIDTH)
            count += tl.sum(_chosen(more, there, threshold, last).to(tl.int64), axis=1)[:, None]
    return count


@triton.jit(do_not_specialize=["rows", "k", "steps"])
def rows_kernel(
    keys_ptr,  # [rows, cols] int32
    mask_ptr,  # [rows, cols] uint8
    rows, cols, k,
    steps,  # bits of a column
    ROWS: tl.constexpr, WIDTH: tl.constexpr, ON_CHIP: tl.constexpr,
):  # fmt: skip
    """Masks of some rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    key, column, inside = _load_keys(keys_ptr, row, rows, cols, 0, WIDTH)
    low = tl.full([ROWS, 1], LEAST_KEY, tl.int64)  # the largest key that k elements reach
    high = tl.full([ROWS, 1], NO_KEY, tl.int64)
    for _ in range(32):
        middle = low + ((high - low + 1) >> 1)
        below = (middle - 1).to(tl.int32)
        enough = _reached(keys_ptr, row, rows, cols, key, column, below, -1, WIDTH, ON_CHIP) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    threshold = low.to(tl.int32)
    before = tl.full([ROWS, 1], -2, tl.int64)  # the last column of a tie that is taken lies behind
    last = tl.full([ROWS, 1], -1, tl.int64) + cols
    for _ in range(steps):
        middle = (before + last) >> 1
        count = _reached(
            keys_ptr, row, rows, cols, key, column, threshold, middle, WIDTH, ON_CHIP
        )  # fmt: skip
        enough = (count >= k) & (middle > before)
        before = tl.where(enough, before, middle)
        last = tl.where(enough, middle, last)
    target = mask_ptr + row * cols
    tl.store(target + column, _chosen(key, column, threshold, last).to(tl.uint8), mask=inside)
    if not ON_CHIP:
        for start in range(WIDTH, cols, WIDTH):
            key, column, inside = _load_keys(keys_ptr, row, rows, cols, start, WIDTH)
            chosen = _chosen(key, column, threshold, last)
            tl.store(target + column, chosen.to(tl.uint8), mask=inside)
