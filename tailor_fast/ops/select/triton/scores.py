"""Scores of a tile, on chip: loads, terms, moments and keys by the arithmetic of the reference.

A *segment* is the part of one row in one 128-column block: the unit of ``row_block`` and the first
level of every fold. A *tile* is 32 segments that follow each other in the linear order of the unit
of scope; so tiles, and places inside a tile, are in linear order too.

A tile has the axes ``[128 / (8 * LANES), segments, LANES, 8]``: a thread holds 8 neighbours (16
bytes of a 16-bit dtype), ``LANES`` threads share a segment, and the leading axis stays in a
thread's registers. The first steps of a fold are then plain additions; log2(LANES) are shuffles.

Every kernel is launched with ``enable_fp_fusion=False``: an FMA would change the bits.
"""

import triton
import triton.language as tl

WIDTH = tl.constexpr(128)  # columns of a segment
VECTOR = tl.constexpr(8)
SEGMENTS = tl.constexpr(16)
TILE = tl.constexpr(2048)  # elements of a tile

# KIND: what a pair is scored by. LINEAR is `diag` and `ratio`.
SCORES = tl.constexpr(0)  # `tuned` holds the scores themselves
SALIENCE = tl.constexpr(1)
OBS = tl.constexpr(2)
LINEAR = tl.constexpr(3)
WEIGHT = tl.constexpr(4)

# NORM: the unit of normalisation.
NO_NORM = tl.constexpr(0)
TENSOR = tl.constexpr(1)
ROW = tl.constexpr(2)
ROW_BLOCK = tl.constexpr(3)

# ORDER: which segments follow each other.
FLAT = tl.constexpr(0)  # columns do not matter: `cols` is 128, `size` ends the last segment
BY_ROW = tl.constexpr(1)  # the blocks of a row, then the next row
BY_COLUMN = tl.constexpr(2)  # the rows of one block: a unit of scope `block`

INFINITY = tl.constexpr(0x7F800000)  # its key, and its bits
NO_KEY = tl.constexpr(0x7FFFFFFF)  # above every key of a number
LEAST_KEY = tl.constexpr(-0x80000000)  # below every key
SMALLEST_STD = tl.constexpr(2.0**-126)


@triton.jit
def vectors_of_segment(LANES: tl.constexpr):
    """First column of every 8 neighbours, int32 ``[128 / (8 * LANES), 1, LANES]``."""
    HIGH: tl.constexpr = WIDTH // (VECTOR * LANES)
    high = tl.arange(0, HIGH)[:, None, None] * (VECTOR * LANES)
    return high + tl.arange(0, LANES)[None, None, :] * VECTOR


@triton.jit
def columns_of_segment(LANES: tl.constexpr):
    """Column within its segment of every element, int32 ``[128 / (8 * LANES), 1, LANES, 8]``."""
    return vectors_of_segment(LANES)[:, :, :, None] + tl.arange(0, VECTOR)[None, None, None, :]


@triton.jit
def place_of(segment, unit, blocks, ORDER: tl.constexpr):
    """Row (int64) and first column of segments, which are numbered within their unit of scope."""
    if ORDER == BY_ROW:
        row = segment // blocks
        first = (segment - row * blocks) * WIDTH
    elif ORDER == BY_COLUMN:
        row = segment
        first = tl.zeros_like(segment) + unit * WIDTH
    else:
        row = segment
        first = tl.zeros_like(segment)
    return row.to(tl.int64), first


@triton.jit
def segments_of(tile, COUNT: tl.constexpr, WIDE: tl.constexpr):
    """Numbers of a tile's segments ``[1, COUNT, 1, 1]``, 64-bit where 32 do not count them."""
    start = tile.to(tl.int64) * COUNT if WIDE else tile * COUNT
    return start + tl.arange(0, COUNT)[None, :, None, None]


@triton.jit
def in_tensor(row, first, column, rows, cols, size, ORDER: tl.constexpr):
    """Whether elements exist."""
    if ORDER == FLAT:
        inside = row * WIDTH + first + column < size
    else:
        inside = (row < rows) & (first + column < cols)
    return inside


