"""The minimiser on a fixed mask, for one tile of rows: mixed precision, proved in float64.

A residual ``r = (b - Ap)_K`` puts a row at most ``|r|² / λ`` above its minimum, as with the
reference. There that is held against ``λ |d - p|²``, which the minimum cannot fall below. Where
there is no right-hand side it is held here against the objective itself, which is known then, and
some hundred times as large: a quarter of the iterations less.

The iterations are those of ``cg.py``, with float16 products. Where a round has lowered the residual
a hundredfold, the lower bits of the matrix are made up for by one more product, and the next round
begins. The residual that proves a row is then computed in float64, from the patch itself. Rows that
do not get there, because their matrix is nearly singular under little damping, are solved anew by
the reference.
"""

from typing import NamedTuple

import torch

from tailor_fast._core.backend import implementation
from tailor_fast.ops.decorate.tiles import Solved
from tailor_fast.ops.decorate.triton.cg import conjugate_gradients
from tailor_fast.ops.decorate.triton.proof import State, candidate_of, improve_, start_of
from tailor_fast.ops.decorate.triton.system import System

Tensor = torch.Tensor

# A round ends when the residual has fallen to this share. Measured on Grams of 1024 columns, with
# the distance as the bound, against iterations in float32: 27 in place of 24 where the inputs have
# cols / 4 factors and noise, 59 for 40 and 226 for 103 where their spectrum falls as k^-1.2 and
# k^-1.8; a share of 0.03 or 0.001 changes that by a tenth. On others like the first two, with the
# objective as the bound, 18 in place of 23 and 38 in place of 50.
_ROUND = 1e-2
_ROUNDS = 4
_REACH = 1e-6  # share of a residual to which float32 vectors can be trusted to lower it
_ATTEMPTS = 6  # proofs in float64; each further one needs a residual that has at least halved
_PATIENCE = 3  # iterations per kept weight: in exact arithmetic one is enough
_ROUNDING = 1e-12  # share of b that a float64 residual may be rounding
_LEAST_LEFT = 1e-2  # of an objective; what float32 says beyond that is not believed
_MARGIN = 0.1  # an approximate residual settles a row without iterations only far below the limit


class Problem(NamedTuple):
    """What all tiles of a layer share."""

    system: System
    tol: float
    max_iterations: int


