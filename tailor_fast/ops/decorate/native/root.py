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
from tailor_fast.ops.roots import BLOCK, PANEL

Tensor = torch.Tensor


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
