"""The ``decorate`` op in plain torch: the oracle, and a backend on any device.

Rows are independent in ``exact`` and ``obs``: both work on one tile of rows at a time, so that the
memory beside the result does not grow with the number of rows, and the in-place forms run the same
code on the same tiles. ``official`` chooses its mask over all rows of a block and needs them all.
"""

from collections.abc import Sequence

import torch

from tailor_fast.ops.decorate.factors import Packed, pack, unpack
from tailor_fast.ops.decorate.reference.cg import System
from tailor_fast.ops.decorate.reference.exact import solve_rows
from tailor_fast.ops.decorate.reference.official import decorate_official_
from tailor_fast.ops.decorate.reference.sweep import InverseRoot, energy, factorize, sweep_rows
from tailor_fast.ops.decorate.tiles import (
    Load,
    Losses,
    Solved,
    Store,
    exact_by_tiles,
    in_place,
    obs_by_tiles,
)

__all__ = [
    "decorate_exact",
    "decorate_exact_",
    "decorate_obs",
    "decorate_obs_",
    "decorate_official_",
    "factor_obs",
]

# Elements of a row tile. exact: 512 rows at 4096 columns, 170 MiB of fp64 and fp32 vectors, while
# each word of the Gram that is read still serves 1024 flops. obs: 32 MiB per fp32 copy.
EXACT_TILE = 1 << 21
OBS_TILE = 1 << 23


def decorate_exact(
    delta: torch.Tensor,
    mask: torch.Tensor,
    gram: torch.Tensor,
    rhs: torch.Tensor | None,
    target_energy: torch.Tensor | None,
    damping: float,
    tol: float,
    max_iterations: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The minimiser on the mask; returns patch and losses."""
    patch = torch.empty_like(delta)
    options = (rhs, target_energy, damping, tol, max_iterations)
    return patch, *_exact(delta.__getitem__, patch.__setitem__, mask, gram, *options)


def decorate_exact_(
    weight: torch.Tensor,
    base: torch.Tensor,
    mask: torch.Tensor,
    gram: torch.Tensor,
    rhs: torch.Tensor | None,
    target_energy: torch.Tensor | None,
    damping: float,
    tol: float,
    max_iterations: int,
) -> Losses:
    """``decorate_exact`` written into the tuned ``weight``; returns the losses."""
    load, store = in_place(weight, base, mask)
    return _exact(load, store, mask, gram, rhs, target_energy, damping, tol, max_iterations)


def factor_obs(gram: torch.Tensor, percdamp: float) -> Packed:
    """What ``decorate_obs`` makes of a Gram."""
    root = factorize(gram, percdamp)
    if root.damping == 0.0 and not bool(gram.any()):
        return pack(gram, None, [], 0.0)
    return pack(gram, root.upper, [], root.damping)


def decorate_obs(
    delta: torch.Tensor,
    mask: torch.Tensor,
    gram: torch.Tensor,
    percdamp: float,
    factor: Sequence[torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The OBS sweep on the mask; returns patch and losses."""
    patch = torch.empty_like(delta)
    root = _root(gram, percdamp, factor)
    return patch, *_obs(delta.__getitem__, patch.__setitem__, mask, gram, root)


def decorate_obs_(
    weight: torch.Tensor,
    base: torch.Tensor,
    mask: torch.Tensor,
    gram: torch.Tensor,
    percdamp: float,
    factor: Sequence[torch.Tensor] | None,
) -> Losses:
    """``decorate_obs`` written into the tuned ``weight``; returns the losses."""
    root = _root(gram, percdamp, factor)
    return _obs(*in_place(weight, base, mask), mask, gram, root)


def _exact(
    load: Load,
    store: Store,
    mask: torch.Tensor,
    gram: torch.Tensor,
    rhs: torch.Tensor | None,
    target_energy: torch.Tensor | None,
    damping: float,
    tol: float,
    max_iterations: int,
) -> Losses:
    system = System.build(gram, damping)

    def solve(rows: slice, delta: torch.Tensor, right: torch.Tensor | None) -> Solved:
        return solve_rows(system, delta, mask[rows], right, tol, max_iterations)

    limits = (tol, max_iterations)
    return exact_by_tiles(load, store, mask, EXACT_TILE, rhs, target_energy, limits, solve)


def _root(
    gram: torch.Tensor, percdamp: float, factor: Sequence[torch.Tensor] | None
) -> InverseRoot:
    if factor is None:
        return factorize(gram, percdamp)
    upper, _, damping = unpack(factor)
    return factorize(gram, percdamp) if upper is None else InverseRoot(upper, damping)


def _obs(
    load: Load, store: Store, mask: torch.Tensor, gram: torch.Tensor, factor: InverseRoot
) -> Losses:
    def solve(rows: slice, delta: torch.Tensor) -> Solved:
        undecorated = energy(delta.masked_fill(mask[rows], 0), gram, factor.damping)
        reverted = energy(delta, gram, factor.damping)
        patch, loss = sweep_rows(factor, delta, mask[rows])
        return Solved(patch, torch.stack([loss, undecorated, reverted]))

    return obs_by_tiles(load, store, mask, OBS_TILE, solve)
