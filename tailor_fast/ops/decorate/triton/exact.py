"""The minimiser on a fixed mask, for one tile of rows: mixed precision, proved in float64.

What is proved and how stands with the reference: a residual ``r = (b - Ap)_K`` of size at most
``sqrt(tol) λ |d - p|`` puts a row within ``tol`` of its minimum. Here the iterations are those of
``cg.py``, with float16 products. Where a round has lowered the residual a hundredfold, the lower
bits of the matrix are made up for by one more product, and the next round begins. The residual that
proves a row is then computed in float64, from the patch itself. Rows that do not get there, because
their matrix is nearly singular under little damping, are solved anew by the reference.
"""

import math
from typing import NamedTuple

import torch

from tailor_fast._core.backend import implementation
from tailor_fast.ops.decorate.tiles import Solved
from tailor_fast.ops.decorate.triton.cg import conjugate_gradients
from tailor_fast.ops.decorate.triton.system import System

Tensor = torch.Tensor

# A round ends when the residual has fallen to this share. Measured on Grams of 1024 columns against
# iterations in float32: 27 iterations in place of 24 where the inputs have cols / 4 factors and
# noise, 59 for 40 and 226 for 103 where their spectrum falls as k^-1.2 and k^-1.8; a share of 0.03
# or 0.001 changes that by a tenth.
_ROUND = 1e-2
_ROUNDS = 4
_REACH = 1e-6  # share of a residual to which float32 vectors can be trusted to lower it
_ATTEMPTS = 6  # proofs in float64; each further one needs a residual that has at least halved
_PATIENCE = 3  # iterations per kept weight: in exact arithmetic one is enough
_ROUNDING = 1e-12  # share of b that a float64 residual may be rounding
_MARGIN = 0.1  # an approximate residual settles a row without iterations only far below the limit


class Problem(NamedTuple):
    """What all tiles of a layer share."""

    system: System
    tol: float
    max_iterations: int


