"""Triangular roots of symmetric matrices on the CPU, by blocks: their work is in ``ops/gemm.py``.

LAPACK under torch factorises 2048 columns in float32 at 41 GFLOP/s on one Zen 5 core, and solves
with them at 52; the kernels of the extension multiply at 210 (``benchmarks/cpu_gram.py``).
"""

from collections.abc import Sequence

import torch

from tailor_fast.ops.gemm import add_product_, product

Tensor = torch.Tensor

BLOCK = 128  # columns that are factorised at a time
PANEL = 512  # columns that one GEMM over all others serves; a multiple of BLOCK


def factorize_(matrix: Tensor, *, forward: bool = False) -> list[Tensor] | None:
    """Turn H into R with ``H = R R^T`` in place, from the last block to the first.

    R is upper triangular; what stands on the other side of its diagonal blocks has no meaning.

    Args:
        matrix: symmetric, float32 or float64 ``[cols, cols]``, contiguous.
        forward: from the first block to the last: R is the lower triangular Cholesky factor.

    Returns:
        Diagonal blocks of ``R^-1``, in their order; None where H is not positive definite.
    """
    inverses, cols, step = [], len(matrix), 1 if forward else -1
    for first in range(0, cols, PANEL)[::step]:
        last = min(first + PANEL, cols)
        _subtract(matrix, first, last, slice(0, first) if forward else slice(last, cols))
        for start in range(first, last, BLOCK)[::step]:
            stop = min(start + BLOCK, last)
            _subtract(matrix, start, stop, slice(first, start) if forward else slice(stop, last))
            block = matrix[start:stop, start:stop]
            root = _small_root(block, forward)
            if root is None:
                return None
            block.copy_(root)
            inverses.append(_inverse(root, upper=not forward).to(matrix.dtype))
            beyond = matrix[slice(stop, cols) if forward else slice(start), start:stop]
            beyond.copy_(product(beyond, inverses[-1].T))
    return inverses if forward else inverses[::-1]


def _subtract(matrix: Tensor, start: int, stop: int, done: slice) -> None:
    """Take from the columns ``start`` to ``stop`` what the columns ``done`` of R explain."""
    if done.start < done.stop:
        rows = slice(stop) if done.start >= stop else slice(start, None)
        part = matrix[start:stop, done].T
        add_product_(matrix[rows, start:stop], matrix[rows, done], part, scale=-1.0)


def _small_root(block: Tensor, forward: bool) -> Tensor | None:
    """R of one block, which is no part of the result; None where it has none."""
    lower, failed_at = torch.linalg.cholesky_ex(block if forward else block.flip(0, 1))
    if int(failed_at):
        return None
    root: Tensor = lower if forward else lower.flip(0, 1)
    return root


def invert(upper: Tensor) -> Tensor:
    """The inverse of an upper triangular block, in float64: what it rounds stays in all columns."""
    return _inverse(upper, upper=True)


def _inverse(root: Tensor, *, upper: bool) -> Tensor:
    wide = root.double()
    identity = torch.eye(len(wide), dtype=torch.float64)
    inverse: Tensor = torch.linalg.solve_triangular(wide, identity, upper=upper)
    return inverse


def inverse_diagonal_(lower: Tensor, inverses: Sequence[Tensor], first: int = 0) -> Tensor:
    """Diagonal of ``(L L^T)^-1`` from column ``first`` on, ``[cols - first]``.

    Args:
        lower: L, as ``factorize_`` makes it forward; overwritten with ``L^-1`` from row and column
            ``first`` on, and nothing before them is read.
        inverses: diagonal blocks of ``L^-1``, from the same call.
        first: the column to begin with.
    """
    cols = len(lower)
    diagonal = lower.new_zeros(cols - first)
    for number, inverse in enumerate(inverses):
        start, stop = max(first, number * BLOCK), min((number + 1) * BLOCK, cols)
        if start >= stop:
            continue
        skipped = start - number * BLOCK  # the end of a lower triangle's inverse is its own
        own = inverse[skipped:, skipped:]
        for left in range(first, start, PANEL):
            right = min(left + PANEL, start)
            part = product(lower[start:stop, left:start], lower[left:start, left:right])
            lower[start:stop, left:right] = product(own, part.neg_())
            diagonal[left - first : right - first] += lower[start:stop, left:right].square().sum(0)
        lower[start:stop, start:stop] = own
        lower[start:stop, stop : stop + PANEL] = 0.0  # where products read it
        diagonal[start - first : stop - first] += own.square().sum(0)
    return diagonal
