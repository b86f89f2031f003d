"""How the backends walk over a layer: tiles of rows in, tiles of the patch out, one set of losses.

Rows are independent in ``exact`` and ``obs``, so the memory beside the result does not grow with
their number, and the in-place forms run the same code on the same tiles.
"""

import logging
from collections.abc import Callable, Iterator

import torch

_log = logging.getLogger("tailor_fast")

Load = Callable[[slice], torch.Tensor]
Store = Callable[[slice, torch.Tensor], None]
Losses = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


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


def warn_of_unproved(unproved: int, rows: int, tol: float, max_iterations: int) -> None:
    """Log how many rows of ``decorate_exact`` ended without proof, if any."""
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
