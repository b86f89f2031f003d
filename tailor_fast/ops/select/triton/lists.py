"""The k-th key among the candidates, and their marks: nothing but the lists is read."""

import triton
import triton.language as tl

from tailor_fast._core.launch import Launch
from tailor_fast.ops.select.triton.bracket import CAPACITY
from tailor_fast.ops.select.triton.scores import SEGMENTS, WIDTH, place_of
from tailor_fast.ops.select.triton.state import (
    ALL_TIES,
    BINS,
    BOUNDARY,
    FAILED,
    FIELDS,
    FLAGS,
    FLOOR,
    LEFT,
    LEVELS,
    TICKETS,
    begin_level,
    bracket_of,
    count_digits,
    is_last,
    last_place,
    locate,
    locate_ties,
)
from tailor_fast.ops.select.triton.table import (
    GROUP,
    KEPT,
    MEMBER,
    TILES,
    line_of,
    mask_of,
    sizes_of,
)

LISTS_LAUNCH = Launch(num_warps=8, enable_fp_fusion=False)  # 8 slots a thread
TIES_LAUNCH = Launch(num_warps=4, enable_fp_fusion=False)


@triton.jit
def _load_lists(counts_ptr, lists_ptr, state_ptr, group):
    """Keys and places of a group of tiles, ``[GROUP, CAPACITY]``, which exist, and the counts.

    Tiles of the group that no tensor has were never counted; a list that is too short has holes.
    """
    index = tl.cast(group, tl.int64) * GROUP + tl.arange(0, GROUP)
    counts = tl.load(counts_ptr + index)
    slot = tl.arange(0, CAPACITY)[None, :]
    present = (slot < counts[:, None]) & (counts <= CAPACITY)[:, None]
    entry = tl.load(lists_ptr + index[:, None] * CAPACITY + slot, mask=present, other=0)
    low, _ = bracket_of(state_ptr)
    return (entry >> 32).to(tl.int32) + low.to(tl.int32), entry.to(tl.int32), present, counts


@triton.jit
def _tiles_of(line_ptr, start):
    """Tiles of a unit, programs that share them, and this program's own."""
    tiles = tl.load(line_ptr + TILES).to(tl.int32)
    first = (tl.program_id(0) * GROUP - start).to(tl.int32)
    return tiles, (tiles + GROUP - 1) // GROUP, first + tl.arange(0, GROUP)


@triton.jit(do_not_specialize=["level"])
def list_digits_kernel(
    table_ptr, map_ptr,
    counts_ptr,  # [tiles of the grid] int32
    lists_ptr,  # [tiles of the grid, CAPACITY] int64: above the lowest candidate, place in the tile
    state_ptr,  # [units, FIELDS]
    flags_ptr,  # [members, FLAGS]
    hist_ptr,  # [units, LEVELS, BINS] int64, zero
    level,
):  # fmt: skip
    """One level of the descent."""
    group = tl.program_id(0)
    line_ptr, unit, start = line_of(table_ptr, map_ptr, group)
    state_ptr += unit * FIELDS
    floor, span, need = begin_level(state_ptr, level, tl.load(line_ptr + KEPT), True)
    if (level == 0) | (span > 0):
        _, programs, _ = _tiles_of(line_ptr, start)
        flags_ptr += tl.load(line_ptr + MEMBER) * FLAGS
        key, _, present, counts = _load_lists(counts_ptr, lists_ptr, state_ptr, group)
        if tl.max(counts) > CAPACITY:
            tl.store(flags_ptr + FAILED, 1)
        hist_ptr += (unit * LEVELS + level) * BINS
        count_digits(hist_ptr, key, present, floor, span)
        if is_last(state_ptr + TICKETS + level, programs):
            locate(state_ptr, flags_ptr, hist_ptr, floor, span, need, 1)


@triton.jit
def list_ties_kernel(
    table_ptr, map_ptr, counts_ptr, lists_ptr, state_ptr,
    ties_ptr,  # [tiles of the grid] int32
):  # fmt: skip
    """Candidates of each tile that equal the threshold, where not all of them are taken."""
    group = tl.program_id(0)
    line_ptr, unit, start = line_of(table_ptr, map_ptr, group)
    state_ptr += unit * FIELDS
    if tl.load(state_ptr + BOUNDARY) < ALL_TIES:
        tiles, programs, tile = _tiles_of(line_ptr, start)
        key, _, present, _ = _load_lists(counts_ptr, lists_ptr, state_ptr, group)
        threshold = tl.load(state_ptr + FLOOR)
        ties = tl.sum((present & (key == threshold)).to(tl.int32), axis=1)
        ties_ptr += start
        tl.store(ties_ptr + tile, ties, mask=tile < tiles)
        if is_last(state_ptr + TICKETS + LEVELS, programs):
            locate_ties(state_ptr, ties_ptr, tiles)


@triton.jit
def list_mark_kernel(
    table_ptr, map_ptr, counts_ptr, lists_ptr, state_ptr,
    ORDER: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Mark the candidates above the threshold, and its first ties."""
    group = tl.program_id(0)
    line_ptr, unit, start = line_of(table_ptr, map_ptr, group)
    state_ptr += unit * FIELDS
    _, _, tile = _tiles_of(line_ptr, start)
    _, cols, _, blocks, number = sizes_of(line_ptr, False)
    key, local, present, _ = _load_lists(counts_ptr, lists_ptr, state_ptr, group)
    threshold = tl.load(state_ptr + FLOOR).to(tl.int32)
    boundary = tl.load(state_ptr + BOUNDARY)
    tie = present & (key == threshold)
    chosen = (present & (key > threshold)) | (tie & (tile < boundary)[:, None])
    if (boundary >= tl.min(tile)) & (boundary <= tl.max(tile)):
        tie = tie & (tile == boundary)[:, None]
        chosen = chosen | (tie & (local <= last_place(tie, local, tl.load(state_ptr + LEFT))))
    segment = tile[:, None]
    if WIDE:
        segment = segment.to(tl.int64)
    row, first = place_of(segment * SEGMENTS + local // WIDTH, number, blocks, ORDER)
    mask_ptr = mask_of(line_ptr, False)
    tl.store(mask_ptr + row * cols + (first + local % WIDTH), 1, mask=chosen)
