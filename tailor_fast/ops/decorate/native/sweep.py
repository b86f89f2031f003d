"""The column sweeps: C++ within a block of columns, GEMMs from block to block."""

from typing import NamedTuple

import torch

from tailor_fast import _C
from tailor_fast.ops.damping import damping_of
from tailor_fast.ops.decorate.ladder import climb
from tailor_fast.ops.decorate.native.exact import FLOAT32_FROM, energy
from tailor_fast.ops.decorate.native.root import Carry, Root
from tailor_fast.ops.gemm import add_product_
from tailor_fast.ops.roots import BLOCK, factorize_

Tensor = torch.Tensor

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


def factorize(gram: Tensor, percdamp: float) -> Root:
    """R of the damped Gram; where that fails see ``climb``.

    Raises:
        ValueError: not positive definite with any damping that is tried.
    """
    # inputs that were never seen: nothing costs anything
    if damping_of(gram.diagonal(), 1.0) == 0.0:
        return Root(None, [], 0.0)
    (upper, inverses), damping = climb(gram, percdamp, _root)
    return Root(upper, inverses, damping)


def _root(gram: Tensor, damping: float, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]] | None:
    """R and the inverses of its blocks by arithmetic in ``dtype``; None where it fails."""
    upper = gram.to(dtype, copy=True)
    upper.diagonal().add_(damping)
    inverses = factorize_(upper)
    if inverses is None:
        return None
    return upper.float(), [inverse.float() for inverse in inverses]


def sweep_rows(
    root: Root, gram: Tensor, delta: Tensor, keep: Tensor, scratch: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Sweep a tile of rows on a fixed mask.

    Args:
        root: of the damped Gram.
        gram: the Gram itself.
        delta: float32 ``[rows, cols]``.
        keep: bool ``[rows, cols]``.
        scratch: two float32 matrices of as many columns and at least as many rows.

    Returns:
        Patch ``[rows, cols]``, and float64 ``[3]``: the objective at it, at the bare mask, at 0.
    """
    if root.upper is None:
        return delta.masked_fill(~keep, 0), torch.zeros(3, dtype=torch.float64)
    patch = torch.empty_like(delta)
    rest, errors = (part[: len(delta)] for part in scratch)
    carry = Carry(rest, root.upper, BLOCK)
    for number, inverse in enumerate(root.inverses):
        start = number * BLOCK
        stop = start + len(inverse)
        weight = delta[:, start:stop].clone(memory_format=torch.contiguous_format)
        add_product_(weight, carry.to(start, stop), inverse)
        block = Block.build(inverse, sign=-1)
        _sweep_delta(weight, delta, keep, block, errors, patch, rest, start)
    if delta.numel() * delta.shape[1] < FLOAT32_FROM:  # where rounding would not average out
        bare = delta.masked_fill(keep, 0)
        losses = [energy(error, gram, root.damping) for error in (rest, bare, delta)]
        return patch, torch.stack(losses)
    return patch, _objectives(errors, delta, patch, keep, root.upper)


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
) -> Tensor:
    """Float64 ``[3]``: the objective at the patch, at the bare mask, at 0, all from the errors."""
    rows, cols = delta.shape
    found = _C.decorate_objectives(
        errors.data_ptr(),
        delta.data_ptr(),
        patch.data_ptr(),
        keep.data_ptr(),
        upper.data_ptr(),
        rows,
        cols,
        torch.get_num_threads(),
    )
    return torch.tensor(found, dtype=torch.float64)
