"""How the backends walk over a layer: tiles of rows in, tiles of the patch out, one set of losses.

Rows are independent in ``exact`` and ``obs``, so the memory beside the result does not grow with
their number, and the in-place forms run the same code on the same tiles.
"""

import logging
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

_log = logging.getLogger("tailor_fast")

Load = Callable[[slice], torch.Tensor]
Store = Callable[[slice, torch.Tensor], None]
Losses = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class Solved(NamedTuple):
    """One tile of rows, decorated.

    Attributes:
        patch: float32 ``[rows, cols]``.
        losses: float64 ``[3]``: objective at the patch, at the bare mask, at 0. With a right-hand
            side the target energy is to be added to each.
        iterations: of the slowest row, all rounds and precisions together.
        unproved: rows that ended without the proof.
    """

    patch: torch.Tensor
    losses: torch.Tensor
    iterations: int = 0
    unproved: int = 0


SolveObs = Callable[[slice, torch.Tensor], Solved]
SolveExact = Callable[[slice, torch.Tensor, torch.Tensor | None], Solved]


def obs_by_tiles(
    load: Load, store: Store, mask: torch.Tensor, elements: int, solve: SolveObs
) -> Losses:
    """Decorate a layer tile by tile.

    Args:
        load: rows of the delta.
        store: takes rows of the patch.
        mask: bool ``[rows, cols]``.
        elements: of a tile, about.
        solve: (rows, their delta) to their patch.
    """
    losses, iterations, _ = _walk(load, store, mask, elements, solve)
    return as_losses(losses, iterations)


def exact_by_tiles(
    load: Load,
    store: Store,
    mask: torch.Tensor,
    elements: int,
    rhs: torch.Tensor | None,
    target_energy: torch.Tensor | None,
    limits: tuple[float, int],
    solve: SolveExact,
) -> Losses:
    """Decorate a layer tile by tile, and log how many rows ended without proof.

    Args:
        load: rows of the delta.
        store: takes rows of the patch.
        mask: bool ``[rows, cols]``.
        elements: of a tile, about.
        rhs: right-hand side ``[rows, cols]``; None stands for ``delta @ gram``.
        target_energy: that of the losses with ``rhs``, which are NaN without it.
        limits: tolerance and iterations, for the message.
        solve: (rows, their delta, their right-hand side) to their patch.
    """

    def solve_rows(rows: slice, delta: torch.Tensor) -> Solved:
        return solve(rows, delta, None if rhs is None else rhs[rows])

    losses, iterations, unproved = _walk(load, store, mask, elements, solve_rows)
    if rhs is not None:
        losses += math.nan if target_energy is None else target_energy
    _warn_of_unproved(unproved, len(mask), *limits)
    return as_losses(losses, iterations)


def _walk(
    load: Load, store: Store, mask: torch.Tensor, elements: int, solve: SolveObs
) -> tuple[torch.Tensor, int, int]:
    """Summed losses, most iterations, rows without proof."""
    losses = mask.new_zeros(3, dtype=torch.float64)
    iterations = unproved = 0
    for rows in row_tiles(mask, elements):
        tile = solve(rows, load(rows))
        store(rows, tile.patch)
        losses += tile.losses
        iterations = max(iterations, tile.iterations)
        unproved += tile.unproved
    return losses, iterations, unproved


def row_tiles(mask: torch.Tensor, elements: int) -> Iterator[slice]:
    """Rows of ``mask [rows, cols]`` in tiles of about that many elements."""
    rows, cols = mask.shape
    step = max(1, elements // max(1, cols))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def in_place(weight: torch.Tensor, base: torch.Tensor, mask: torch.Tensor) -> tuple[Load, Store]:
    """Read rows of the delta, write rows of ``base + patch``; words outside the mask are base's."""

    def load(rows: slice) -> torch.Tensor:
        return weight[rows].float() - base[rows]

    def store(rows: slice, patch: torch.Tensor) -> None:
        changed = (base[rows] + patch).to(weight.dtype)
        weight[rows] = torch.where(mask[rows], changed, base[rows])

    return load, store


def _warn_of_unproved(unproved: int, rows: int, tol: float, max_iterations: int) -> None:
    if unproved:
        _log.warning(
            "decorate_exact: %d of %d rows ended without proof that their loss is within %g of the"
            " minimum; more damping or more than %d iterations would help",
            unproved,
            rows,
            tol,
            max_iterations,
        )


def as_losses(losses: torch.Tensor, iterations: int) -> Losses:
    """Float64 ``[3]`` and a count as the 0-d tensors that the op returns."""
    loss, undecorated, reverted = (value.clone() for value in losses)
    return loss, undecorated, reverted, torch.tensor(iterations, device=losses.device)
