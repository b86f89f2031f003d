"""The k-th key among the candidates, and their marks: nothing but the lists is read."""

import triton
import triton.language as tl

from tailor_fast._core.launch import Launch
from tailor_fast.ops.select.triton.bracket import CAPACITY
from tailor_fast.ops.select.triton.scores import SEGMENTS, WIDTH, place_of
from tailor_fast.ops.select.triton.state import (
    BINS,
    BOUNDARY,
    FAILED,
    FIELDS,
    FLOOR,
    LEFT,
    LEVELS,
    TICKETS,
    begin_level,
    count_digits,
    is_last,
    last_place,
    locate,
    locate_ties,
)

GROUP = tl.constexpr(16)  # tiles whose lists a program reads: 4096 slots, a quarter of them used

LISTS_LAUNCH = Launch(num_warps=8, enable_fp_fusion=False)  # 16 slots a thread
TIES_LAUNCH = Launch(num_warps=4, enable_fp_fusion=False)  # 16 spill 8 bytes with triton 3.6


@triton.jit
def _load_lists(counts_ptr, lists_ptr, unit, tiles):
    """Keys and places of a group of tiles, ``[GROUP, CAPACITY]``, which exist, and the counts."""
    tile = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    index = unit.to(tl.int64) * tiles + tile
    counts = tl.load(counts_ptr + index, mask=tile < tiles, other=0)
    slot = tl.arange(0, CAPACITY)[None, :]
    present = slot < counts[:, None]
    entry = tl.load(lists_ptr + index[:, None] * CAPACITY + slot, mask=present, other=0)
    return (entry >> 32).to(tl.int32), entry.to(tl.int32), present, counts, tile


@triton.jit(do_not_specialize=["tiles", "k", "last_k", "level"])
def list_digits_kernel(
    counts_ptr,  # [units, tiles] int32
    lists_ptr,  # [units, tiles, CAPACITY] int64
    state_ptr,  # [units, FIELDS]
    flags_ptr,
    hist_ptr,  # [units, LEVELS, BINS] int64, zero
    tiles, k, last_k, level,
):  # fmt: skip
    """One level of the descent."""
    unit = tl.program_id(1)
    state_ptr += unit * FIELDS
    kept = tl.where(unit == tl.num_programs(1) - 1, last_k, k)
    floor, span, need = begin_level(state_ptr, level, kept, True)
    if (level == 0) | (span > 0):
        key, _, present, counts, _ = _load_lists(counts_ptr, lists_ptr, unit, tiles)
        if tl.max(counts) > CAPACITY:
            tl.store(flags_ptr + FAILED, 1)
        hist_ptr += (unit * LEVELS + level) * BINS
        count_digits(hist_ptr, key, present, floor, span)
        if is_last(state_ptr + TICKETS + level):
            locate(state_ptr, flags_ptr, hist_ptr, floor, span, need, 1)


@triton.jit(do_not_specialize=["tiles"])
def list_ties_kernel(counts_ptr, lists_ptr, state_ptr, ties_ptr, tiles):
    """Candidates of each tile that equal the threshold: ``ties`` is int32 ``[units, tiles]``."""
    unit = tl.program_id(1)
    state_ptr += unit * FIELDS
    key, _, present, _, tile = _load_lists(counts_ptr, lists_ptr, unit, tiles)
    threshold = tl.load(state_ptr + FLOOR)
    ties = tl.sum((present & (key == threshold)).to(tl.int32), axis=1)
    ties_ptr += unit.to(tl.int64) * tiles
    tl.store(ties_ptr + tile, ties, mask=tile < tiles)
    if is_last(state_ptr + TICKETS + LEVELS):
        locate_ties(state_ptr, ties_ptr, tiles)


@triton.jit(do_not_specialize=["tiles"])
def list_mark_kernel(
    counts_ptr, lists_ptr, state_ptr, mask_ptr, tiles, cols, blocks,
    ORDER: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Mark the candidates above the threshold, and its first ties."""
    unit = tl.program_id(1)
    state_ptr += unit * FIELDS
    key, local, present, _, tile = _load_lists(counts_ptr, lists_ptr, unit, tiles)
    threshold = tl.load(state_ptr + FLOOR).to(tl.int32)
    boundary = tl.load(state_ptr + BOUNDARY)
    tie = present & (key == threshold)
    chosen = (present & (key > threshold)) | (tie & (tile < boundary)[:, None])
    start = tl.program_id(0) * GROUP
    if (boundary >= start) & (boundary < start + GROUP):
        tie = tie & (tile == boundary)[:, None]
        chosen = chosen | (tie & (local <= last_place(tie, local, tl.load(state_ptr + LEFT))))
    segment = tile[:, None]
    if WIDE:
        segment = segment.to(tl.int64)
    row, first = place_of(segment * SEGMENTS + local // WIDTH, unit, blocks, ORDER)
    tl.store(mask_ptr + row * cols + (first + local % WIDTH), 1, mask=chosen)
