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
    SCORES,
    SEGMENTS,
    VECTOR,
    WIDTH,
    columns_of_segment,
    in_tensor,
    keys_of,
    tile_keys,
    vectors_of_segment,
)
from tailor_fast.ops.select.triton.state import (
    ABOVE,
    FAULT,
    FIELDS,
    FLAGS,
    HIGHS,
    LOWS,
    PARTS,
    bracket_of,
)
from tailor_fast.ops.select.triton.table import (
    GROUP,
    KEPT,
    LINE,
    MEMBER,
    TILES,
    line_of,
    mask_of,
    sizes_of,
    tensors_of,
)

CAPACITY = tl.constexpr(128)  # candidates that a tile may list: a sixteenth of its elements
SAMPLE = tl.constexpr(8192)  # of one part; four parts estimate the bracket apart
# In standard deviations of the sampled rank if elements were independent, plus a few ranks: 1.7% of
# the elements become candidates at density 0.1. Chunks of neighbours that are alike, with twice the
# variance, are still bracketed in 99.96% of the cases; a miss costs passes, not correctness.
MARGIN = tl.constexpr(2.5)  # of one part: the mean of four varies half as much
SLACK = tl.constexpr(2.0)

# 32 keys a thread, which need up to 234 registers beside the loads; 16 in twice the warps spill.
# Few programs per unit of scope: the 32 steps of the bisection are bound by latency, not by work.
BRACKET_LAUNCH = Launch(num_warps=8, enable_fp_fusion=False)
# 32 elements a thread: 154 to 201 registers, no spills, and of a fold's sums only the last levels
# leave the thread. 5 or 6 programs on an SM keep 40 to 48 KiB of loads in flight; programs of twice
# the size, 2 or 3 with 32 to 48. With 16 elements a thread, segments would span the warps.
CLASSIFY_LAUNCH = Launch(num_warps=2, enable_fp_fusion=False)
# 16 elements a thread where 32 spill with triton 3.6 or 3.7: the segments of one block folded with
# both terms, scores as they are, and loads of single words, whose offsets are kept apart.
NARROW_LAUNCH = Launch(num_warps=4, enable_fp_fusion=False)


def classify_launch(kind: int, order: int, norm: int, aligned: bool) -> Launch:
    """Launch of ``classify_kernel`` by its constants."""
    folds_columns = order == BY_COLUMN.value and norm == ROW_BLOCK.value
    narrow = folds_columns or kind == SCORES.value or not aligned
    return NARROW_LAUNCH if narrow else CLASSIFY_LAUNCH