class _Rows(NamedTuple):
    """The equations of a tile: ``d`` float64, ``keep`` bool, ``rhs`` float32, ``[rows, cols]``."""

    problem: Problem
    d: Tensor
    keep: Tensor
    rhs: Tensor | None

    def part(self, rows: Tensor) -> "_Rows":
        """Some rows, in order; all of them are not copied."""
        if len(rows) == len(self.d):
            return self
        rhs = None if self.rhs is None else self.rhs[rows]
        return _Rows(self.problem, self.d[rows], self.keep[rows], rhs)

    def evaluate(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """``(b - Ap)_K`` and the objective of each row, float64; without ``rhs``, b is ``d A``."""
        system = self.problem.system
        lacking = self.d - p
        if self.rhs is None:
            r = system.multiply(lacking)
            loss = (lacking * r).sum(1)
            return r.masked_fill_(~self.keep, 0), loss
        b = self.rhs + self.d * system.damping
        r = (b - system.multiply(p)).masked_fill_(~self.keep, 0)
        loss = system.damping * self.d.square().sum(1) - (p * (b + r)).sum(1)
        return r, loss

    def estimate(self, delta: Tensor, *, bare: bool) -> tuple[Tensor, Tensor]:
        """The same at ``p = d`` on K, or at ``p = 0``, from products of float16 and in float32.

        Args:
            delta: ``d`` as it came, float32.
            bare: at the bare mask.
        """
        system, drop = self.problem.system, ~self.keep
        if self.rhs is None:
            lacking = delta.masked_fill(self.keep, 0) if bare else delta
            r = system.approximate(lacking)
            loss = (lacking * r).sum(1, dtype=torch.float64)
            return r.masked_fill_(drop, 0), loss
        b = torch.add(self.rhs, delta, alpha=system.damping)
        loss = system.damping * delta.square().sum(1, dtype=torch.float64)
        if not bare:
            return b.masked_fill_(drop, 0), loss
        p = delta.masked_fill(drop, 0)
        r = (b - system.approximate(p)).masked_fill_(drop, 0)
        return r, loss - (p * b.add_(r)).sum(1, dtype=torch.float64)

    def limit(self, p: Tensor, rounding: Tensor) -> Tensor:
        """Size of the residual up to which a row is proved."""
        proof = math.sqrt(self.problem.tol) * self.problem.system.damping
        return torch.maximum((self.d - p).norm(dim=1) * proof, rounding)


def solve_rows(problem: Problem, delta: Tensor, keep: Tensor, rhs: Tensor | None) -> Solved:
    """Minimise the objective of each row of a tile on its support.

    Args:
        problem: matrix and options.
        delta: float32 ``[rows, cols]``.
        keep: bool ``[rows, cols]``, the supports.
        rhs: undamped right-hand side, float32 ``[rows, cols]``; None stands for ``delta @ gram``.
    """
    tile = _Rows(problem, delta.double(), keep, rhs)
    p = tile.d.masked_fill(~keep, 0)
    small = problem.system.small(len(delta))  # then float64 costs nothing
    if small:
        (r, reverted), (from_bare, bare) = tile.evaluate(torch.zeros_like(p)), tile.evaluate(p)
    else:
        r, reverted = tile.estimate(delta, bare=False)
        from_bare, bare = tile.estimate(delta, bare=True)
    rounding = r.norm(dim=1, dtype=torch.float64) * _ROUNDING
    # The better of `p = d` on K and `p = 0`.
    worse = bare > reverted
    p[worse] = 0
    r = torch.where(worse[:, None], r, from_bare).double()
    del from_bare
    loss = torch.minimum(bare, reverted)
    margin = 1.0 if small else _MARGIN
    open_rows = (r.norm(dim=1) > margin * tile.limit(p, rounding)).nonzero()[:, 0]
    stuck, iterations = _improve(tile, p, r, loss, rounding, open_rows)
    patch = p.masked_fill_(~keep, 0).float()
    if len(stuck):
        patch[stuck], stuck_loss, more = _by_reference(problem, delta, keep, rhs, stuck)
        loss[stuck] = 0
        loss[stuck[0]] = stuck_loss  # of all of them
        iterations += more
    losses = torch.stack([loss.sum(), bare.sum(), reverted.sum()])
    return Solved(patch, losses, iterations)


def _improve(
    tile: _Rows, p: Tensor, r: Tensor, loss: Tensor, rounding: Tensor, rows: Tensor
) -> tuple[Tensor, int]:
    """Move ``p``, ``r`` and ``loss`` of ``rows`` in place until each is proved.

    Returns:
        Rows without proof, and iterations of the slowest row.
    """
    stuck, iterations = [rows[:0]], 0
    for _ in range(_ATTEMPTS):
        limit = tile.problem.max_iterations - iterations
        if len(rows) == 0 or limit == 0:
            break
        part, before = tile.part(rows), r[rows]
        size = before.norm(dim=1)
        # Half of what is asked: |d - p| drifts from where it started.
        goal = part.limit(p[rows], rounding[rows]) / (2 * size)
        step, done = _approach(part, before / size[:, None], goal, limit)
        iterations += done
        step *= size[:, None]
        candidate = p[rows] + step
        after, value = part.evaluate(candidate)
        # The objective falls by step·(before + after). Where rounding made it rise, the row stays.
        better = (step * (before + after)).sum(1) > 0
        moved = rows[better]
        p[moved], r[moved], loss[moved] = candidate[better], after[better], value[better]
        now = r[rows].norm(dim=1)
        unproved = now > part.limit(p[rows], rounding[rows])
        hopeful = unproved & (now < size / 2)
        stuck.append(rows[unproved & ~hopeful])
        rows = rows[hopeful]
    return torch.cat([*stuck, rows]), iterations


def _approach(part: _Rows, r: Tensor, goal: Tensor, limit: int) -> tuple[Tensor, int]:
    """A step whose residual is ``goal`` of ``r``, whose rows are of size 1, and its iterations."""
    system = part.problem.system
    weight = system.root.square().float()
    residual = (r * system.inverse_root).float()
    targets = goal.float().clamp_min_(_REACH).square_()
    limit = min(limit, _PATIENCE * int(part.keep.sum(1).max()) + _ROUNDS)
    total, iterations = torch.zeros_like(residual), 0
    for _ in range(_ROUNDS):
        size = (residual.square() * weight).sum(1)
        if iterations == limit or not bool((size > targets).any()):
            break
        step, done = conjugate_gradients(
            system,
            residual,
            part.keep,
            torch.maximum(targets, size * _ROUND**2),
            limit - iterations,
        )
        iterations += done
        total += step
        residual -= system.correction(step).masked_fill_(~part.keep, 0)
    return total.double().mul_(system.inverse_root / system.mean), iterations


def _by_reference(
    problem: Problem, delta: Tensor, keep: Tensor, rhs: Tensor | None, rows: Tensor
) -> tuple[Tensor, Tensor, int]:
    """Patch, loss and iterations of ``rows``; the reference reports those that it cannot prove."""
    from tailor_fast.ops.decorate.schema import ORDER  # which imports nothing of a backend

    solve = implementation("decorate", ORDER, "reference", delta.device.type).decorate_exact
    right = None if rhs is None else rhs[rows]
    energy = None if rhs is None else delta.new_zeros((), dtype=torch.float64)
    system = problem.system
    options = (right, energy, system.damping, problem.tol, problem.max_iterations)
    patch, loss, _, _, iterations = solve(delta[rows], keep[rows], system.gram, *options)
    return patch, loss, int(iterations)
