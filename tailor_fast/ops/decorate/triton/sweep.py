"""The column sweeps: one kernel within a block of columns, GEMMs from block to block.

A program keeps its rows' share of the block in registers and settles one column after the other:
``e_j = (w_j - t_j) / U_jj`` where w_j is dropped, and ``w_k += sign e_j U_jk`` for every later k.
The errors need no registers of their own: a column that is settled does not move any more.

GEMMs are in float32, as precise as ``torch.backends.cuda.matmul`` says when they run.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tailor_fast._core.launch import KernelForm, Launch
from tailor_fast.ops.damping import damping_of
from tailor_fast.ops.decorate.ladder import climb
from tailor_fast.ops.decorate.triton.system import System

Tensor = torch.Tensor

BLOCK = 128  # columns that are settled one by one
PANEL = 512  # columns of ``obs`` that one GEMM over all before them serves; a multiple of BLOCK
# One warp for four rows: the sums of a step stay within it, without shared memory or barriers, and
# 4096 rows make 1024 programs, all on the card at once.
SWEEP = Launch(num_warps=1)
SWEEP_ROWS = 4


@triton.jit
def _settle(
    tile, target, drop, factor_ptr, factor_stride, width, first, last,
    SIGN: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Columns ``first`` to ``last`` of a tile [rows, COLS], and its errors."""
    cols = tl.arange(0, COLS)[None, :]
    for column in range(first, last):
        row_ptr = factor_ptr + tl.cast(column, tl.int64) * factor_stride
        later = tl.load(row_ptr + cols, mask=(cols > column) & (cols < width), other=0.0)
        apart = tl.where(drop & (cols == column), tile - target, 0.0)
        error = tl.div_rn(tl.sum(apart, 1), tl.load(row_ptr + column))
        tile += SIGN * error[:, None] * later
    pivot = tl.load(
        factor_ptr + cols.to(tl.int64) * (factor_stride + 1), mask=cols < width, other=1.0
    )
    pivot = tl.broadcast_to(pivot, tile.shape)
    return tile, tl.div_rn(tl.where(drop, tile - target, 0.0), pivot)