@triton.jit
def _sample_places(
    part, number, rows, cols, size,
    ORDER: tl.constexpr, NORM: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Rows and first columns of chunks that are spread over the unit of scope, irregularly."""
    CHUNK: tl.constexpr = WIDTH if NORM == ROW_BLOCK else VECTOR * LANES
    CHUNKS: tl.constexpr = SAMPLE // CHUNK
    HIGH_AXIS: tl.constexpr = 1 if NORM == ROW_BLOCK else WIDTH // CHUNK
    ACROSS: tl.constexpr = CHUNKS // HIGH_AXIS
    high = tl.arange(0, HIGH_AXIS)[:, None, None, None]
    chunk = (high * ACROSS + tl.arange(0, ACROSS)[None, :, None, None]).to(tl.int64)
    chunk = chunk * PARTS + part
    first_column = 0
    width = cols
    if ORDER == BY_COLUMN:
        first_column = number * WIDTH
        width = tl.minimum(cols - first_column, WIDTH)
    per_row = tl.cast((width + CHUNK - 1) // CHUNK, tl.int64)
    chunks = (tl.cast(size, tl.int64) + CHUNK - 1) // CHUNK if ORDER == FLAT else per_row * rows
    # One chunk of each of equal strata; the golden ratio's multiples place it within.
    within = (chunk * 40503) & 0xFFFF
    place = ((chunk * 65536 + within) * chunks) // (CHUNKS * PARTS * 65536)
    row = place // per_row
    return row, first_column + (place - row * per_row) * CHUNK


@triton.jit(do_not_specialize=["ws", "wv"])
def bracket_kernel(
    table_ptr, ws, wv,
    state_ptr,  # [units, FIELDS]
    DTYPE: tl.constexpr, KIND: tl.constexpr, NORM: tl.constexpr, S: tl.constexpr,
    V: tl.constexpr, ORDER: tl.constexpr, LANES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Keys between which the k-th of a unit is expected, from a part of the sample of it."""
    part = tl.program_id(0)
    unit = tl.program_id(1)
    line_ptr = table_ptr + unit * LINE
    base_ptr, tuned_ptr, c_ptr, affine_ptr = tensors_of(line_ptr, DTYPE, KIND, NORM, ALIGNED)
    rows, cols, size, _, number = sizes_of(line_ptr, ALIGNED)
    row, first = _sample_places(part, number, rows, cols, size, ORDER, NORM, LANES)
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
        elements = tl.cast(rows, tl.float64) * tl.minimum(cols - number * WIDTH, WIDTH)
    kept = tl.load(line_ptr + KEPT).to(tl.float64) / elements
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
    tl.store(state_ptr + unit * FIELDS + LOWS + part, low)
    tl.store(state_ptr + unit * FIELDS + HIGHS + part, high)


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
def _append(list_ptr, slot, room, rank, limit, local):
    """List one element of every thread's 8; returns the next free slot."""
    inside = rank < limit
    entry = (rank.to(tl.int64) << 32) | local.to(tl.uint32).to(tl.int64)  # two registers
    tl.store(list_ptr + slot, entry, mask=inside & room)
    return slot + inside.to(tl.int32)


@triton.jit(do_not_specialize=["ws", "wv"])
def classify_kernel(
    table_ptr, map_ptr, ws, wv,
    state_ptr,  # [units, FIELDS]
    flags_ptr,  # [members, FLAGS]
    counts_ptr,  # [tiles of the grid] int32, zero
    lists_ptr,  # [tiles of the grid, CAPACITY] int64: rank above, place in the tile below
    DTYPE: tl.constexpr, KIND: tl.constexpr, NORM: tl.constexpr, S: tl.constexpr,
    V: tl.constexpr, ORDER: tl.constexpr, WIDE: tl.constexpr, LANES: tl.constexpr,
    MASKED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Mark what lies above the bracket, list what lies inside."""
    index = tl.program_id(0)
    line_ptr, unit, start = line_of(table_ptr, map_ptr, index // GROUP)
    tile = index - start
    if tile >= tl.load(line_ptr + TILES):
        return
    tile = tile.to(tl.int32)
    base_ptr, tuned_ptr, c_ptr, affine_ptr = tensors_of(line_ptr, DTYPE, KIND, NORM, ALIGNED)
    rows, cols, size, blocks, number = sizes_of(line_ptr, ALIGNED)
    _, key, bad, valid, offset, _ = tile_keys(
        base_ptr, tuned_ptr, c_ptr, affine_ptr, rows, cols, size, blocks, ws, wv, tile, number,
        KIND, NORM, S, V, ORDER, WIDE, LANES, MASKED,
    )  # fmt: skip
    if MASKED:  # an element that does not exist lies below every bracket
        key = tl.where(valid, key, LEAST_KEY)
    mask_ptr = mask_of(line_ptr, ALIGNED)
    state_ptr += unit * FIELDS
    low, high = bracket_of(state_ptr)
    above = (key > high.to(tl.int32)).to(tl.int32)
    tl.store(mask_ptr + offset, above.to(tl.uint8), mask=valid)
    # At once: 32 conditions that are asked for later would be packed into bits and unpacked.
    tl.atomic_add(state_ptr + ABOVE, tl.sum(above).to(tl.int64), sem="relaxed")
    if tl.max(bad.to(tl.int32)) > 0:
        tl.store(flags_ptr + tl.load(line_ptr + MEMBER) * FLAGS + FAULT, 1)
    low = low.to(tl.int32)
    # How far a key lies above the lowest candidate, unsigned: a key below it lies far above.
    span = (high - low).to(tl.uint32)
    r0, r1, r2, r3, r4, r5, r6, r7 = _neighbours((key - low).to(tl.uint32, bitcast=True))
    found = (r0 <= span).to(tl.int32) + (r1 <= span).to(tl.int32)
    found += (r2 <= span).to(tl.int32) + (r3 <= span).to(tl.int32)
    found += (r4 <= span).to(tl.int32) + (r5 <= span).to(tl.int32)
    found += (r6 <= span).to(tl.int32) + (r7 <= span).to(tl.int32)
    # One claim for 8 neighbours, which few of them have to make.
    counter = counts_ptr + index + tl.zeros_like(found)
    slot = tl.atomic_add(counter, found, mask=found > 0, sem="relaxed")
    room = slot + found <= CAPACITY  # a list that is too short has failed as a whole
    limit = span + 1  # not `<= span` again: the conditions would be kept, see above
    list_ptr = lists_ptr + index.to(tl.int64) * CAPACITY
    at = tl.arange(0, SEGMENTS)[None, :, None] * WIDTH + vectors_of_segment(LANES)
    slot = _append(list_ptr, slot, room, r0, limit, at)
    slot = _append(list_ptr, slot, room, r1, limit, at + 1)
    slot = _append(list_ptr, slot, room, r2, limit, at + 2)
    slot = _append(list_ptr, slot, room, r3, limit, at + 3)
    slot = _append(list_ptr, slot, room, r4, limit, at + 4)
    slot = _append(list_ptr, slot, room, r5, limit, at + 5)
    slot = _append(list_ptr, slot, room, r6, limit, at + 6)
    _append(list_ptr, slot, room, r7, limit, at + 7)
