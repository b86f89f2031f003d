"""The ``decorate`` op on CPU tensors: C++ kernels, with GEMM and Cholesky from torch.

A row's result does not depend on its neighbours; ``exact`` gives the same bits at any number of
threads but for its losses, whose GEMM is torch's.
"""

import math

import torch

from tailor_fast.ops.decorate.native.exact import Problem, solve_rows
from tailor_fast.ops.decorate.native.official import decorate_official_
from tailor_fast.ops.decorate.native.sweep import factorize, sweep_rows
from tailor_fast.ops.decorate.tiles import (
    Load,
    Losses,
    Store,
    as_losses,
    in_place,
    row_tiles,
    warn_of_unproved,
)

__all__ = [
    "decorate_exact",
    "decorate_exact_",
    "decorate_obs",
    "decorate_obs_",
    "decorate_official_",
]

# Elements of a row tile: 2048 rows at 4096 columns, 32 MiB per float32 copy of it.
TILE = 1 << 23

Tensor = torch.Tensor


def decorate_exact(
    delta: Tensor,
    mask: Tensor,
    gram: Tensor,
    rhs: Tensor | None,
    target_energy: Tensor | None,
    damping: float,
    tol: float,
    max_iterations: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The minimiser on the mask; returns patch and losses."""
    patch = torch.empty_like(delta)
    problem = Problem(gram, damping, tol, max_iterations)
    return patch, *_exact(delta.__getitem__, patch.__setitem__, mask, rhs, target_energy, problem)


def decorate_exact_(
    weight: Tensor,
    base: Tensor,
    mask: Tensor,
    gram: Tensor,
    rhs: Tensor | None,
    target_energy: Tensor | None,
    damping: float,
    tol: float,
    max_iterations: int,
) -> Losses:
    """``decorate_exact`` written into the tuned ``weight``; returns the losses."""
    load, store = in_place(weight, base, mask)
    problem = Problem(gram, damping, tol, max_iterations)
    return _exact(load, store, mask, rhs, target_energy, problem)


def decorate_obs(
    delta: Tensor, mask: Tensor, gram: Tensor, percdamp: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The OBS sweep on the mask; returns patch and losses."""
    patch = torch.empty_like(delta)
    return patch, *_obs(delta.__getitem__, patch.__setitem__, mask, gram, percdamp)


def decorate_obs_(
    weight: Tensor, base: Tensor, mask: Tensor, gram: Tensor, percdamp: float
) -> Losses:
    """``decorate_obs`` written into the tuned ``weight``; returns the losses."""
    return _obs(*in_place(weight, base, mask), mask, gram, percdamp)


def _exact(
    load: Load,
    store: Store,
    mask: Tensor,
    rhs: Tensor | None,
    target_energy: Tensor | None,
    problem: Problem,
) -> Losses:
    losses = torch.zeros(3, dtype=torch.float64)
    if rhs is not None:
        losses += math.nan if target_energy is None else target_energy
    iterations = unproved = 0
    for rows in row_tiles(mask, TILE):
        tile_rhs = None if rhs is None else rhs[rows]
        tile = solve_rows(problem, load(rows), mask[rows], tile_rhs)
        store(rows, tile.patch)
        losses += tile.losses
        iterations = max(iterations, tile.iterations)
        unproved += tile.unproved
    warn_of_unproved(unproved, len(mask), problem.tol, problem.max_iterations)
    return as_losses(losses, iterations)


def _obs(load: Load, store: Store, mask: Tensor, gram: Tensor, percdamp: float) -> Losses:
    root = factorize(gram, percdamp)
    losses = torch.zeros(3, dtype=torch.float64)
    for rows in row_tiles(mask, TILE):
        patch, tile_losses = sweep_rows(root, gram, load(rows), mask[rows])
        store(rows, patch)
        losses += tile_losses
    return as_losses(losses, iterations=0)
