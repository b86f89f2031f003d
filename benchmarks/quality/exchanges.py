"""One-swap refinement of a mask: a kept weight for a dropped one, while that lowers the loss.

A row's problem is ``p' A p - 2 b' p`` over patches on its mask. With ``K`` kept, the change of the
minimum by adding ``j`` and removing ``i`` is known for all pairs from the inverse of ``A_KK``: the
gain of adding is ``r_j² / s_j``, ``r`` the gradient's half and ``s_j`` the Schur complement of
``A_KK``; the cost of removing is ``p_i² / [A⁻¹]_ii`` on ``K`` with ``j`` (Hassibi and Stork,
Optimal Brain Surgeon, 1993). Both are exact, so that every exchange that is made pays.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tailor_fast.patching.refit import Exact

_LEAST = 1e-9  # of the row's explained energy: less than this is rounding


def exchanged_row(
    gram: torch.Tensor, wanted: torch.Tensor, kept: torch.Tensor, most: int
) -> torch.Tensor:
    """Return a row's mask after at most ``most`` best exchanges, bool ``[cols]``.

    Args:
        gram: ``A``, fp64 ``[cols, cols]``, positive definite.
        wanted: ``b``, fp64 ``[cols]``.
        kept: bool ``[cols]``.
        most: exchanges at most.
    """
    kept = kept.clone()
    for _ in range(most):
        inside, outside = kept.nonzero()[:, 0], (~kept).nonzero()[:, 0]
        if not len(inside) or not len(outside):
            break
        inverse = torch.linalg.inv(gram[inside][:, inside])
        patch = inverse @ wanted[inside]
        across = gram[inside][:, outside]
        moves = inverse @ across  # of the kept, as one of the dropped comes in
        schur = gram.diagonal()[outside] - (across * moves).sum(0)
        slope = wanted[outside] - across.t() @ patch
        gains = slope.square() / schur
        after = patch[:, None] - moves * (slope / schur)
        costs = after.square() / (inverse.diagonal()[:, None] + moves.square() / schur)
        cost, leaves = costs.min(0)
        comes = int((gains - cost).argmax())
        if (gains - cost)[comes] <= _LEAST * (wanted[inside] @ patch):
            break
        kept[outside[comes]], kept[inside[leaves[comes]]] = True, False
    return kept


def refined(refit: Callable[..., torch.Tensor], most: int) -> Callable[..., torch.Tensor]:
    """Let a mask's choice be followed by exchanges, at most ``most`` in each row.

    Args:
        refit: ``tailor_fast.patching.refit.refit_mask``.
        most: exchanges in a row at most.
    """

    def refit_and_exchange(
        mask: torch.Tensor, tiles: Sequence[Exact], *others: Any
    ) -> torch.Tensor:
        chosen = refit(mask, tiles, *others).clone()
        row = 0
        for tile in tiles:
            gram, wanted = _problem(tile)
            for one in wanted:
                chosen[row] = exchanged_row(gram, one, chosen[row], most)
                row += 1
        return chosen

    return refit_and_exchange


def _problem(tile: Exact) -> tuple[torch.Tensor, torch.Tensor]:
    """``A`` ``[cols, cols]`` and ``b`` ``[rows, cols]`` of a tile, fp64, damped."""
    system, delta = tile.system, tile.delta.double()
    plain = system.gram.double()
    gram = plain + float(system.damping) * torch.eye(len(plain), dtype=torch.float64)
    if system.rhs is None:
        return gram, delta @ gram
    return gram, system.rhs.double() + float(system.damping) * delta
