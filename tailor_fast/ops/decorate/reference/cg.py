"""Masked, Jacobi-preconditioned conjugate gradients on many rows at once.

Row ``i`` solves ``A_KK p = r_K`` on its own support ``K = keep[i]`` with one shared ``A``. All rows
advance together: one GEMM with ``A`` and a few elementwise passes per iteration. A row that is done
stands still, and is dropped from the tile once a quarter of the tile's rows have ended.

The other way, to gather ``A_KK`` for each row and factorise the batch, took 0.8 of the time at
1024 x 1024 and 0.7 at 4096 columns (density 0.1, one CPU thread, float64), and the square of |K| in
memory for each row. That is too little for a second path here; a kernel that gathers is another
matter.
"""

from typing import NamedTuple

import torch

_PANEL = 512  # columns of the Gram that are converted to another dtype at a time
_COMPACT_BELOW = 0.75  # share of unfinished rows; a copy of the tile costs 1/20 of an iteration


class System(NamedTuple):
    """``A = gram + damping * I``.

    Attributes:
        gram: symmetric, float32 ``[cols, cols]``.
        damping: λ.
        inverse_diagonal: of ``A``, float64 ``[cols]``; 0 where the diagonal is 0, which leaves the
            weights of a dead column where they are.
    """

    gram: torch.Tensor
    damping: float
    inverse_diagonal: torch.Tensor

    @classmethod
    def build(cls, gram: torch.Tensor, damping: float) -> "System":
        """Form the system of ``gram`` damped by λ."""
        diagonal = gram.diagonal().double() + damping
        return cls(gram, damping, torch.where(diagonal > 0, 1 / diagonal, 0))


def multiply(system: System, x: torch.Tensor) -> torch.Tensor:
    """``x A`` in the dtype of ``x [rows, cols]``."""
    gram = system.gram
    if x.dtype == gram.dtype:
        return (x @ gram).add_(x, alpha=system.damping)
    out = x * system.damping
    for start in range(0, gram.shape[1], _PANEL):
        columns = slice(start, start + _PANEL)
        out[:, columns] += x @ gram[:, columns].to(x.dtype)
    return out


def conjugate_gradients(
    system: System,
    residual: torch.Tensor,
    keep: torch.Tensor,
    target: torch.Tensor,
    max_iterations: int,
) -> tuple[torch.Tensor, int]:
    """Solve ``A_KK step = residual`` for every row, from 0.

    A row ends when its squared residual is at most its target, or where rounding has made the
    curvature along its direction zero or negative.

    Args:
        system: the shared matrix.
        residual: float32 or float64 ``[rows, cols]``, the dtype of the arithmetic; 0 outside
            ``keep``. Overwritten.
        keep: bool ``[rows, cols]``, the supports.
        target: squared norm of the residual at which a row ends, ``[rows]``, dtype of ``residual``.
        max_iterations: limit.

    Returns:
        Step ``[rows, cols]``, 0 outside ``keep``, and the number of iterations of the slowest row.
    """
    inverse = system.inverse_diagonal.to(residual.dtype)
    result = torch.zeros_like(residual)
    live = torch.arange(len(residual), device=residual.device)
    step, support = torch.zeros_like(residual), keep.to(residual.dtype)
    scaled = residual * inverse
    direction, energy = scaled.clone(), (residual * scaled).sum(1)
    active = residual.square().sum(1) > target
    for iteration in range(max_iterations):
        unfinished = int(active.sum())
        if unfinished == 0:
            result[live] = step
            return result, iteration
        if unfinished < _COMPACT_BELOW * len(live):
            result[live] = step
            rows = active.nonzero()[:, 0]
            live, target, energy, active = live[rows], target[rows], energy[rows], active[rows]
            step, residual = step[rows], residual[rows]
            direction, support = direction[rows], support[rows]
        product = multiply(system, direction).mul_(support)
        curvature = (direction * product).sum(1)
        active &= curvature > 0
        length = torch.where(active, energy / curvature, 0)
        step.addcmul_(length[:, None], direction)
        residual.addcmul_(length[:, None], product, value=-1)
        scaled = torch.mul(residual, inverse, out=product)
        previous, energy = energy, (residual * scaled).sum(1)
        direction.mul_(torch.where(active, energy / previous, 0)[:, None]).add_(scaled)
        active &= residual.square().sum(1) > target
    result[live] = step
    return result, max_iterations
