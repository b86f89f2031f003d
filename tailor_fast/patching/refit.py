"""The mask chosen from the solution itself, in steps, instead of from a score of the delta.

A score of ``D`` knows what the fine-tuned model needs and nothing of what old tasks forbid, nor of
what kept weights can do for dropped ones. The minimiser of equation (6) knows both. So the solve
starts with every weight, ranks them by what removing one would cost, ``p² / [A⁻¹]_jj`` (Hassibi and
Stork, Optimal Brain Surgeon, 1993), keeps the best, solves again, and so on: few at a time, because
the cost of removing one weight says little about removing most of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from tailor_fast._core.processes import Processes
from tailor_fast.ops.decorate import Decorated, decorate_exact
from tailor_fast.ops.select import select_patch, topk_mask
from tailor_fast.patching.equations import System
from tailor_fast.patching.masks import within_tensor
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.scores import factor_of, inverse_diagonal


@dataclass(frozen=True)
class Exact:
    """Some rows of a layer, to be solved on any mask.

    Attributes:
        delta: ``D``, fp32 ``[rows, cols]``.
        system: the undamped normal equations.
        tol: as in ``Recipe``.
        max_iterations: as in ``Recipe``.
    """

    delta: torch.Tensor
    system: System
    tol: float
    max_iterations: int

    def solve(self, mask: torch.Tensor) -> Decorated:
        """Minimise equation (6) over patches on ``mask``, bool ``[rows, cols]``."""
        system = self.system
        return decorate_exact(
            self.delta,
            mask,
            system.gram,
            system.rhs,
            damping=system.damping,
            target_energy=None if system.rhs is None else system.target_energy,
            tol=self.tol,
            max_iterations=self.max_iterations,
        )


def refit_mask(
    mask: torch.Tensor,
    tiles: Sequence[Exact],
    recipe: Recipe,
    share: tuple[Sequence[slice], Processes],
    where: str,
) -> torch.Tensor:
    """Choose a layer's mask in ``recipe.refits`` steps.

    The share that is kept falls by one factor a step, from everything to the share of ``mask``.

    Args:
        mask: bool ``[rows, cols]``, the mask by score; of it, only the count is used.
        tiles: the problem of this process's rows, some rows after the other.
        recipe: number of steps, scope, density.
        share: the rows of each process, and the processes.
        where: the layer's name, for its density and for messages.

    Returns:
        The mask of all rows.

    Raises:
        InputError: the damped Gram cannot be factored.
    """
    kept = int(mask.count_nonzero())
    if kept in (0, mask.numel()):
        return mask
    recipe = recipe.of(where)
    parts, processes = share
    own = parts[processes.rank]
    cost, patches = _from_everything(tiles, where)
    chosen, steps = mask, recipe.refits or 1
    for step in range(1, steps + 1):
        if step > 1:
            patches = _refitted(tiles, chosen[own])
        scores = torch.empty(chosen[own].shape, device=mask.device)
        for rows, patch in zip(_rows(tiles), patches, strict=True):
            torch.mul(patch.square(), cost, out=scores[rows])
        del patches, patch  # the last tile's, which selection has no use for
        chosen = _best(_whole(scores, mask.shape, parts, processes), kept, step / steps, recipe)
    return chosen


def _rows(tiles: Sequence[Exact]) -> Iterator[slice]:
    """Where each tile lies among this process's rows."""
    end = 0
    for tile in tiles:
        begin, end = end, end + len(tile.delta)
        yield slice(begin, end)


def _refitted(tiles: Sequence[Exact], mask: torch.Tensor) -> Iterator[torch.Tensor]:
    """The minimiser on ``mask``, tile by tile."""
    for tile, rows in zip(tiles, _rows(tiles), strict=True):
        yield tile.solve(mask[rows]).patch


def _from_everything(
    tiles: Sequence[Exact], where: str
) -> tuple[torch.Tensor, Iterator[torch.Tensor]]:
    """``1 / [A⁻¹]_jj`` fp32 ``[cols]``, and the minimiser over every weight, tile by tile."""
    system = tiles[0].system
    factor = factor_of(system.gram, system.damping, where)
    cost = inverse_diagonal(factor).reciprocal_().float()
    if system.rhs is None:
        return cost, (tile.delta for tile in tiles)  # which is then the minimiser
    return cost, (_solved_with(factor, tile) for tile in tiles)


def _solved_with(factor: torch.Tensor, tile: Exact) -> torch.Tensor:
    if tile.system.rhs is None:
        return tile.delta
    rhs = tile.system.rhs.add(tile.delta, alpha=tile.system.damping).to(factor.dtype)
    patch: torch.Tensor = torch.cholesky_solve(rhs.t(), factor).t().float()
    return patch


def _whole(
    part: torch.Tensor, shape: torch.Size, parts: Sequence[slice], processes: Processes
) -> torch.Tensor:
    """The rows of all processes, bit-equal in each of them."""
    if processes.count == 1:
        return part
    whole = part.new_empty(shape)
    whole[parts[processes.rank]] = part
    with processes.exchange():
        processes.gather()
        for rank, rows in enumerate(parts):
            processes.broadcast(whole[rows], rank)
    return whole


def _best(scores: torch.Tensor, kept: int, progress: float, recipe: Recipe) -> torch.Tensor:
    """The mask of the best scores, of a share that reaches the last one at ``progress`` 1."""
    if recipe.scope not in ("row", "block"):
        count = scores.numel()
        wanted = kept if progress == 1.0 else int(count * (kept / count) ** progress)
        return topk_mask(scores, wanted)
    # Scores are not negative: as deltas by magnitude alone they keep their order.
    return select_patch(
        torch.zeros_like(scores),
        scores,
        density=recipe.density**progress,
        salience_weight=1.0,
        normalize="none",
        scope=within_tensor(recipe),
    )