@triton.jit
def _block_kernel(
    weight_ptr,  # float32 [rows, width], moved in place
    target_ptr,  # float32 [rows, width]
    keep_ptr,  # uint8 [rows, width]
    factor_ptr,  # float32 [width, width], upper triangular
    errors_ptr,  # float32 [rows, width], of the columns that are settled
    weight_stride,
    target_stride,
    keep_stride,
    factor_stride,
    errors_stride,
    rows,
    width,
    first,
    last,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    inside = (row < rows) & (cols < width)
    row = row.to(tl.int64)
    weight = weight_ptr + row * weight_stride + cols
    tile = tl.load(weight, mask=inside, other=0.0)
    target = tl.load(target_ptr + row * target_stride + cols, mask=inside, other=0.0)
    drop = tl.load(keep_ptr + row * keep_stride + cols, mask=inside, other=1) == 0
    tile, errors = _settle(
        tile, target, drop, factor_ptr, factor_stride, width, first, last, SIGN=1.0, COLS=COLS
    )
    tl.store(weight, tile, mask=inside & (cols >= first))
    settled = inside & (cols >= first) & (cols < last)
    tl.store(errors_ptr + row * errors_stride + cols, errors, mask=settled)


@triton.jit
def _obs_kernel(
    weight_ptr,  # float32 [rows, width]: the delta as the blocks before have left it
    delta_ptr,  # float32 [rows, cols], from the block's first column on, as the next three
    keep_ptr,  # uint8
    patch_ptr,  # float32, receives what is kept
    rest_ptr,  # float32, receives delta - patch
    factor_ptr,  # float32 [width, width], upper triangular
    loss_ptr,  # float32 [rows]
    factor_stride,
    cols,
    rows,
    width,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLS)[None, :]
    inside = (row[:, None] < rows) & (column < width)
    wide = row[:, None].to(tl.int64)
    tile = tl.load(weight_ptr + wide * width + column, mask=inside, other=0.0)
    at = wide * cols + column
    drop = tl.load(keep_ptr + at, mask=inside, other=1) == 0
    tile, errors = _settle(
        tile, 0.0, drop, factor_ptr, factor_stride, width, 0, width, SIGN=-1.0, COLS=COLS
    )
    patch = tl.where(drop, 0.0, tile)
    tl.store(patch_ptr + at, patch, mask=inside)
    tl.store(rest_ptr + at, tl.load(delta_ptr + at, mask=inside, other=0.0) - patch, mask=inside)
    tl.store(loss_ptr + row, tl.sum(errors * errors, 1), mask=row < rows)


def sweep_block(
    weight: Tensor, target: Tensor, keep: Tensor, factor: Tensor, errors: Tensor,
    first: int = 0, last: int | None = None,
) -> None:  # fmt: skip
    """Settle columns ``first`` to ``last`` of a block with the authors' sign, and move the rest.

    Args:
        weight: float32 ``[rows, width]``, any row stride; moved in place.
        target: what a dropped weight goes to, float32 ``[rows, width]``.
        keep: bool ``[rows, width]``, False where a weight is dropped.
        factor: diagonal block of U, ``[width, width]``.
        errors: receives the errors of the columns that are settled, float32 ``[rows, width]``.
        first: first column that is settled.
        last: column after the last one; None is the width.
    """
    rows, width = weight.shape
    words, last = keep.view(torch.uint8), width if last is None else last
    if rows == 0:
        return
    for start in range(first - first % BLOCK, last, BLOCK):
        part = slice(start, min(start + BLOCK, width))
        begin, end = max(first, start), min(last, part.stop)
        _block_kernel[(triton.cdiv(rows, SWEEP_ROWS),)](
            weight[:, part],
            target[:, part],
            words[:, part],
            factor[part, part],
            errors[:, part],
            weight.stride(0),
            target.stride(0),
            words.stride(0),
            factor.stride(0),
            errors.stride(0),
            rows,
            part.stop - start,
            begin - start,
            end - start,
            ROWS=SWEEP_ROWS,
            COLS=BLOCK,
            **asdict(SWEEP),
        )
        settled = slice(begin, end)
        weight[:, part.stop :].addmm_(errors[:, settled], factor[settled, part.stop :])


class Root(NamedTuple):
    """``H = gram + damping I = R R^T``.

    The optimal brain surgeon needs ``U = R^-1`` within its blocks alone: what the columns before a
    block add to it is ``(D - P)_before R_before,block U_block,block``. The inverse is not formed.

    Attributes:
        upper: R, float32 ``[cols, cols]``, upper triangular; None where H is 0.
        inverses: diagonal blocks of U, float32 ``[blocks, BLOCK, BLOCK]``.
        damping: λ.
    """

    upper: Tensor | None
    inverses: Tensor
    damping: float


def factorize(gram: Tensor, percdamp: float) -> Root:
    """R by one Cholesky factorisation with rows and columns in reverse order.

    Raises:
        ValueError: not positive definite with any damping that is tried.
    """
    # inputs that were never seen: nothing costs anything
    if damping_of(gram.diagonal(), 1.0) == 0.0:
        return Root(None, gram[:0], 0.0)
    root, damping = climb(gram, percdamp, _root)
    # Identity past the last column, so that all blocks are of one size: one batched call. In
    # float64, whose time does not show: what it rounds stays in every weight of the block.
    identity = torch.eye(BLOCK, dtype=torch.float64, device=gram.device)
    parts = identity.repeat(triton.cdiv(len(gram), BLOCK), 1, 1)
    for number, columns in enumerate(_blocks(len(gram))):
        width = columns.stop - columns.start
        parts[number, :width, :width] = root[columns, columns]
    inverses = torch.linalg.solve_triangular(parts, identity.expand_as(parts), upper=True)
    return Root(root.float().contiguous(), inverses.float().contiguous(), damping)


def _blocks(cols: int) -> Iterator[slice]:
    for start in range(0, cols, BLOCK):
        yield slice(start, min(start + BLOCK, cols))


def _root(gram: Tensor, damping: float, dtype: torch.dtype) -> Tensor | None:
    """R in ``dtype``; None where the factorisation fails. Holds two more matrices meanwhile."""
    reverse = gram.to(dtype).flip(0, 1)
    reverse.diagonal().add_(damping)
    lower, failed_at = torch.linalg.cholesky_ex(reverse)
    del reverse
    return lower.flip(0, 1) if int(failed_at) == 0 else None


def sweep_rows(root: Root, system: System, delta: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Sweep a tile of rows on a fixed mask.

    Args:
        root: of the damped Gram.
        system: the same Gram with the same damping.
        delta: float32 ``[rows, cols]``.
        keep: bool ``[rows, cols]``.

    Returns:
        Patch ``[rows, cols]``, and float64 ``[3]``: the objective at it, at the bare mask, at 0.
    """
    rows, cols = delta.shape
    if root.upper is None or rows == 0:
        return delta.masked_fill(~keep, 0), torch.zeros(3, dtype=torch.float64, device=delta.device)
    # `rest` is delta - patch, what the patched layer lacks.
    patch, rest = torch.empty_like(delta), torch.empty_like(delta)
    losses = delta.new_empty(len(root.inverses), rows)
    words = keep.view(torch.uint8)
    for number, columns in enumerate(_blocks(cols)):
        start, stop = columns.start, columns.stop
        first = start // PANEL * PANEL
        if start == first:
            panel = rest[:, :start] @ root.upper[:start, start : start + PANEL]
        carried = panel[:, start - first : stop - first]
        carried.addmm_(rest[:, first:start], root.upper[first:start, columns])
        inverse = root.inverses[number, : stop - start, : stop - start]
        weight = torch.addmm(delta[:, columns], carried, inverse)
        _obs_kernel[(triton.cdiv(rows, SWEEP_ROWS),)](
            weight,
            delta[:, columns],
            words[:, columns],
            patch[:, columns],
            rest[:, columns],
            inverse,
            losses[number],
            inverse.stride(0),
            cols,
            rows,
            stop - start,
            ROWS=SWEEP_ROWS,
            COLS=BLOCK,
            **asdict(SWEEP),
        )
    # Rounding does not average out of the errors of a small problem.
    loss = system.energy(rest) if system.small(rows) else losses.sum(dtype=torch.float64)
    bare = system.energy(delta.masked_fill(keep, 0))
    return patch, torch.stack([loss, bare, system.energy(delta)])


def forms() -> list[KernelForm]:
    """The kernels as they are launched, on whole blocks."""
    pointers = {"weight_ptr": "*fp32", "keep_ptr": "*u8", "factor_ptr": "*fp32"}
    constants = {"ROWS": SWEEP_ROWS, "COLS": BLOCK}
    block = pointers | {"target_ptr": "*fp32", "errors_ptr": "*fp32"}
    strides = ("weight", "target", "keep", "factor", "errors")
    block |= {f"{name}_stride": "i32" for name in strides}
    block |= dict.fromkeys(("rows", "width", "first", "last"), "i32")
    obs = pointers | dict.fromkeys(("delta_ptr", "patch_ptr", "rest_ptr", "loss_ptr"), "*fp32")
    obs |= dict.fromkeys(("factor_stride", "cols", "rows", "width"), "i32")
    return [
        KernelForm("block", _block_kernel, block, constants, SWEEP, frozenset(block)),
        KernelForm("obs", _obs_kernel, obs, constants, SWEEP, frozenset(obs)),
    ]
