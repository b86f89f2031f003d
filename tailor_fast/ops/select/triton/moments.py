"""Means and factors over rows and over a tensor: one pass over the pair, then folds of its sums."""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from tailor_fast._core.launch import Launch
from tailor_fast.ops.select.triton.pair import FOLD_LANES, Pair, ceil_div, launch
from tailor_fast.ops.select.triton.scores import (
    BY_ROW,
    ROW,
    SEGMENTS,
    TENSOR,
    affine_of,
    columns_of_segment,
    in_tensor,
    load_terms,
    place_of,
    segments_of,
    sums_of,
    weight_of,
)

UNITS = tl.constexpr(1024)  # units of normalisation per program of `affine_kernel`

# As `classify_kernel`: 32 elements of a tile per thread.
SUMS_LAUNCH = Launch(num_warps=2, enable_fp_fusion=False)
# 4096 float64 in 4 warps are 64 registers a thread; sums are a 64th of the pair's bytes.
FOLD_LAUNCH = Launch(num_warps=4, enable_fp_fusion=False)
AFFINE_LAUNCH = Launch(num_warps=4, enable_fp_fusion=False)
FOLD_MOST = 128  # elements folded into one by one launch; zeros beyond the last change no sum
FOLD_WIDE = {"UNITS_AT_ONCE": 1, "FOLDED": FOLD_MOST, "REST": 32}
FOLD_LAST = {"UNITS_AT_ONCE": 32, "FOLDED": FOLD_MOST, "REST": 1}


@triton.jit
def _pivots(
    base_ptr, tuned_ptr, c_ptr, row, rows, cols, KIND: tl.constexpr, NORM: tl.constexpr
):  # fmt: skip
    """Terms of the first element of each unit of normalisation."""
    if NORM != ROW:
        row = tl.zeros_like(row)
    first = tl.zeros_like(row)
    return load_terms(
        base_ptr, tuned_ptr, c_ptr, row, first, cols, row < rows, True, KIND, BY_ROW, True
    )