class _Rows(NamedTuple):
    """The equations of a tile: ``delta``, ``rhs`` float32, ``keep`` bool, ``[rows, cols]``."""

    problem: Problem
    delta: Tensor
    keep: Tensor
    rhs: Tensor | None

    def part(self, rows: Tensor) -> "_Rows":
        """Some rows, in order; all of them are not copied."""
        if len(rows) == len(self.delta):
            return self
        rhs = None if self.rhs is None else self.rhs[rows]
        return _Rows(self.problem, self.delta[rows], self.keep[rows], rhs)

    def evaluate(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """``(b - Ap)_K`` and the objective of each row, float64; without ``rhs``, b is ``d A``."""
        system = self.problem.system
        if self.rhs is None:
            lacking = self.delta - p
            r = system.multiply(lacking)
            loss = (lacking * r).sum(1)
            return r.masked_fill_(~self.keep, 0), loss
        d = self.delta.double()
        b = self.rhs + d * system.damping
        r = (b - system.multiply(p)).masked_fill_(~self.keep, 0)
        loss = system.damping * d.square().sum(1) - (p * (b + r)).sum(1)
        return r, loss

    def estimate(self, *, bare: bool) -> tuple[Tensor, Tensor]:
        """The same at ``p = d`` on K, or at ``p = 0``, from products of float16 and in float32.

        Args:
            bare: at the bare mask.
        """
        system, delta, keep = self.problem.system, self.delta, self.keep
        if self.rhs is None:
            return system.approximate(delta.masked_fill(keep, 0) if bare else delta, keep)
        b = torch.add(self.rhs, delta, alpha=system.damping).masked_fill_(~keep, 0)
        loss = system.damping * delta.square().sum(1, dtype=torch.float64)
        if not bare:
            return b, loss
        p = delta.masked_fill(~keep, 0)
        loss -= 2 * (p * b).sum(1, dtype=torch.float64)
        answer, energy = system.approximate(p, keep)
        return b.sub_(answer), loss + energy

    def floor(self, p: Tensor, loss: Tensor) -> Tensor:
        """See ``State``; ``loss`` is the objective of each row at ``p``."""
        if self.rhs is None:
            return loss.clone()
        return (self.delta - p).square().sum(1) * self.problem.system.damping

    def limit(self, floor: Tensor, rounding: Tensor) -> Tensor:
        """Size of the residual up to which a row is proved: ``|r|² / λ`` is ``tol`` of the least.

        The least is ``floor - |r|² / λ``.
        """
        tol, damping = self.problem.tol, self.problem.system.damping
        proof = floor.clamp_min(0).mul_(damping * tol / (1 + tol)).sqrt_()
        return torch.maximum(proof, rounding)


class Start(NamedTuple):
    """Where some rows stand before a step.

    Attributes:
        residual: over T and ``size``, float32 ``[rows, cols]``.
        size: its norm before, float64 ``[rows]``.
        floor: see ``State``; float64 ``[rows]``.
        rounding: size of a residual that may be rounding, float64 ``[rows]``.
    """

    residual: Tensor
    size: Tensor
    floor: Tensor
    rounding: Tensor

    def targets(self, part: _Rows, floor: Tensor) -> Tensor:
        """Squared residuals to be reached so that ``floor`` proves the rows, float32 ``[rows]``."""
        # Half of what is asked: the recurrence drifts, and the floor falls.
        goal = part.limit(floor, self.rounding) / (2 * self.size)
        return goal.float().clamp_min_(_REACH).square_()


def solve_rows(problem: Problem, delta: Tensor, keep: Tensor, rhs: Tensor | None) -> Solved:
    """Minimise the objective of each row of a tile on its support.

    Args:
        problem: matrix and options.
        delta: float32 ``[rows, cols]``.
        keep: bool ``[rows, cols]``, the supports.
        rhs: undamped right-hand side, float32 ``[rows, cols]``; None stands for ``delta @ gram``.
    """
    tile = _Rows(problem, delta, keep, rhs)
    p = delta.masked_fill(~keep, 0).double()
    small = problem.system.small(len(delta))  # then float64 costs nothing
    if small:
        (r, reverted), (from_bare, bare) = tile.evaluate(torch.zeros_like(p)), tile.evaluate(p)
    else:
        (r, reverted), (from_bare, bare) = tile.estimate(bare=False), tile.estimate(bare=True)
    rounding = r.norm(dim=1, dtype=torch.float64) * _ROUNDING
    # The better of `p = d` on K and `p = 0`.
    worse = (bare > reverted).nonzero()[:, 0]
    p[worse] = 0
    from_bare[worse] = r[worse]
    del r
    loss = torch.minimum(bare, reverted)
    state = State(p, from_bare.double(), loss, tile.floor(p, loss))
    del from_bare
    margin = 1.0 if small else _MARGIN
    size = state.residual.norm(dim=1)
    open_rows = (size > margin * tile.limit(state.floor, rounding)).nonzero()[:, 0]
    stuck, iterations = _improve(tile, state, rounding, open_rows, size[open_rows])
    patch = p.float()
    if len(stuck):
        patch[stuck], stuck_loss, more = _by_reference(problem, delta, keep, rhs, stuck)
        loss[stuck] = 0
        loss[stuck[0]] = stuck_loss  # of all of them
        iterations += more
    losses = torch.stack([loss.sum(), bare.sum(), reverted.sum()])
    return Solved(patch, losses, iterations)


def _improve(
    tile: _Rows, state: State, rounding: Tensor, rows: Tensor, size: Tensor
) -> tuple[Tensor, int]:
    """Move ``rows`` of ``state``, whose residuals are of ``size``, in place until each is proved.

    Returns:
        Rows without proof, and iterations of the slowest row.
    """
    system = tile.problem.system
    back = system.inverse_root / system.mean
    damping = torch.tensor([system.damping], dtype=torch.float64, device=rows.device)
    stuck, iterations = [rows[:0]], 0
    for _ in range(_ATTEMPTS):
        limit = tile.problem.max_iterations - iterations
        if len(rows) == 0 or limit == 0:
            break
        part = tile.part(rows)
        residual = start_of(state, rows, size, system.inverse_root)
        start = Start(residual, size, state.floor[rows], rounding[rows])
        step, done = _approach(part, start, limit)
        iterations += done
        delta = part.delta if part.rhs is None else None
        candidate, factor = candidate_of(state, rows, step, size, back, delta)
        product = system.undamped(factor)
        del step, factor, residual, start
        now = improve_(state, rows, candidate, product, part.delta, part.keep, part.rhs, damping)
        del candidate, product
        unproved = now > part.limit(state.floor[rows], rounding[rows])
        hopeful = unproved & (now < size / 2)
        stuck.append(rows[unproved & ~hopeful])
        rows, size = rows[hopeful], now[hopeful]
    return torch.cat([*stuck, rows]), iterations


def _approach(part: _Rows, start: Start, limit: int) -> tuple[Tensor, int]:
    """A step that is expected to prove ``part``, and its iterations.

    Args:
        part: the rows.
        start: where they stand.
        limit: of iterations.

    Returns:
        The step times T and the mean of the diagonal, float32, in units of ``start.size``.
    """
    system = part.problem.system
    limit = min(limit, _PATIENCE * int(part.keep.sum(1).max()) + _ROUNDS)
    residual, targets = start.residual.clone(), start.targets(part, start.floor)
    size = (residual.square() * system.weight).sum(1)
    total, iterations = torch.zeros_like(residual), 0
    for number in range(_ROUNDS):
        if iterations == limit or not bool((size > targets).any()):
            break
        target = torch.maximum(targets, size * _ROUND**2)
        step, done = conjugate_gradients(
            system, residual, part.keep, size > target, target, limit - iterations
        )
        iterations += done
        total = step if number == 0 else total.add_(step)
        size = system.correct_(residual, step, part.keep)
        if number == 0 and part.rhs is None:  # most of what the objective falls, it has fallen
            falls = (total * (start.residual + residual)).sum(1, dtype=torch.float64)
            falls *= start.size.square() / system.mean
            left = torch.maximum(start.floor - falls, start.floor * _LEAST_LEFT)
            targets = start.targets(part, left)
    return total, iterations


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
