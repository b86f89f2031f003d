"""The one pass over the pair: a sampled bracket, and every element against it.

The bracket decides only how long the lists of candidates become: counts prove the answer, and where
they do not, the descent over all elements follows.
"""

import triton
import triton.language as tl

from tailor_fast._core.launch import Launch
from tailor_fast.ops.select.triton.scores import (
    BY_COLUMN,
    FLAT,
    LEAST_KEY,
    NO_KEY,
    ROW_BLOCK,
    SEGMENTS,
    VECTOR,
    WIDTH,
    columns_of_segment,
    in_tensor,
    keys_of,
    tile_keys,
    vectors_of_segment,
)
from tailor_fast.ops.select.triton.state import ABOVE, FAULT, FIELDS, HIGH, LOW

CAPACITY = tl.constexpr(256)  # candidates that a tile may list: an eighth of its elements
SAMPLE = tl.constexpr(8192)
# In standard deviations of the sampled rank if elements were independent, plus a few ranks: 3.3% of
# the elements become candidates at density 0.1. Chunks of neighbours that are alike, with twice the
# variance, are still bracketed in 99.96% of the cases; a miss costs passes, not correctness.
MARGIN = tl.constexpr(5.0)
SLACK = tl.constexpr(2.0)

# 32 keys a thread, which need up to 234 registers beside the loads; 16 in twice the warps spill.
# One program per unit of scope: the 32 steps of the bisection are bound by latency, not by work.
BRACKET_LAUNCH = Launch(num_warps=8, enable_fp_fusion=False)
# 32 elements a thread: 154 to 201 registers, no spills, and of a fold's sums only the last levels
# leave the thread. 5 or 6 programs on an SM keep 40 to 48 KiB of loads in flight; programs of twice
# the size, 2 or 3 with 32 to 48. With 16 elements a thread, segments would span the warps.
CLASSIFY_LAUNCH = Launch(num_warps=2, enable_fp_fusion=False)
# Folding the segments of one block with both terms spills 8 bytes on sm_80 with triton 3.6.
COLUMNS_LAUNCH = Launch(num_warps=4, enable_fp_fusion=False)


