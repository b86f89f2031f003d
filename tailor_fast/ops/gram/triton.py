"""The ``gram`` op in Triton: tensor cores for the products, masks applied where tokens are loaded.

    out[i, j] += sum over counted t of x[t, i] y[t, j]       (y = x: tiles of the lower triangle)
    diag[j]   += sum over counted t of x[t, j]^2

One program owns one tile of the sum and goes over all tokens: the sum is read and written once, in
one order of additions. Products of bfloat16 and float16 are exact in float32; float32 is split into
three TF32 products, which keep 21 bits of each factor. A tensor core rounds its accumulator towards
zero, by half a unit at every step, always in the same direction: after a segment of tokens the tile
is added to a second accumulator, which is rounded to nearest. The diagonal makes one read pass,
with one partial sum per segment of tokens.
"""

import functools
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from tailor_fast._core.launch import KernelForm, Launch

Tensor = torch.Tensor

# Tokens that one accumulator of a tensor core takes. It is off by about 2e-8 of the sum per step of
# 16 tokens, so by 2.7e-6 after a segment, where a plain float32 sum over 65,536 tokens is off by
# 1e-5; each segment refills the pipeline, 1/32 of its steps.
SEGMENT_TOKENS = 2048
# Tiles of a band share their columns of y in the L2 cache: 132 programs at once read 8 + 17 stripes
# of x in place of the 88 that a row-by-row order touches at 11008 columns.
BAND_TILES = 8
# Tokens of one partial sum of the diagonal: 2048 tokens of 4096 columns make 128 programs, and the
# partial sums are 1/128 of the bytes of bfloat16 tokens.
DIAG_TOKENS = 256


class Tiling(NamedTuple):
    """Tile of the sum, tokens per step, and launch."""

    tile: int
    tokens: int
    launch: Launch


# 128: 528 tiles at 4096 columns are exactly four waves on 132 multiprocessors. Two accumulators are
# 128 registers of each of 256 threads; 256 columns would need all there are. Five stages of 32 KiB;
# with four, the compiler spills on sm_80.
WIDE = Tiling(128, 64, Launch(num_warps=8, num_stages=5))
# For few columns, where tiles of 128 would leave multiprocessors idle, and for cards whose shared
# memory does not hold five stages of those.
NARROW = Tiling(64, 64, Launch(num_warps=4, num_stages=4))
# Three products of split float32 operands: half the tokens per step, for shared memory.
FLOAT32 = Tiling(64, 32, Launch(num_warps=4, num_stages=3))
WIDE_FROM = 2049  # columns: 17 rows of tiles, 153 tiles
WIDE_SHARED = 160 << 10  # bytes of shared memory
# 16 tokens of 512 bytes in flight per program, eight programs to a multiprocessor.
DIAG = Launch(num_warps=4)
DIAG_STEP, DIAG_COLS = 16, 256


