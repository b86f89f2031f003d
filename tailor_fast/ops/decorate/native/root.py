"""The triangular root of the damped Gram, by blocks, and the products of a sweep with it.

The optimal brain surgeon needs ``U = R^-1`` within its blocks alone, where ``H = R R^T``. What the
columns before a block add to it is a product with the part of R above the block, so U is not
formed: a third of the work of a factorisation is the whole of it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from tailor_fast.ops.decorate.factors import unpack
from tailor_fast.ops.gemm import add_product_, product

Tensor = torch.Tensor

BLOCK = 128  # columns that are factorised at a time; those of ``obs`` that are swept one by one
PANEL = 512  # columns that one GEMM over all others serves; a multiple of BLOCK


class Root(NamedTuple):
    """``H = gram + damping I = R R^T``.

    Attributes:
        upper: R, float32 ``[cols, cols]``, upper triangular; what stands below its diagonal blocks
            of BLOCK columns has no meaning. None where H is 0.
        inverses: diagonal blocks of ``U = R^-1``, BLOCK columns each.
        damping: λ.
    """

    upper: Tensor | None
    inverses: list[Tensor]
    damping: float

    @classmethod
    def of(cls, factor: Sequence[Tensor]) -> "Root":
        """From the tensors of a factor that was packed."""
        upper, blocks, damping = unpack(factor)
        cols = 0 if upper is None else len(upper)
        widths = (min(BLOCK, cols - start) for start in range(0, cols, BLOCK))
        parts = zip(blocks, widths, strict=True)
        return cls(upper, [block[:width, :width].contiguous() for block, width in parts], damping)


def factorize_(matrix: Tensor) -> list[Tensor] | None:
    """Turn H into R in place, from the last block to the first.

    Args:
        matrix: symmetric, float32 or float64 ``[cols, cols]``, contiguous.

    Returns:
        Diagonal blocks of ``R^-1``, in their order; None where H is not positive definite.
    """
    inverses, cols = [], len(matrix)
    for first in reversed(range(0, cols, PANEL)):
        last = min(first + PANEL, cols)
        _subtract(matrix, first, last, cols)
        for start in reversed(range(first, last, BLOCK)):
            stop = min(start + BLOCK, last)
            _subtract(matrix, start, stop, last)
            block = matrix[start:stop, start:stop]
            root = _small_root(block)
            if root is None:
                return None
            block.copy_(root)
            inverses.append(invert(root).to(matrix.dtype))
            above = matrix[:start, start:stop]
            above.copy_(product(above, inverses[-1].T))
    return inverses[::-1]


def _subtract(matrix: Tensor, start: int, stop: int, end: int) -> None:
    """Take from the columns ``start`` to ``stop`` what columns ``stop`` to ``end`` of R explain."""
    if stop < end:
        before = matrix[start:stop, stop:end].T
        add_product_(matrix[:stop, start:stop], matrix[:stop, stop:end], before, scale=-1.0)


def _small_root(block: Tensor) -> Tensor | None:
    """R of one block, which is no part of the result; None where it has none."""
    lower, failed_at = torch.linalg.cholesky_ex(block.flip(0, 1))
    return lower.flip(0, 1) if int(failed_at) == 0 else None


def invert(upper: Tensor) -> Tensor:
    """The inverse of an upper triangular block, in float64: what it rounds stays in all columns."""
    wide = upper.double()
    identity = torch.eye(len(wide), dtype=torch.float64)
    inverse: Tensor = torch.linalg.solve_triangular(wide, identity, upper=True)
    return inverse


class Carry:
    """``x_before R_before,block`` for block after block of a sweep from the left."""

    def __init__(self, x: Tensor, upper: Tensor, block: int) -> None:
        """``x [rows, cols]`` is filled as the sweep goes on, ``block`` columns at a time."""
        self._x, self._upper = x, upper
        self._width = max(block, PANEL // block * block)
        self._panel = x.new_empty(0)

    def to(self, start: int, stop: int) -> Tensor:
        """The product for columns ``start`` to ``stop``, ``[rows, stop - start]``."""
        first = start // self._width * self._width
        if start == first:
            columns = slice(start, start + self._width)
            self._panel = product(self._x[:, :start], self._upper[:start, columns])
        carried = self._panel[:, start - first : stop - first]
        return add_product_(carried, self._x[:, first:start], self._upper[first:start, start:stop])
