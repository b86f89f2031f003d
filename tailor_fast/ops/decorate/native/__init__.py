"""The ``decorate`` op on CPU tensors: C++ kernels, with GEMMs from where ``ops/gemm.py`` says.

A row's result does not depend on its neighbours; ``exact`` gives the same patch at any number of
threads.
"""

from collections.abc import Sequence

import torch

from tailor_fast.ops.decorate.factors import Packed, pack
from tailor_fast.ops.decorate.native.exact import Problem, solve_rows
from tailor_fast.ops.decorate.native.official import decorate_official_
from tailor_fast.ops.decorate.native.root import Root
from tailor_fast.ops.decorate.native.sweep import factorize, sweep_rows
from tailor_fast.ops.decorate.tiles import (
    Load,
    Losses,
    Solved,
    Store,
    exact_by_tiles,
    in_place,
    obs_by_tiles,
    row_tiles,
)

__all__ = [
    "decorate_exact",
    "decorate_exact_",
    "decorate_obs",
    "decorate_obs_",
    "decorate_official_",
    "factor_obs",
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


def factor_obs(gram: Tensor, percdamp: float) -> Packed:
    """What ``decorate_obs`` makes of a Gram."""
    return pack(gram, *factorize(gram, percdamp))


def decorate_obs(
    delta: Tensor,
    mask: Tensor,
    gram: Tensor,
    percdamp: float,
    factor: Sequence[Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The OBS sweep on the mask; returns patch and losses."""
    patch = torch.empty_like(delta)
    root = factorize(gram, percdamp) if factor is None else Root.of(factor)
    return patch, *_obs(delta.__getitem__, patch.__setitem__, mask, gram, root)


def decorate_obs_(
    weight: Tensor,
    base: Tensor,
    mask: Tensor,
    gram: Tensor,
    percdamp: float,
    factor: Sequence[Tensor] | None,
) -> Losses:
    """``decorate_obs`` written into the tuned ``weight``; returns the losses."""
    root = factorize(gram, percdamp) if factor is None else Root.of(factor)
    return _obs(*in_place(weight, base, mask), mask, gram, root)


def _exact(
    load: Load,
    store: Store,
    mask: Tensor,
    rhs: Tensor | None,
    target_energy: Tensor | None,
    problem: Problem,
) -> Losses:
    def solve(rows: slice, delta: Tensor, right: Tensor | None) -> Solved:
        return solve_rows(problem, delta, mask[rows], right)

    limits = (problem.tol, problem.max_iterations)
    return exact_by_tiles(load, store, mask, TILE, rhs, target_energy, limits, solve)


def _obs(load: Load, store: Store, mask: Tensor, gram: Tensor, root: Root) -> Losses:
    most = next(row_tiles(mask, TILE), slice(0, 0)).stop
    scratch = [torch.empty(most, mask.shape[1]) for _ in range(2)]  # fresh pages take time

    def solve(rows: slice, delta: Tensor) -> Solved:
        return Solved(*sweep_rows(root, gram, delta, mask[rows], scratch))

    return obs_by_tiles(load, store, mask, TILE, solve)
