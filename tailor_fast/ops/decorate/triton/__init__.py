"""The ``decorate`` op on a GPU: Triton kernels, with GEMM and Cholesky from torch.

Rows are independent in ``exact`` and ``obs``: both work on one tile of rows at a time, and the
in-place forms run the same code on the same tiles. A tile is large, for the GEMMs: 4096 rows at
4096 columns. ``exact`` takes about 2 GiB for it, and 4 bytes per element of the Gram.
"""

from collections.abc import Sequence

import torch

from tailor_fast._core.launch import KernelForm
from tailor_fast.ops.decorate.factors import Packed, pack, unpack
from tailor_fast.ops.decorate.tiles import (
    Load,
    Losses,
    Solved,
    Store,
    exact_by_tiles,
    in_place,
    obs_by_tiles,
)
from tailor_fast.ops.decorate.triton import cg, proof, sweep
from tailor_fast.ops.decorate.triton import system as systems
from tailor_fast.ops.decorate.triton.exact import Problem, solve_rows
from tailor_fast.ops.decorate.triton.official import decorate_official_
from tailor_fast.ops.decorate.triton.system import System

__all__ = [
    "decorate_exact",
    "decorate_exact_",
    "decorate_obs",
    "decorate_obs_",
    "decorate_official_",
    "factor_obs",
    "kernels",
]

TILE = 1 << 24  # elements of a row tile

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
    problem = Problem(System(gram, damping), tol, max_iterations)
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
    problem = Problem(System(gram, damping), tol, max_iterations)
    return _exact(load, store, mask, rhs, target_energy, problem)


def factor_obs(gram: Tensor, percdamp: float) -> Packed:
    """What ``decorate_obs`` makes of a Gram."""
    return pack(gram, *sweep.factorize(gram, percdamp))


def decorate_obs(
    delta: Tensor,
    mask: Tensor,
    gram: Tensor,
    percdamp: float,
    factor: Sequence[Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The OBS sweep on the mask; returns patch and losses."""
    patch = torch.empty_like(delta)
    root = sweep.factorize(gram, percdamp) if factor is None else sweep.Root(*unpack(factor))
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
    root = sweep.factorize(gram, percdamp) if factor is None else sweep.Root(*unpack(factor))
    return _obs(*in_place(weight, base, mask), mask, gram, root)


def kernels() -> tuple[KernelForm, ...]:
    """Forms of the kernels that launches on real layers use."""
    return (*systems.forms(), *cg.forms(), *proof.forms(), *sweep.forms())


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


def _obs(load: Load, store: Store, mask: Tensor, gram: Tensor, root: sweep.Root) -> Losses:
    system = System(gram, root.damping)

    def solve(rows: slice, delta: Tensor) -> Solved:
        return Solved(*sweep.sweep_rows(root, system, delta, mask[rows]))

    return obs_by_tiles(load, store, mask, TILE, solve)
