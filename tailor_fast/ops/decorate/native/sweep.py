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
        upper: R, float32 ``[cols, cols]``, upper triangular, contiguous; None where H is 0.
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
    # Factors have contiguous columns, so that the transpose of the upper one has contiguous rows.
    factor, failed_at = torch.linalg.cholesky_ex(reverse, upper=True)
    del reverse
    return factor.T.flip(0, 1) if int(failed_at) == 0 else None


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
    if root.upper is None:
        return delta.masked_fill(~keep, 0), torch.zeros(3, dtype=torch.float64)
    patch, rest, errors = (torch.empty_like(delta) for _ in range(3))
    for number, (inverse, block) in enumerate(zip(root.inverses, root.blocks, strict=True)):
        start, first = number * BLOCK, number * BLOCK // _PANEL * _PANEL
        stop = start + len(inverse)
        if start == first:
            panel = rest[:, :start] @ root.upper[:start, start : start + _PANEL]
        carried = panel[:, start - first : stop - first]
        carried.addmm_(rest[:, first:start], root.upper[first:start, start:stop])
        weight = torch.addmm(delta[:, start:stop], carried, inverse)
        _sweep_delta(weight, delta, keep, block, errors, patch, rest, start)
    if delta.numel() * delta.shape[1] < FLOAT32_FROM:  # where rounding would not average out
        bare = delta.masked_fill(keep, 0)
        losses = [energy(error, gram, root.damping) for error in (rest, bare, delta)]
        return patch, torch.stack(losses)
    loss = errors.square().sum(dtype=torch.float64)
    return patch, torch.stack([loss, *_objectives(errors, delta, patch, keep, root.upper)])


def _sweep_delta(
    weight: Tensor,
    delta: Tensor,
    keep: Tensor,
    block: Block,
    errors: Tensor,
    patch: Tensor,
    rest: Tensor,
    start: int,
) -> None:
    """Settle a block from column ``start`` on; ``rest`` is what its patch leaves of the delta."""
    rows, width = weight.shape
    _C.decorate_sweep_delta(
        weight.data_ptr(),
        delta[:, start:].data_ptr(),
        keep[:, start:].data_ptr(),
        block.factor.data_ptr(),
        block.diagonal.data_ptr(),
        errors[:, start:].data_ptr(),
        patch[:, start:].data_ptr(),
        rest[:, start:].data_ptr(),
        rows,
        width,
        delta.shape[1],
        torch.get_num_threads(),
    )


def _objectives(
    errors: Tensor, delta: Tensor, patch: Tensor, keep: Tensor, upper: Tensor
) -> tuple[Tensor, Tensor]:
    """The objective of the bare mask and of the base layer, from the errors of the sweep."""
    rows, cols = delta.shape
    bare, reverted = _C.decorate_objectives(
        errors.data_ptr(),
        delta.data_ptr(),
        patch.data_ptr(),
        keep.data_ptr(),
        upper.data_ptr(),
        rows,
        cols,
        torch.get_num_threads(),
    )
    return torch.tensor(bare, dtype=torch.float64), torch.tensor(reverted, dtype=torch.float64)