@triton.jit(do_not_specialize=["rows"])
def sums_kernel(
    base_ptr,  # [rows, cols]
    tuned_ptr,  # [rows, cols]
    c_ptr,  # [cols]
    sums_ptr,  # [terms, 2, rows, blocks] float64
    rows, cols, blocks,
    KIND: tl.constexpr, NORM: tl.constexpr, S: tl.constexpr, V: tl.constexpr,
    WIDE: tl.constexpr, LANES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """S1 and S2 of every segment about the pivot of its unit of normalisation."""
    segment = segments_of(tl.program_id(0), SEGMENTS, WIDE)
    row, first = place_of(segment, 0, blocks, BY_ROW)
    column = columns_of_segment(LANES)
    valid = in_tensor(row, first, column, rows, cols, 0, BY_ROW)
    s, v = load_terms(
        base_ptr, tuned_ptr, c_ptr, row, first + column, cols, valid, True, KIND, BY_ROW, MASKED
    )
    ps, pv = _pivots(base_ptr, tuned_ptr, c_ptr, row, rows, cols, KIND, NORM)
    where = tl.reshape(segment, [SEGMENTS]).to(tl.int64)
    exists = tl.reshape(row, [SEGMENTS]) < rows
    count = tl.cast(rows, tl.int64) * blocks
    if S:
        s1, s2 = sums_of(s, ps, valid, LANES, MASKED)
        tl.store(sums_ptr + where, s1, mask=exists)
        tl.store(sums_ptr + count + where, s2, mask=exists)
    if V:
        s1, s2 = sums_of(v, pv, valid, LANES, MASKED)
        start = 2 * count if S else 0 * count
        tl.store(sums_ptr + start + where, s1, mask=exists)
        tl.store(sums_ptr + start + count + where, s2, mask=exists)


@triton.jit(do_not_specialize=["units", "n", "rest"])
def fold_kernel(
    x_ptr,  # [units, n] float64
    out_ptr,  # [units, rest] float64
    units, n, rest,
    UNITS_AT_ONCE: tl.constexpr, FOLDED: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """``out[u, l]`` is the fold of ``x[u, l + rest * h]`` over h, padded by zeros."""
    unit = tl.program_id(0).to(tl.int64) * UNITS_AT_ONCE
    unit += tl.arange(0, UNITS_AT_ONCE)[:, None, None]
    low = tl.program_id(1).to(tl.int64) * REST + tl.arange(0, REST)[None, None, :]
    place = tl.arange(0, FOLDED)[None, :, None] * tl.cast(rest, tl.int64) + low
    inside = (unit < units) & (low < rest) & (place < n)
    x = tl.load(x_ptr + unit * n + place, mask=inside, other=0.0)
    for _ in tl.static_range(0, 7):
        if x.shape[1] > 1:
            x = tl.sum(tl.reshape(x, [UNITS_AT_ONCE, 2, x.shape[1] // 2, REST]), axis=1)
    tl.store(out_ptr + unit * rest + low, x, mask=(unit < units) & (low < rest))


@triton.jit(do_not_specialize=["rows", "units", "n", "ws", "wv"])
def affine_kernel(
    base_ptr, tuned_ptr, c_ptr,
    sums_ptr,  # [terms, 2, units] float64
    affine_ptr,  # [terms, 2, units] float32
    rows, cols, units, n, ws, wv,
    KIND: tl.constexpr, NORM: tl.constexpr, S: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Mean and factor of every unit of normalisation."""
    unit = tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    exists = unit < units
    ps, pv = _pivots(base_ptr, tuned_ptr, c_ptr, unit, rows, cols, KIND, NORM)
    elements = tl.cast(n, tl.int64).to(tl.float64)
    for term in tl.static_range(0, 2):
        if S if term == 0 else V:
            place = (2 * term if S else 0) * tl.cast(units, tl.int64) + unit
            s1 = tl.load(sums_ptr + place, mask=exists, other=0.0)
            s2 = tl.load(sums_ptr + units + place, mask=exists, other=0.0)
            mean, factor = affine_of(
                ps if term == 0 else pv, s1, s2, elements, weight_of(ws if term == 0 else wv)
            )
            tl.store(affine_ptr + place, mean, mask=exists)
            tl.store(affine_ptr + units + place, factor, mask=exists)


def with_moments(pair: Pair) -> Pair:
    """The pair with the means and factors of its units of normalisation, where it has any."""
    if pair.norm not in (ROW.value, TENSOR.value):
        return pair
    rows, cols = pair.shape
    terms = pair.terms["S"] + pair.terms["V"]
    device = pair.tuned.device
    sums = torch.empty((2 * terms, rows, pair.blocks), dtype=torch.float64, device=device)
    layout = {"WIDE": pair.wide, "LANES": FOLD_LANES, "MASKED": pair.masked}
    tensors = pair.base, pair.tuned, pair.column_weight
    launch(
        sums_kernel, (pair.tiles,), SUMS_LAUNCH,
        *tensors, sums, rows, cols, pair.blocks, **pair.terms, **layout,
    )  # fmt: skip
    sums = _fold(sums.view(-1, pair.blocks)).view(2 * terms, rows)
    if pair.norm == TENSOR.value:
        sums = _fold(sums)[:, None]
    units = sums.shape[1]
    affine = torch.empty((terms, 2, units), dtype=torch.float32, device=device)
    elements = cols if pair.norm == ROW.value else rows * cols
    launch(
        affine_kernel, (ceil_div(units, UNITS.value),), AFFINE_LAUNCH,
        *tensors, sums, affine, rows, cols, units, elements, *pair.weight_bits, **pair.terms,
    )  # fmt: skip
    return replace(pair, affine=affine)


def _fold(x: torch.Tensor) -> torch.Tensor:
    """Fold along the second of two dimensions, float64."""
    while x.shape[1] > 1:
        units, n = x.shape
        rest = max(1, (1 << (n - 1).bit_length()) // FOLD_MOST)
        out = torch.empty((units, rest), dtype=torch.float64, device=x.device)
        tile = FOLD_WIDE if rest > 1 else FOLD_LAST
        grid = (ceil_div(units, tile["UNITS_AT_ONCE"]), ceil_div(rest, tile["REST"]))
        launch(fold_kernel, grid, FOLD_LAUNCH, x, out, units, n, rest, **tile)
        x = out
    return x[:, 0]
