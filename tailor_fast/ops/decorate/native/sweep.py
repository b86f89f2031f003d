"""The two column sweeps: C++ within a block of columns, one GEMM from block to block."""

from typing import NamedTuple

import torch

from tailor_fast import _C
from tailor_fast.ops.decorate.ladder import climb
from tailor_fast.ops.decorate.native.exact import FLOAT32_FROM, energy
from tailor_fast.ops.decorate.values import damping_of

Tensor = torch.Tensor

BLOCK = 128  # columns of ``obs`` that are swept one by one before one GEMM takes them up
_PANEL = 512  # columns of ``obs`` that one GEMM over all before them serves; a multiple of BLOCK
_PAD = 16  # floats of the widest vector


class Block(NamedTuple):
    """The diagonal block of U, as the C++ sweep reads it.

    Attributes:
        factor: strictly upper triangle times the sign of the sweep, rows padded with zeros.
        diagonal: float32 ``[width]``.
    """

    factor: Tensor
    diagonal: Tensor

    @classmethod
    def build(cls, upper: Tensor, sign: int) -> "Block":
        """From the block itself, ``[width, width]``."""
        width = len(upper)
        factor = upper.new_zeros(width, -(-width // _PAD) * _PAD)
        factor[:, :width] = upper.triu(1) * sign
        return cls(factor, upper.diagonal().contiguous())


def sweep_columns(
    weight: Tensor,
    target: Tensor | None,
    keep: Tensor,
    block: Block,
    errors: Tensor,
    first: int = 0,
    last: int | None = None,
) -> None:
    """Settle columns ``first`` to ``last`` of a block, one after the other.

    Args:
        weight: float32 ``[rows, width]``, any row stride; moved in place.
        target: what a dropped weight goes to, float32 ``[rows, width]``; None is 0.
        keep: bool ``[rows, width]``, False where a weight is dropped.
        block: of U.
        errors: receives the errors of the columns that are settled, float32 ``[rows, width]``.
        first: first column that is settled.
        last: column after the last one; None is the width.
    """
    rows, width = weight.shape
    _C.decorate_sweep(
        weight.data_ptr(),
        weight.stride(0),
        keep.data_ptr(),
        keep.stride(0),
        0 if target is None else target.data_ptr(),
        0 if target is None else target.stride(0),
        block.factor.data_ptr(),
        block.diagonal.data_ptr(),
        errors.data_ptr(),
        errors.stride(0),
        rows,
        width,
        first,
        width if last is None else last,
        torch.get_num_threads(),
    )


class Root(NamedTuple):
    """``H = gram + damping I = R R^T``.

    The optimal brain surgeon needs ``U = R^-1`` within its blocks alone: what the columns before a
    block add to it is ``(D - P)_before R_before,block U_block,block``. The inverse is not formed.

    Attributes:
        upper: R, float32 ``[cols, cols]``, upper triangular; None where H is 0.
        inverses: diagonal blocks of U.
        blocks: the same as the sweep reads them.
        damping: λ.
    """

    upper: Tensor | None
    inverses: list[Tensor]
    blocks: list[Block]
    damping: float


def factorize(gram: Tensor, percdamp: float) -> Root:
    """R by one Cholesky factorisation with rows and columns in reverse order.

    Raises:
        ValueError: not positive definite with any damping that is tried.
    """
    if damping_of(gram, 1.0) == 0.0:  # inputs that were never seen: nothing costs anything
        return Root(None, [], [], 0.0)
    root, damping = climb(gram, percdamp, _root)
    # Identity past the last column, so that all blocks are of one size: one batched call. In
    # float64, whose time does not show: what it rounds stays in every weight of the block.
    count = -(-len(gram) // BLOCK)
    parts = torch.eye(BLOCK, dtype=torch.float64).repeat(count, 1, 1)
    identity = parts.clone()
    widths = [min(BLOCK, len(gram) - number * BLOCK) for number in range(count)]
    for number, width in enumerate(widths):
        part = slice(number * BLOCK, number * BLOCK + width)
        parts[number, :width, :width] = root[part, part]
    whole = torch.linalg.solve_triangular(parts, identity, upper=True).float()
    inverses = [inverse[:width, :width] for inverse, width in zip(whole, widths, strict=True)]
    blocks = [Block.build(inverse, sign=-1) for inverse in inverses]
    return Root(root.float(), inverses, blocks, damping)


def _root(gram: Tensor, damping: float, dtype: torch.dtype) -> Tensor | None:
    """R in ``dtype``; None where the factorisation fails. Holds two more matrices meanwhile."""
    reverse = gram.to(dtype).flip(0, 1)
    reverse.diagonal().add_(damping)
    lower, failed_at = torch.linalg.cholesky_ex(reverse)
    del reverse
    return lower.flip(0, 1) if int(failed_at) == 0 else None


def sweep_rows(root: Root, gram: Tensor, delta: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Sweep a tile of rows on a fixed mask.

    Args:
        root: of the damped Gram.
        gram: the Gram itself.
        delta: float32 ``[rows, cols]``.
        keep: bool ``[rows, cols]``.

    Returns:
        Patch ``[rows, cols]``, and float64 ``[3]``: the objective at it, at the bare mask, at 0.
    """
    patch = delta.masked_fill(~keep, 0)
    if root.upper is None:
        return patch, torch.zeros(3, dtype=torch.float64)
    # `rest` is delta - patch, what the patched layer lacks.
    bare, rest = patch.clone(), torch.empty_like(delta)
    loss = torch.zeros((), dtype=torch.float64)
    for number, (inverse, block) in enumerate(zip(root.inverses, root.blocks, strict=True)):
        start, first = number * BLOCK, number * BLOCK // _PANEL * _PANEL
        columns = slice(start, start + BLOCK)
        if start == first:
            panel = rest[:, :start] @ root.upper[:start, start : start + _PANEL]
        carried = panel[:, start - first : start - first + BLOCK]
        carried.addmm_(rest[:, first:start], root.upper[first:start, columns])
        weight = torch.addmm(delta[:, columns], carried, inverse)
        errors = torch.empty_like(weight)
        sweep_columns(weight, None, keep[:, columns], block, errors)
        patch[:, columns] = weight.masked_fill_(~keep[:, columns], 0)
        torch.sub(delta[:, columns], weight, out=rest[:, columns])
        loss += errors.square_().sum(dtype=torch.float64)
    if delta.numel() * delta.shape[1] < FLOAT32_FROM:  # where rounding would not average out
        loss = energy(rest, gram, root.damping)
    to_zero = _rise(rest, patch, keep, gram, root.damping)
    to_bare = _rise(rest, patch - bare, keep, gram, root.damping)
    return patch, torch.stack([loss, loss + to_bare, loss + to_zero])


def _rise(error: Tensor, step: Tensor, keep: Tensor, gram: Tensor, damping: float) -> Tensor:
    """By how much the objective of ``error`` rises when ``step``, 0 outside the mask, is added."""
    rows, cols = error.shape
    rise = torch.empty(rows, dtype=torch.float64)
    _C.decorate_rise(
        error.data_ptr(),
        step.data_ptr(),
        keep.data_ptr(),
        gram.data_ptr(),
        rows,
        cols,
        damping,
        rows * cols * cols < FLOAT32_FROM,
        rise.data_ptr(),
        torch.get_num_threads(),
    )
    return rise.sum()
