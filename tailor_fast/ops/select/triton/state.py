"""What a selection keeps on the device between its kernels, per unit of scope.

Device functions of the descent: the k-th largest key is found 11 bits at a time, by a histogram of
the keys between ``FLOOR`` and ``FLOOR + SPAN`` per level; whoever finishes a level last locates the
bin and narrows the interval. At the end ``SPAN`` is 0 and ``FLOOR`` the threshold, of whose equals
``NEED`` belong to the k best.
"""

import triton
import triton.language as tl

from tailor_fast.ops.select.triton.scores import LEAST_KEY, NO_KEY, TILE

# Fields of a unit's state, int64. Keys between the means of LOWS and HIGHS are candidates: one
# estimate of each by every part of the sample.
PARTS = tl.constexpr(4)
PARTS_SHIFT = tl.constexpr(2)
LOWS = tl.constexpr(16)
HIGHS = tl.constexpr(20)
ABOVE = tl.constexpr(2)  # how many lie above the candidates
FLOOR = tl.constexpr(3)
SPAN = tl.constexpr(4)
NEED = tl.constexpr(5)
BOUNDARY = tl.constexpr(6)  # ties before this tile are taken, those behind it are not,
LEFT = tl.constexpr(7)  # and of its own the first LEFT
TAKEN = tl.constexpr(8)  # ties taken in all
TICKETS = tl.constexpr(9)  # one per level, one for the ties
FIELDS = tl.constexpr(24)

# Flags of a selection, int64.
FAULT = tl.constexpr(0)  # a score must be refused
FAILED = tl.constexpr(1)  # the counts do not prove the bracket, or a list was too short
FLAGS = tl.constexpr(2)

ALL_TIES = tl.constexpr(1 << 62)  # a boundary behind every tile

LEVELS = tl.constexpr(3)
BINS = tl.constexpr(2048)
SCAN = tl.constexpr(1024)  # tiles looked at together where the ties are located


@triton.jit
def shift_of(span):
    """Bits below the digit of a level: as few as make the digits of ``[0, span]`` fit."""
    shift = 0
    for _ in tl.static_range(0, 22):
        shift += ((span >> shift) >= BINS).to(tl.int32)
    return shift


@triton.jit
def bracket_of(state_ptr):
    """Lowest and highest key of a candidate; no candidate has the least key."""
    part = tl.arange(0, PARTS)
    low = tl.sum(tl.load(state_ptr + LOWS + part)) >> PARTS_SHIFT
    high = tl.sum(tl.load(state_ptr + HIGHS + part)) >> PARTS_SHIFT
    return tl.maximum(low, LEAST_KEY + 1), high


@triton.jit
def is_last(ticket_ptr, programs):
    """Whether all other programs of this unit have come by; what they wrote is then visible."""
    tl.debug_barrier()  # the ticket releases what every thread of this program wrote
    return tl.atomic_add(ticket_ptr, 1) == programs - 1


@triton.jit
def locate(state_ptr, flags_ptr, hist_ptr, floor, span, need, copies):
    """Narrow a unit's interval to the bin that holds the key of rank ``need``."""
    bins = tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int64)
    for copy in range(copies):
        counts += tl.load(hist_ptr + copy * BINS + bins, cache_modifier=".cg")
    below = tl.cumsum(counts, axis=0) - counts
    total = tl.sum(counts)
    reached = total - below  # keys in this bin and in higher ones
    if need == 0:
        tl.store(state_ptr + FLOOR, NO_KEY)
        tl.store(state_ptr + SPAN, 0)
        tl.store(state_ptr + NEED, 0)
    elif (need < 0) | (need > total):
        tl.store(flags_ptr + FAILED, 1)
        tl.store(state_ptr + SPAN, 0)
    else:
        shift = shift_of(span)
        digit = tl.sum((reached >= need).to(tl.int64)) - 1
        higher = tl.sum(tl.where(bins > digit, counts, 0))
        if (shift == 0) & (tl.sum(tl.where(bins == digit, counts, 0)) == need - higher):
            tl.store(state_ptr + BOUNDARY, ALL_TIES)
        tl.store(state_ptr + FLOOR, floor + (digit << shift))
        tl.store(state_ptr + SPAN, (tl.full((), 1, tl.int64) << shift) - 1)
        tl.store(state_ptr + NEED, need - higher)


@triton.jit
def begin_level(state_ptr, level, k, FROM_BRACKET: tl.constexpr):
    """Interval and rank that a level starts with."""
    if level > 0:
        floor = tl.load(state_ptr + FLOOR)
        span = tl.load(state_ptr + SPAN)
        need = tl.load(state_ptr + NEED)
    elif FROM_BRACKET:
        floor, high = bracket_of(state_ptr)
        span = high - floor
        need = k - tl.load(state_ptr + ABOVE)
    else:
        floor = tl.full((), LEAST_KEY, tl.int64)
        span = tl.full((), 0xFFFFFFFF, tl.int64)
        need = tl.cast(k, tl.int64)
    return floor, span, need


@triton.jit
def count_digits(hist_ptr, key, present, floor, span):
    """Count the digits of the keys in the interval; ``hist_ptr`` is this program's copy."""
    place = key.to(tl.int64) - floor
    inside = present & (place >= 0) & (place <= span)
    digit = (place >> shift_of(span)).to(tl.int32)
    tl.atomic_add(hist_ptr + digit, 1, mask=inside, sem="relaxed")


@triton.jit
def locate_ties(state_ptr, ties_ptr, tiles):
    """Find the tile where the ties that are taken end, from the ties of every tile."""
    need = tl.load(state_ptr + NEED)
    boundary = tl.full((), 0, tl.int64)
    before = tl.full((), 0, tl.int64)  # ties in the tiles before the boundary
    seen = tl.full((), 0, tl.int64)
    for start in range(0, tiles, SCAN):
        tile = start + tl.arange(0, SCAN)
        ties = tl.load(ties_ptr + tile, mask=tile < tiles, other=0, cache_modifier=".cg")
        reached = seen + tl.cumsum(ties.to(tl.int64), axis=0)
        short = (reached < need) & (tile < tiles)
        boundary += tl.sum(short.to(tl.int64))
        before = tl.maximum(before, tl.max(tl.where(short, reached, 0)))
        seen += tl.sum(ties.to(tl.int64))
    tl.store(state_ptr + BOUNDARY, boundary)
    tl.store(state_ptr + LEFT, need - before)
    tl.store(state_ptr + TAKEN, tl.minimum(need, seen))


@triton.jit
def last_place(tie, local, left):
    """Place of the tie number ``left`` in a tile, -1 for none: ties up to it are taken."""
    low = -1
    high = TILE - 1
    for _ in range(11):
        middle = (low + high) >> 1
        enough = tl.sum((tie & (local <= middle)).to(tl.int32)) >= left
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle)
    return tl.where(left > 0, high, -1)
