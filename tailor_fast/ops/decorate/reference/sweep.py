"""Column sweeps: the step that both sweeps share, and OBS with the correct sign.

The optimal brain surgeon on the delta, with 0 as what a dropped weight goes to (Hassibi & Stork,
1993; in the column order of SparseGPT, Frantar & Alistarh, 2023): with ``U^T U = H^-1``, ``U``
upper triangular, column ``j`` is settled by ``e_j = d_j / U_jj`` where it is dropped, and every
later column moves by ``-e_j U_j``. The objective of the result is the sum of the squared ``e``.

Work is on the transpose ``[cols, rows]``, in which a column of the weight is contiguous.
"""

import math
from typing import NamedTuple

import torch

from tailor_fast.ops.damping import damping_of
from tailor_fast.ops.decorate.ladder import climb

BLOCK = 128  # columns swept one by one before one GEMM carries them to the rest
_PANEL = 1024  # columns of the Gram that one GEMM of an energy takes


def sweep_columns(
    weight: torch.Tensor,
    target: torch.Tensor,
    revert: torch.Tensor,
    factor: torch.Tensor,
    errors: torch.Tensor,
    sign: int,
    first: int = 0,
) -> None:
    """Settle columns ``first`` to ``first + len(revert)`` of one block, one after the other.

    Args:
        weight: block of the working copy ``[block, rows]``; later columns of it are moved.
        target: what a dropped weight goes to, ``[block, rows]``.
        revert: bool ``[swept, rows]``, True where a weight is dropped.
        factor: diagonal block of U, ``[block, block]``.
        errors: receives ``e`` of the swept columns, ``[block, rows]``.
        sign: -1 for OBS, +1 for the authors' code.
        first: first column that is swept.
    """
    for column, drop in enumerate(revert, start=first):
        error = torch.where(drop, weight[column] - target[column], 0).div_(factor[column, column])
        errors[column] = error
        later = slice(column + 1, len(weight))
        weight[later].add_(factor[column, later, None] * error, alpha=sign)


class InverseRoot(NamedTuple):
    """``U`` float32 ``[cols, cols]`` with ``U^T U = (gram + damping I)^-1``."""

    upper: torch.Tensor
    damping: float


def factorize(gram: torch.Tensor, percdamp: float) -> InverseRoot:
    """Factorise the inverse of the damped Gram without forming it.

    ``H = R R^T`` with ``R`` upper triangular comes from one Cholesky factorisation of ``H`` with
    its rows and columns in reverse order, and ``U = R^-1``. Where that fails see ``climb``.

    Raises:
        ValueError: not positive definite even then.
    """
    # inputs that were never seen: H = 0, nothing costs anything
    if damping_of(gram.diagonal(), 1.0) == 0.0:
        return InverseRoot(torch.diag(gram.new_full((len(gram),), math.inf)), 0.0)
    upper, damping = climb(gram, percdamp, _inverse_factor)
    return InverseRoot(upper.float().contiguous(), damping)


def _inverse_factor(gram: torch.Tensor, damping: float, dtype: torch.dtype) -> torch.Tensor | None:
    """``U`` in ``dtype``; None where the factorisation fails. Holds two more matrices meanwhile."""
    reverse = gram.to(dtype).flip(0, 1)
    reverse.diagonal().add_(damping)
    lower, failed_at = torch.linalg.cholesky_ex(reverse)
    del reverse
    if int(failed_at) != 0:
        return None
    inverse = torch.eye(len(gram), dtype=dtype, device=gram.device)
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower
    return inverse.flip(0, 1)


def sweep_rows(
    factor: InverseRoot, delta: torch.Tensor, keep: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sweep a tile of rows on a fixed mask.

    Args:
        factor: of the damped Gram.
        delta: float32 ``[rows, cols]``.
        keep: bool ``[rows, cols]``.

    Returns:
        Patch ``[rows, cols]``, and the objective at it (0-d float64).
    """
    weight = delta.new_empty(delta.shape[::-1]).copy_(delta.T)
    revert = keep.logical_not().T.contiguous()
    zero = weight.new_zeros(1, 1).expand(BLOCK, len(delta))
    loss = weight.new_zeros((), dtype=torch.float64)
    for start in range(0, len(weight), BLOCK):
        block = slice(start, start + BLOCK)
        errors = torch.empty_like(weight[block])
        upper = factor.upper[block]
        sweep_columns(weight[block], zero, revert[block], upper[:, block], errors, sign=-1)
        weight[start + BLOCK :].addmm_(upper[:, start + BLOCK :].T, errors, alpha=-1)
        loss += errors.square_().sum(dtype=torch.float64)
    return weight.masked_fill_(revert, 0).T, loss


def energy(error: torch.Tensor, gram: torch.Tensor, damping: float) -> torch.Tensor:
    """``tr(E (gram + damping I) E^T)`` of ``E [rows, cols]``, 0-d float64.

    The Gram is symmetric, so each panel multiplies what lies left of it once and counts it twice.
    """
    total = error.square().sum(dtype=torch.float64) * damping
    for start in range(0, error.shape[1], _PANEL):
        columns = slice(start, start + _PANEL)
        panel = error[:, columns]
        answer = (error[:, :start] @ gram[:start, columns]).mul_(2)
        answer.addmm_(panel, gram[columns, columns])
        total += answer.mul_(panel).sum(dtype=torch.float64)
    return total