@triton.jit
def _sample_places(
    unit, rows, cols, size, ORDER: tl.constexpr, NORM: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """Rows and first columns of chunks that are spread over the unit of scope, irregularly."""
    CHUNK: tl.constexpr = WIDTH if NORM == ROW_BLOCK else VECTOR * LANES
    CHUNKS: tl.constexpr = SAMPLE // CHUNK
    HIGH_AXIS: tl.constexpr = 1 if NORM == ROW_BLOCK else WIDTH // CHUNK
    ACROSS: tl.constexpr = CHUNKS // HIGH_AXIS
    high = tl.arange(0, HIGH_AXIS)[:, None, None, None]
    chunk = (high * ACROSS + tl.arange(0, ACROSS)[None, :, None, None]).to(tl.int64)
    first_column = 0
    width = cols
    if ORDER == BY_COLUMN:
        first_column = unit * WIDTH
        width = tl.minimum(cols - first_column, WIDTH)
    per_row = tl.cast((width + CHUNK - 1) // CHUNK, tl.int64)
    chunks = (tl.cast(size, tl.int64) + CHUNK - 1) // CHUNK if ORDER == FLAT else per_row * rows
    # One chunk of each of CHUNKS equal strata; the golden ratio's multiples place it within.
    within = (chunk * 40503) & 0xFFFF
    place = ((chunk * 65536 + within) * chunks) // (CHUNKS * 65536)
    row = place // per_row
    return row, first_column + (place - row * per_row) * CHUNK


@triton.jit(do_not_specialize=["rows", "size", "ws", "wv", "k", "last_k"])
def bracket_kernel(
    base_ptr, tuned_ptr, c_ptr, affine_ptr,
    rows, cols, size, ws, wv,
    state_ptr,  # [units, FIELDS]
    k, last_k,
    KIND: tl.constexpr, NORM: tl.constexpr, S: tl.constexpr, V: tl.constexpr,
    ORDER: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Keys between which the k-th of a unit is expected, from a sample of it."""
    unit = tl.program_id(0)
    row, first = _sample_places(unit, rows, cols, size, ORDER, NORM, LANES)
    if NORM == ROW_BLOCK:
        column = columns_of_segment(LANES)
    else:
        column = tl.arange(0, LANES)[None, None, :, None] * VECTOR
        column = column + tl.arange(0, VECTOR)[None, None, None, :]
    valid = in_tensor(row, first, column, rows, cols, size, ORDER)
    _, key, _ = keys_of(
        base_ptr, tuned_ptr, c_ptr, affine_ptr, rows, cols, ws, wv, row, first, column, valid,
        False, KIND, NORM, S, V, ORDER, LANES, True,
    )  # fmt: skip
    key = tl.where(valid, key, LEAST_KEY)
    sampled = tl.sum(valid.to(tl.int32)).to(tl.float64)
    elements = tl.cast(rows, tl.float64) * cols
    if ORDER == FLAT:
        elements = tl.cast(size, tl.float64)
    if ORDER == BY_COLUMN:
        elements = tl.cast(rows, tl.float64) * tl.minimum(cols - unit * WIDTH, WIDTH)
    kept = tl.where(unit == tl.num_programs(0) - 1, last_k, k).to(tl.float64) / elements
    rank = kept * sampled
    margin = tl.sqrt(rank * (1 - kept)) * MARGIN + SLACK
    low = tl.full((), LEAST_KEY, tl.int64)
    low_end = tl.full((), NO_KEY, tl.int64)
    high = low
    high_end = low_end
    # The largest key that `rank` or more of the sample reach. Both at once: two counts in a word.
    for _ in range(32):
        low_try = low + ((low_end - low + 1) >> 1)
        high_try = high + ((high_end - high + 1) >> 1)
        one = (key >= low_try.to(tl.int32)).to(tl.int32)
        two = (key >= high_try.to(tl.int32)).to(tl.int32)
        both = tl.sum(one + (two << 16))
        low_enough = (both & 0xFFFF).to(tl.float64) >= rank + margin
        high_enough = (both >> 16).to(tl.float64) >= rank - margin
        low = tl.where(low_enough, low_try, low)
        low_end = tl.where(low_enough, low_end, low_try - 1)
        high = tl.where(high_enough, high_try, high)
        high_end = tl.where(high_enough, high_end, high_try - 1)
    high = tl.where(rank - margin < 1, tl.full((), NO_KEY, tl.int64), high)
    tl.store(state_ptr + unit * FIELDS + LOW, low)
    tl.store(state_ptr + unit * FIELDS + HIGH, high)


@triton.jit
def _neighbours(x):
    """The 8 elements along the last axis, which a thread holds: nothing moves."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2], 4, 2]))
    x0, x2 = tl.split(tl.reshape(even, [x.shape[0], x.shape[1], x.shape[2], 2, 2]))
    x1, x3 = tl.split(tl.reshape(odd, [x.shape[0], x.shape[1], x.shape[2], 2, 2]))
    a0, a4 = tl.split(x0)
    a2, a6 = tl.split(x2)
    a1, a5 = tl.split(x1)
    a3, a7 = tl.split(x3)
    return a0, a1, a2, a3, a4, a5, a6, a7


@triton.jit
def _is_candidate(key, low, high):
    return ((key >= low) & (key <= high)).to(tl.int32)


@triton.jit
def _append(list_ptr, slot, key, local, low, high):
    """List one element of every thread's 8; returns the next free slot."""
    inside = _is_candidate(key, low, high)
    entry = (key.to(tl.int64) << 32) | local  # two registers side by side
    tl.store(list_ptr + slot, entry, mask=(inside > 0) & (slot < CAPACITY))
    return slot + inside


@triton.jit(do_not_specialize=["rows", "size", "ws", "wv"])
def classify_kernel(
    base_ptr, tuned_ptr, c_ptr, affine_ptr,
    rows, cols, size, blocks, ws, wv,
    mask_ptr,  # uint8, the mask
    state_ptr,  # [units, FIELDS]
    flags_ptr,
    counts_ptr,  # [units, tiles] int32, zero
    lists_ptr,  # [units, tiles, CAPACITY] int64: the key above, the place in the tile below
    KIND: tl.constexpr, NORM: tl.constexpr, S: tl.constexpr, V: tl.constexpr,
    ORDER: tl.constexpr, WIDE: tl.constexpr, LANES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Mark what lies above the bracket, list what lies inside."""
    tile = tl.program_id(0)
    unit = tl.program_id(1)
    _, key, bad, valid, offset, _ = tile_keys(
        base_ptr, tuned_ptr, c_ptr, affine_ptr, rows, cols, size, blocks, ws, wv, tile, unit,
        KIND, NORM, S, V, ORDER, WIDE, LANES, MASKED,
    )  # fmt: skip
    state_ptr += unit * FIELDS
    low = tl.load(state_ptr + LOW).to(tl.int32)
    high = tl.load(state_ptr + HIGH).to(tl.int32)
    above = (key > high) & valid
    tl.store(mask_ptr + offset, above.to(tl.uint8), mask=valid)
    # An element that does not exist lies below every bracket.
    low = tl.maximum(low, LEAST_KEY + 1)
    k0, k1, k2, k3, k4, k5, k6, k7 = _neighbours(tl.where(valid, key, LEAST_KEY))
    found = _is_candidate(k0, low, high) + _is_candidate(k1, low, high)
    found += _is_candidate(k2, low, high) + _is_candidate(k3, low, high)
    found += _is_candidate(k4, low, high) + _is_candidate(k5, low, high)
    found += _is_candidate(k6, low, high) + _is_candidate(k7, low, high)
    index = unit.to(tl.int64) * tl.num_programs(0) + tile
    # One claim for 8 neighbours, which few of them have to make.
    counter = counts_ptr + index + tl.zeros_like(found)
    slot = tl.atomic_add(counter, found, mask=found > 0, sem="relaxed")
    list_ptr = lists_ptr + index * CAPACITY
    at = tl.arange(0, SEGMENTS)[None, :, None] * WIDTH + vectors_of_segment(LANES)
    slot = _append(list_ptr, slot, k0, at, low, high)
    slot = _append(list_ptr, slot, k1, at + 1, low, high)
    slot = _append(list_ptr, slot, k2, at + 2, low, high)
    slot = _append(list_ptr, slot, k3, at + 3, low, high)
    slot = _append(list_ptr, slot, k4, at + 4, low, high)
    slot = _append(list_ptr, slot, k5, at + 5, low, high)
    slot = _append(list_ptr, slot, k6, at + 6, low, high)
    _append(list_ptr, slot, k7, at + 7, low, high)
    # Two counts in a word: at most TILE each.
    both = tl.sum(above.to(tl.int32) + (bad.to(tl.int32) << 16))
    tl.atomic_add(state_ptr + ABOVE, (both & 0xFFFF).to(tl.int64), sem="relaxed")
    if (both >> 16) > 0:
        tl.store(flags_ptr + FAULT, 1)
