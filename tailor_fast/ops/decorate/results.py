"""What the functions of the ``decorate`` op return.

The objective is the damped one, summed over rows: with ``D`` the delta, ``P`` the patch, ``G`` the
mean Gram and ``λ`` the damping,

- without a right-hand side ``tr((D - P) (G + λI) (D - P)^T)``;
- with ``rhs`` ``target_energy - 2 <P, rhs> + tr(P G P^T) + λ |D - P|^2``.
"""

from typing import NamedTuple

import torch


class Decorated(NamedTuple):
    """A decorated patch and how well it answers like the tuned layer.

    Attributes:
        patch: float32 ``[rows, cols]``, zero outside the mask.
        loss: objective at ``patch``; 0-d float64, as the next two.
        loss_undecorated: objective of the bare mask, ``P = D`` inside it.
        loss_reverted: objective of the base layer, ``P = 0``.
        iterations: conjugate gradient iterations of the slowest row; 0-d int64, 0 for a sweep.
    """

    patch: torch.Tensor
    loss: torch.Tensor
    loss_undecorated: torch.Tensor
    loss_reverted: torch.Tensor
    iterations: torch.Tensor


class DecorationLosses(NamedTuple):
    """The numbers of ``Decorated``, for the in-place forms: the patch is in the weight."""

    loss: torch.Tensor
    loss_undecorated: torch.Tensor
    loss_reverted: torch.Tensor
    iterations: torch.Tensor


class ObsFactor(NamedTuple):
    """What ``decorate_obs`` makes of a Gram, for all layers whose inputs it describes.

    Attributes:
        upper: R with ``R R^T = gram + damping I``, upper triangular, float32 ``[cols, cols]``; of
            the reference its inverse.
        inverses: diagonal blocks of ``R^-1``, float32 ``[ceil(cols / 128), 128, 128]``; of the
            reference zeros.
        damping: λ with which the Gram was factorised, 0-d float64; NaN where the Gram is 0: then
            there is no R, and no dropped weight costs anything.
        backend: that made it, and alone can take it.
    """

    upper: torch.Tensor
    inverses: torch.Tensor
    damping: torch.Tensor
    backend: str


class OfficialResult(NamedTuple):
    """What the authors' sweep gives.

    Attributes:
        weight: the new weight, dtype of the tuned one ``[rows, cols]``.
        mask: bool ``[rows, cols]``, True where the weight was kept. The authors' class returns
            ``weight != base`` in its place, which is less where a kept weight was never tuned.
        loss: the error that the authors' code prints; 0-d float64.
    """

    weight: torch.Tensor
    mask: torch.Tensor
    loss: torch.Tensor
