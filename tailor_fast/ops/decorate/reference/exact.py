"""The minimiser on a fixed mask, for one tile of rows.

With ``A = G + λI`` and ``B = rhs + λD`` (``B = D A`` without ``rhs``) a row's objective is
``const - 2 p·b + p·Ap``, minimal where ``A_KK p = b_K``. With the residual ``r = (b - Ap)_K`` it
lies above its minimum by ``r·A_KK⁻¹r <= |r|² / λ``, and it is at least ``λ |d - p|²``, for the
rest of it is a sum of squares. So ``|r| <= sqrt(tol) λ |d - p|`` proves a row to be within ``tol``
of its minimum, whatever the conditioning. That is the stopping rule.

The iterations run in float32. Residuals, and with them the proof, the losses and the choice between
candidates, are computed in float64 from the patch itself, never by the recurrence. Rows that still
lack the proof (a nearly singular Gram under little damping) go on in float64.
"""

import math
from typing import NamedTuple

import torch

from tailor_fast.ops.decorate.reference.cg import System, conjugate_gradients, multiply
from tailor_fast.ops.decorate.tiles import Solved

# Precisions of the iterations, each with the share of its first residual that it can reach, and how
# many iterations per kept weight it is worth: in exact arithmetic one is enough.
_ROUNDS = ((torch.float32, 1e-6, 3), (torch.float64, 0.0, 100))
# A float64 residual of this share of b is rounding: the proof where λ = 0 or p = d offers none.
_ROUNDING = 1e-12


class _Rows(NamedTuple):
    """The equations of a tile: ``d``, ``b`` float64 ``[rows, cols]``, ``keep`` bool."""

    system: System
    d: torch.Tensor
    b: torch.Tensor
    keep: torch.Tensor

    def residual(self, p: torch.Tensor, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """``(b - Ap)_K`` of ``rows``, whose patches are ``p``; float64."""
        return torch.where(self.keep[rows], self.b[rows] - multiply(self.system, p), 0)

    def gain(self, p: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        """By how much ``p`` with residual ``r`` lowers the objective of ``p = 0``, per row."""
        return (p * (self.b + r)).sum(1)

    def unproved(
        self, p: torch.Tensor, r: torch.Tensor, tol: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows whose residual proves nothing yet, and by what factor each has to fall."""
        proof = (self.d - p).norm(dim=1) * (math.sqrt(tol) * self.system.damping)
        rounding = torch.where(self.keep, self.b, 0).norm(dim=1) * _ROUNDING
        limit, size = torch.maximum(proof, rounding), r.norm(dim=1)
        rows = (size > limit).nonzero()[:, 0]
        return rows, limit[rows] / size[rows]


def solve_rows(
    system: System,
    delta: torch.Tensor,
    keep: torch.Tensor,
    rhs: torch.Tensor | None,
    tol: float,
    max_iterations: int,
) -> Solved:
    """Minimise the objective of each row on its support.

    Args:
        system: damped Gram.
        delta: float32 ``[rows, cols]``.
        keep: bool ``[rows, cols]``, the supports.
        rhs: undamped right-hand side, float32 ``[rows, cols]``; None stands for ``delta @ gram``.
        tol: relative excess over the minimum up to which a row may end.
        max_iterations: limit per round.
    """
    d = delta.double()
    if rhs is None:
        b = multiply(system, d)
        reverted = (d * b).sum()
    else:
        b = rhs.double().add_(d, alpha=system.damping)
        reverted = d.square().sum() * system.damping
    tile = _Rows(system, d, b, keep)
    p, r, undecorated = _start(tile)
    iterations = 0
    rows, factor = tile.unproved(p, r, tol)
    longest = int(keep.sum(1).max()) if len(keep) else 0
    for dtype, reach, patience in _ROUNDS:
        if len(rows) == 0:
            break
        # Half of what is asked: the recurrence and |d - p| both drift from where they started.
        goal = (factor / 2).clamp_min(reach).to(dtype)
        iterations += _advance(tile, p, r, rows, goal, min(max_iterations, patience * longest))
        rows, factor = tile.unproved(p, r, tol)
    losses = reverted - torch.stack(
        [tile.gain(p, r).sum(), undecorated, torch.zeros_like(reverted)]
    )
    return Solved(torch.where(keep, p, 0).float(), losses, iterations, len(rows))


def _start(tile: _Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The better of ``p = d`` on K and ``p = 0`` for each row, its residual, the former's gain."""
    p = torch.where(tile.keep, tile.d, 0)
    r = tile.residual(p)
    gain = tile.gain(p, r)
    worse = gain < 0
    p[worse] = 0
    r[worse] = torch.where(tile.keep[worse], tile.b[worse], 0)
    return p, r, gain.sum()


def _advance(
    tile: _Rows,
    p: torch.Tensor,
    r: torch.Tensor,
    rows: torch.Tensor,
    goal: torch.Tensor,
    max_iterations: int,
) -> int:
    """Move ``p`` and ``r`` of ``rows`` in place by conjugate gradients in the dtype of ``goal``."""
    before = r[rows]
    size = before.norm(dim=1, keepdim=True)
    step, iterations = conjugate_gradients(
        tile.system,
        (before / size).to(goal.dtype),
        tile.keep[rows],
        goal.square(),
        max_iterations,
    )
    moved = step.double().mul_(size)
    candidate = p[rows] + moved
    after = tile.residual(candidate, rows)
    # The objective falls by moved·(before + after). Where rounding made it rise, the row stays.
    better = (moved * (before + after)).sum(1) > 0
    p[rows[better]] = candidate[better]
    r[rows[better]] = after[better]
    return iterations
