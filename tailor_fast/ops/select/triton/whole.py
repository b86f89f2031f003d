"""The k-th key among all elements of the units of scope, and their marks: a pass per step.

Small tensors take this way, those whose bracket missed, and the chunks of a ``TopKSelector``.
"""

import triton
import triton.language as tl

from tailor_fast._core.launch import Launch
from tailor_fast.ops.select.triton.scores import (
    NO_NORM,
    SCORES,
    SEGMENTS,
    columns_of_segment,
    in_tensor,
    load_terms,
    place_of,
    segments_of,
    tile_keys,
    weight_of,
)
from tailor_fast.ops.select.triton.state import (
    BINS,
    BOUNDARY,
    FAULT,
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

DIGITS = tl.constexpr(1 << 16)  # bins of half a key

WHOLE_LAUNCH = Launch(num_warps=2, enable_fp_fusion=False)  # as `classify_kernel`
# One vector of 8 a thread: with two or four, triton 3.6 or 3.7 spill 8 or 16 bytes on one card.
SCORES_LAUNCH = Launch(num_warps=8, enable_fp_fusion=False)


@triton.jit(do_not_specialize=["rows", "size", "ws", "wv", "k", "last_k", "level", "copies"])
def digits_kernel(
    base_ptr, tuned_ptr, c_ptr, affine_ptr,
    rows, cols, size, blocks, ws, wv,
    state_ptr,  # [units, FIELDS]
    flags_ptr,
    hist_ptr,  # [units, LEVELS, copies, BINS] int64, zero
    k, last_k, level, copies,
    KIND: tl.constexpr, NORM: tl.constexpr, S: tl.constexpr, V: tl.constexpr,
    ORDER: tl.constexpr, WIDE: tl.constexpr, LANES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One level of the descent."""
    tile = tl.program_id(0)
    unit = tl.program_id(1)
    state_ptr += unit * FIELDS
    kept = tl.where(unit == tl.num_programs(1) - 1, last_k, k)
    floor, span, need = begin_level(state_ptr, level, kept, False)
    if (level == 0) | (span > 0):
        _, key, bad, valid, _, _ = tile_keys(
            base_ptr, tuned_ptr, c_ptr, affine_ptr, rows, cols, size, blocks, ws, wv, tile, unit,
            KIND, NORM, S, V, ORDER, WIDE, LANES, MASKED,
        )  # fmt: skip
        if tl.max(bad.to(tl.int32)) > 0:
            tl.store(flags_ptr + FAULT, 1)
        hist_ptr += (unit * LEVELS + level) * copies * BINS
        count_digits(hist_ptr + (tile % copies) * BINS, key, valid, floor, span)
        if is_last(state_ptr + TICKETS + level, tl.num_programs(0)):
            locate(state_ptr, flags_ptr, hist_ptr, floor, span, need, copies)


@triton.jit(do_not_specialize=["rows", "size", "ws", "wv"])
def ties_kernel(
    base_ptr, tuned_ptr, c_ptr, affine_ptr,
    rows, cols, size, blocks, ws, wv,
    mask_ptr,  # uint8, the mask
    state_ptr,  # [units, FIELDS]
    flags_ptr,
    ties_ptr,  # [units, tiles] int32
    KIND: tl.constexpr, NORM: tl.constexpr, S: tl.constexpr, V: tl.constexpr,
    ORDER: tl.constexpr, WIDE: tl.constexpr, LANES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Mark what lies above the threshold, and count what equals it."""
    tile = tl.program_id(0)
    unit = tl.program_id(1)
    state_ptr += unit * FIELDS
    _, key, bad, valid, offset, _ = tile_keys(
        base_ptr, tuned_ptr, c_ptr, affine_ptr, rows, cols, size, blocks, ws, wv, tile, unit,
        KIND, NORM, S, V, ORDER, WIDE, LANES, MASKED,
    )  # fmt: skip
    threshold = tl.load(state_ptr + FLOOR).to(tl.int32)
    tl.store(mask_ptr + offset, (key > threshold).to(tl.uint8), mask=valid)
    # Two counts in a word: at most TILE each.
    both = tl.sum((valid & (key == threshold)).to(tl.int32) + (bad.to(tl.int32) << 16))
    if (both >> 16) > 0:
        tl.store(flags_ptr + FAULT, 1)
    ties_ptr += unit.to(tl.int64) * tl.num_programs(0)
    tl.store(ties_ptr + tile, both & 0xFFFF)
    if is_last(state_ptr + TICKETS + LEVELS, tl.num_programs(0)):
        locate_ties(state_ptr, ties_ptr, tl.num_programs(0))


@triton.jit(do_not_specialize=["rows", "size", "ws", "wv"])
def mark_ties_kernel(
    base_ptr, tuned_ptr, c_ptr, affine_ptr,
    rows, cols, size, blocks, ws, wv,
    mask_ptr, state_ptr, ties_ptr,
    KIND: tl.constexpr, NORM: tl.constexpr, S: tl.constexpr, V: tl.constexpr,
    ORDER: tl.constexpr, WIDE: tl.constexpr, LANES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Mark the ties that are taken; reads only tiles that have one."""
    tile = tl.program_id(0)
    unit = tl.program_id(1)
    state_ptr += unit * FIELDS
    boundary = tl.load(state_ptr + BOUNDARY)
    found = tl.load(ties_ptr + unit.to(tl.int64) * tl.num_programs(0) + tile)
    if (found > 0) & (tile <= boundary):
        _, key, _, valid, offset, local = tile_keys(
            base_ptr, tuned_ptr, c_ptr, affine_ptr, rows, cols, size, blocks, ws, wv, tile, unit,
            KIND, NORM, S, V, ORDER, WIDE, LANES, MASKED,
        )  # fmt: skip
        tie = valid & (key == tl.load(state_ptr + FLOOR).to(tl.int32))
        if tile == boundary:
            tie = tie & (local <= last_place(tie, local, tl.load(state_ptr + LEFT)))
        tl.store(mask_ptr + offset, tl.full(local.shape, 1, tl.uint8), mask=tie)


@triton.jit(do_not_specialize=["rows", "size", "ws", "wv", "high", "prefix", "copies"])
def scores_kernel(
    base_ptr, tuned_ptr, c_ptr, affine_ptr,
    rows, cols, size, blocks, ws, wv,
    out_ptr,  # [rows, cols]: float32 scores, or int32 keys
    flags_ptr,
    hist_ptr,  # [copies, DIGITS] int32, zero
    above_ptr,  # [1] int64, zero
    high, prefix, copies,
    KIND: tl.constexpr, NORM: tl.constexpr, S: tl.constexpr, V: tl.constexpr,
    ORDER: tl.constexpr, WIDE: tl.constexpr, LANES: tl.constexpr, MASKED: tl.constexpr,
    KEYS: tl.constexpr, COUNTED: tl.constexpr, UPPER: tl.constexpr,
):  # fmt: skip
    """Write all scores or their keys; these may be counted, by digit and against ``high``."""
    tile = tl.program_id(0)
    x, key, bad, valid, offset, _ = tile_keys(
        base_ptr, tuned_ptr, c_ptr, affine_ptr, rows, cols, size, blocks, ws, wv, tile, 0,
        KIND, NORM, S, V, ORDER, WIDE, LANES, MASKED,
    )  # fmt: skip
    tl.store(out_ptr + offset, key if KEYS else x, mask=valid)
    if COUNTED:
        hist_ptr += (tile % copies) * DIGITS
        if UPPER:
            tl.atomic_add(hist_ptr + ((key >> 16) + DIGITS // 2), 1, mask=valid, sem="relaxed")
        else:
            inside = valid & ((key >> 16) == prefix)
            tl.atomic_add(hist_ptr + (key & (DIGITS - 1)), 1, mask=inside, sem="relaxed")
        above = tl.sum((valid & (key > high)).to(tl.int32))
        tl.atomic_add(above_ptr, above.to(tl.int64), sem="relaxed")
    if tl.max(bad.to(tl.int32)) > 0:
        tl.store(flags_ptr + FAULT, 1)


@triton.jit(do_not_specialize=["rows", "size", "ws", "wv"])
def fault_kernel(
    base_ptr, tuned_ptr, c_ptr,
    rows, cols, size, blocks, ws, wv,
    first_ptr,  # [1] int64
    KIND: tl.constexpr, NORM: tl.constexpr, S: tl.constexpr, V: tl.constexpr,
    ORDER: tl.constexpr, WIDE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """First offset with a term that is not finite, or with such a sum of scaled terms."""
    tile = tl.program_id(0)
    row, first = place_of(segments_of(tile, SEGMENTS, WIDE), 0, blocks, ORDER)
    column = columns_of_segment(LANES)
    valid = in_tensor(row, first, column, rows, cols, size, ORDER)
    s, v = load_terms(
        base_ptr, tuned_ptr, c_ptr, row, first + column, cols, valid, False, KIND, ORDER, True
    )
    if KIND == SCORES:
        bad = s != s
    else:
        bad = ~(tl.abs(s) < float("inf")) | ~(tl.abs(v) < float("inf"))
        if NORM == NO_NORM and S and V:
            x = s * weight_of(ws).to(tl.float32) + v * weight_of(wv).to(tl.float32)
            bad = bad | ~(tl.abs(x) < float("inf"))
    offset = row * cols + (first + column)
    offset = tl.where(bad & valid, offset, tl.full((), 1 << 62, tl.int64))
    tl.atomic_min(first_ptr, tl.min(offset))