@triton.jit
def _triangle_row(index):
    """Row of the ``index``-th element of a lower triangle, counted row by row."""
    row = ((tl.sqrt(8.0 * index + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The root is rounded: one step either way makes it exact.
    row = tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)
    return tl.where(row * (row + 1) // 2 > index, row - 1, row)


@triton.jit
def _lower_tile(index, tiles, BAND: tl.constexpr):
    """Row and column of a lower tile: by bands of rows, down each column of a band."""
    first = _triangle_row(index) // BAND * BAND
    height = tl.minimum(BAND, tiles - first)
    within = index - first * (first + 1) // 2
    corner = within - first * height  # of the triangle that ends the band, where not negative
    corner_row = _triangle_row(tl.maximum(corner, 0))
    row = tl.where(corner < 0, within % height, corner_row)
    col = tl.where(
        corner < 0, within // height, first + corner - corner_row * (corner_row + 1) // 2
    )
    return first + row, col


@triton.jit
def _full_tile(index, rows, cols, BAND: tl.constexpr):
    """Row and column of a tile of the whole matrix, in the same order."""
    first = index // (BAND * cols) * BAND
    height = tl.minimum(BAND, rows - first)
    within = index - first * cols
    return first + within % height, within // height


@triton.jit
def _moment_kernel(
    out_ptr,  # float32 [x_cols, y_cols]
    x_ptr,  # [tokens, x_cols]
    y_ptr,  # [tokens, y_cols]
    mask_ptr,  # uint8 [tokens], or anything where not MASKED
    tokens,
    x_cols,
    y_cols,
    LOWER: tl.constexpr,
    MASKED: tl.constexpr,
    WIDEN: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    SEGMENT: tl.constexpr,
    BAND: tl.constexpr,
):
    if LOWER:
        tile_row, tile_col = _lower_tile(tl.program_id(0), tl.cdiv(x_cols, TILE), BAND)
    else:
        tile_row, tile_col = _full_tile(
            tl.program_id(0), tl.cdiv(x_cols, TILE), tl.cdiv(y_cols, TILE), BAND
        )
    offs_i = tile_row * TILE + tl.arange(0, TILE)
    offs_j = tile_col * TILE + tl.arange(0, TILE)
    mask_i, mask_j = offs_i < x_cols, offs_j < y_cols
    total = tl.zeros((TILE, TILE), tl.float32)
    for segment in range(0, tokens, SEGMENT):
        part = tl.zeros((TILE, TILE), tl.float32)
        for start in range(segment, tl.minimum(segment + SEGMENT, tokens), TOKENS):
            offs_t = start + tl.arange(0, TOKENS)
            counted = offs_t < tokens
            if MASKED:
                counted = counted & (tl.load(mask_ptr + offs_t, mask=counted, other=0) != 0)
            row = offs_t.to(tl.int64)
            x = tl.load(
                x_ptr + row[None, :] * x_cols + offs_i[:, None],
                mask=counted[None, :] & mask_i[:, None],
                other=0.0,
            )
            y = tl.load(
                y_ptr + row[:, None] * y_cols + offs_j[None, :],
                mask=counted[:, None] & mask_j[None, :],
                other=0.0,
            )
            if WIDEN:
                x, y = x.to(tl.float32), y.to(tl.float32)
            part = tl.dot(x, y, part, input_precision="tf32x3")
        total += part
    i, j = offs_i[:, None].to(tl.int64), offs_j[None, :].to(tl.int64)
    inside = mask_i[:, None] & mask_j[None, :]
    if LOWER:
        inside = inside & (offs_i[:, None] >= offs_j[None, :])
    at = out_ptr + i * y_cols + j
    total += tl.load(at, mask=inside, other=0.0)
    tl.store(at, total, mask=inside)
    if LOWER:
        tl.store(
            out_ptr + j * y_cols + i, total, mask=inside & (offs_i[:, None] != offs_j[None, :])
        )


@triton.jit
def _diagonal_kernel(
    partial_ptr,  # float32 [segments, cols]
    x_ptr,  # [tokens, cols]
    mask_ptr,  # uint8 [tokens], or anything where not MASKED
    tokens,
    cols,
    MASKED: tl.constexpr,
    SEGMENT: tl.constexpr,
    TOKENS: tl.constexpr,
    COLS: tl.constexpr,
):
    blocks = tl.cdiv(cols, COLS)
    segment = (tl.program_id(0) // blocks).to(tl.int64)
    offs_c = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
    mask_c = offs_c < cols
    total = tl.zeros((TOKENS, COLS), tl.float32)
    for start in range(0, SEGMENT, TOKENS):
        offs_t = segment * SEGMENT + start + tl.arange(0, TOKENS)
        counted = offs_t < tokens
        if MASKED:
            counted = counted & (tl.load(mask_ptr + offs_t, mask=counted, other=0) != 0)
        x = tl.load(
            x_ptr + offs_t[:, None] * cols + offs_c[None, :],
            mask=counted[:, None] & mask_c[None, :],
            other=0.0,
        ).to(tl.float32)
        total += x * x
    tl.store(partial_ptr + segment * cols + offs_c, tl.sum(total, 0), mask=mask_c)


def accumulate_gram_(gram: Tensor, x: Tensor, mask: Tensor | None) -> None:
    """``gram [cols, cols] += sum of x_t x_t^T``, exactly symmetric."""
    tiles = triton.cdiv(x.shape[1], _tiling(x, x).tile)
    _add_moments(gram, x, x, mask, tiles * (tiles + 1) // 2, lower=True)


def accumulate_cross_gram_(cross: Tensor, x: Tensor, y: Tensor, mask: Tensor | None) -> None:
    """``cross [x_cols, y_cols] += sum of x_t y_t^T``."""
    tile = _tiling(x, y).tile
    tiles = triton.cdiv(x.shape[1], tile) * triton.cdiv(y.shape[1], tile)
    _add_moments(cross, x, y, mask, tiles, lower=False)


def accumulate_gram_diag_(diag: Tensor, x: Tensor, mask: Tensor | None) -> None:
    """``diag [cols] += sum of x_t * x_t``."""
    tokens, cols = x.shape
    if x.numel() == 0:
        return
    partial = diag.new_empty(triton.cdiv(tokens, DIAG_TOKENS), cols)
    _diagonal_kernel[(triton.cdiv(cols, DIAG_COLS) * len(partial),)](
        partial,
        x,
        x if mask is None else mask.view(torch.uint8),
        tokens,
        cols,
        MASKED=mask is not None,
        SEGMENT=DIAG_TOKENS,
        TOKENS=DIAG_STEP,
        COLS=DIAG_COLS,
        **asdict(DIAG),
    )
    diag += partial.sum(0, dtype=torch.float64)


def _tiling(x: Tensor, y: Tensor) -> Tiling:
    if x.dtype != y.dtype or x.dtype == torch.float32:
        return FLOAT32
    narrow = min(x.shape[1], y.shape[1]) < WIDE_FROM
    return NARROW if narrow or _shared_memory(x.device) < WIDE_SHARED else WIDE


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that one program may use; as much as it likes under the interpreter."""
    if device.type != "cuda":
        return WIDE_SHARED
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def _add_moments(
    out: Tensor, x: Tensor, y: Tensor, mask: Tensor | None, programs: int, *, lower: bool
) -> None:
    if programs == 0:
        return
    tiling = _tiling(x, y)
    _moment_kernel[(programs,)](
        out,
        x,
        y,
        x if mask is None else mask.view(torch.uint8),
        x.shape[0],
        x.shape[1],
        y.shape[1],
        LOWER=lower,
        MASKED=mask is not None,
        # The interpreter multiplies the words of bfloat16, not the numbers.
        WIDEN=x.dtype != y.dtype or (x.dtype == torch.bfloat16 and not x.is_cuda),
        TILE=tiling.tile,
        TOKENS=tiling.tokens,
        SEGMENT=SEGMENT_TOKENS,
        BAND=BAND_TILES,
        **asdict(tiling.launch),
    )


def kernels() -> tuple[KernelForm, ...]:
    """Forms of the kernels that launches on real layers use."""
    return tuple(
        form
        for masked in (False, True)
        for forms in (_moment_forms(masked), _diagonal_forms(masked))
        for form in forms
    )


_NAMES = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}


def _moment_forms(masked: bool) -> list[KernelForm]:
    pairs = [(name, name) for name in _NAMES] + [("bf16", "fp32")]
    forms = []
    for x, y in pairs:
        half = x == y != "fp32"
        for tiling in (WIDE, NARROW) if half else (FLOAT32,):
            for lower in (True, False) if x == y else (False,):
                name = f"{'gram' if lower else 'cross'}_{x}_{y}_{tiling.tile}"
                signature = {
                    "out_ptr": "*fp32",
                    "x_ptr": _NAMES[x],
                    "y_ptr": _NAMES[y],
                    "mask_ptr": "*u8" if masked else _NAMES[x],
                    "tokens": "i32",
                    "x_cols": "i32",
                    "y_cols": "i32",
                }
                constants = {
                    "LOWER": lower,
                    "MASKED": masked,
                    "WIDEN": x != y,
                    "TILE": tiling.tile,
                    "TOKENS": tiling.tokens,
                    "SEGMENT": SEGMENT_TOKENS,
                    "BAND": BAND_TILES,
                }
                aligned = frozenset(signature) - {"tokens"}
                forms.append(
                    KernelForm(
                        name + ("_masked" if masked else ""),
                        _moment_kernel,
                        signature,
                        constants,
                        tiling.launch,
                        aligned,
                    )
                )
    return forms


def _diagonal_forms(masked: bool) -> list[KernelForm]:
    forms = []
    for name, pointer in _NAMES.items():
        signature = {
            "partial_ptr": "*fp32",
            "x_ptr": pointer,
            "mask_ptr": "*u8" if masked else pointer,
            "tokens": "i32",
            "cols": "i32",
        }
        constants = {
            "MASKED": masked,
            "SEGMENT": DIAG_TOKENS,
            "TOKENS": DIAG_STEP,
            "COLS": DIAG_COLS,
        }
        label = f"diagonal_{name}" + ("_masked" if masked else "")
        aligned = frozenset(signature) - {"tokens"}
        forms.append(KernelForm(label, _diagonal_kernel, signature, constants, DIAG, aligned))
    return forms