@triton.jit
def weight_of(bits):
    """A float64 that came as the integer of its bits: float arguments arrive as float32."""
    return tl.cast(bits, tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _load(ptr, offset, valid, whole, ORDER: tl.constexpr, MASKED: tl.constexpr):
    # A mask that ends anywhere would make every load of FLAT scalar: only the last tile has one.
    if not MASKED:
        x = tl.load(ptr + offset)
    elif ORDER == FLAT:
        if whole:  # noqa: SIM108  a branch of the program, not a choice between two loads
            x = tl.load(ptr + offset)
        else:
            x = tl.load(ptr + offset, mask=valid, other=0)
    else:
        x = tl.load(ptr + offset, mask=valid, other=0)
    if x.dtype == tl.bfloat16:  # by its bits: the interpreter's cast loses subnormals
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def load_terms(
    base_ptr, tuned_ptr, c_ptr, row, col, cols, valid, whole,
    KIND: tl.constexpr, ORDER: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Salience and sensitivity, float32; both are the scores themselves for ``SCORES``."""
    offset = row * cols + col
    tuned = _load(tuned_ptr, offset, valid, whole, ORDER, MASKED)
    if KIND == SCORES:
        s = tuned
    else:
        delta = tuned - _load(base_ptr, offset, valid, whole, ORDER, MASKED)
        s = tl.abs(delta)
    v = s
    if KIND == OBS:
        v = delta * delta
    if KIND == WEIGHT:
        v = tuned * tuned
    if KIND >= OBS:
        v *= tl.load(c_ptr + col, mask=col < cols, other=0)
    return s, v


@triton.jit
def _halve_leading(x):
    return tl.sum(tl.reshape(x, [2, x.shape[0] // 2, x.shape[1], x.shape[2], x.shape[3]]), axis=0)


@triton.jit
def halve(x):
    """Add the upper half of the last of two axes to the lower half."""
    return tl.sum(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), axis=1)


@triton.jit
def fold_segments(x, LANES: tl.constexpr):
    """Sum of each segment by halves, ``[HIGH, COUNT, LANES, 8]`` to ``[COUNT]``.

    Each step adds two elements, so that the order within a reduction cannot matter.
    """
    for _ in tl.static_range(0, 4):
        if x.shape[0] > 1:
            x = _halve_leading(x)
    x = tl.reshape(x, [x.shape[1], LANES * VECTOR])
    for _ in tl.static_range(0, 7):
        if x.shape[1] > 1:
            x = halve(x)
    return tl.reshape(x, [x.shape[0]])


@triton.jit
def sums_of(x, pivot, valid, LANES: tl.constexpr, MASKED: tl.constexpr):
    """S1 and S2 of each segment about its pivot, float64 ``[COUNT]``."""
    e = x - pivot
    if MASKED:
        e = tl.where(valid, e, 0.0)
    e = e.to(tl.float64)
    return fold_segments(e, LANES), fold_segments(e * e, LANES)


@triton.jit
def affine_of(pivot, s1, s2, n, weight):
    """Mean and factor of units of normalisation, float32, from their float64 sums."""
    q = s1 / n
    std = tl.sqrt((s2 - s1 * q) / (n - 1))
    mean = (pivot.to(tl.float64) + q).to(tl.float32)
    factor = tl.where(std >= SMALLEST_STD, weight / std, 0.0).to(tl.float32)
    return mean, factor


@triton.jit
def _standardise(x, pivot, valid, size, weight, LANES: tl.constexpr, MASKED: tl.constexpr):
    COUNT: tl.constexpr = pivot.shape[1]
    s1, s2 = sums_of(x, pivot, valid, LANES, MASKED)
    mean, factor = affine_of(tl.reshape(pivot, [COUNT]), s1, s2, tl.reshape(size, [COUNT]), weight)
    mean = tl.reshape(mean, [1, COUNT, 1, 1])
    return (x - mean) * tl.reshape(factor, [1, COUNT, 1, 1])


@triton.jit
def _apply_affine(x, affine_ptr, term, row, rows, NORM: tl.constexpr):
    if NORM == TENSOR:
        mean = tl.load(affine_ptr + 2 * term)
        factor = tl.load(affine_ptr + 2 * term + 1)
    else:
        entry = affine_ptr + (2 * term) * rows + row
        mean = tl.load(entry, mask=row < rows, other=0)
        factor = tl.load(entry + rows, mask=row < rows, other=0)
    return (x - mean) * factor


@triton.jit
def keys_of(
    base_ptr, tuned_ptr, c_ptr, affine_ptr, rows, cols, ws, wv,
    row, first, column, valid, whole,
    KIND: tl.constexpr, NORM: tl.constexpr, S: tl.constexpr, V: tl.constexpr,
    ORDER: tl.constexpr, LANES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Scores, their int32 keys (-0 equal to +0), and which elements must be refused."""
    s, v = load_terms(
        base_ptr, tuned_ptr, c_ptr, row, first + column, cols, valid, whole, KIND, ORDER, MASKED
    )
    zs = s
    zv = v
    if NORM == ROW_BLOCK:
        # Loaded once more, from L1: which lane holds it is the layout's business.
        ps, pv = load_terms(
            base_ptr, tuned_ptr, c_ptr, row, first, cols, row < rows, True, KIND, BY_ROW, True
        )
        size = tl.full(first.shape, WIDTH, tl.float64)
        if MASKED:
            size = tl.minimum(cols - first, WIDTH).to(tl.float64)
        if S:
            zs = _standardise(s, ps, valid, size, weight_of(ws), LANES, MASKED)
        if V:
            zv = _standardise(v, pv, valid, size, weight_of(wv), LANES, MASKED)
    elif NORM == NO_NORM:
        if KIND != SCORES and KIND != SALIENCE:  # whose weight is 1
            zs = s * weight_of(ws).to(tl.float32)
            zv = v * weight_of(wv).to(tl.float32)
    else:
        if S:
            zs = _apply_affine(s, affine_ptr, 0, row, rows, NORM)
        if V:
            zv = _apply_affine(v, affine_ptr, 1 if S else 0, row, rows, NORM)
    if S and V:
        x = zs + zv
    elif S:
        x = zs
    else:
        x = zv
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if NORM == NO_NORM and KIND != SCORES:
        key = magnitude  # of numbers that are not negative
    else:
        sign = bits >> 31
        key = (magnitude ^ sign) - sign
    # A term that is not finite leaves no finite score in its unit of normalisation.
    bad = magnitude > INFINITY if KIND == SCORES else magnitude >= INFINITY
    if KIND == WEIGHT and not S:
        bad |= s.to(tl.int32, bitcast=True) >= INFINITY
    return x, key, bad & valid


@triton.jit
def tile_keys(
    base_ptr, tuned_ptr, c_ptr, affine_ptr, rows, cols, size, blocks, ws, wv, tile, unit,
    KIND: tl.constexpr, NORM: tl.constexpr, S: tl.constexpr, V: tl.constexpr,
    ORDER: tl.constexpr, WIDE: tl.constexpr, LANES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """``keys_of`` a tile, with the offset of each element, its place, and whether it exists."""
    row, first = place_of(segments_of(tile, SEGMENTS, WIDE), unit, blocks, ORDER)
    column = columns_of_segment(LANES)
    valid = in_tensor(row, first, column, rows, cols, size, ORDER)
    if not MASKED:
        valid = tl.full(valid.shape, True, tl.int1)
    whole = (tile.to(tl.int64) + 1) * TILE <= size
    x, key, bad = keys_of(
        base_ptr, tuned_ptr, c_ptr, affine_ptr, rows, cols, ws, wv, row, first, column, valid,
        whole, KIND, NORM, S, V, ORDER, LANES, MASKED,
    )  # fmt: skip
    local = tl.arange(0, SEGMENTS)[None, :, None, None] * WIDTH + column
    return x, key, bad, valid, row * cols + (first + column), local
