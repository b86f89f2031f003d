"""The score vector ``c [cols]`` of each sensitivity, from the statistics of one input group."""

from __future__ import annotations

import logging

import torch

from tailor_fast._core.errors import InputError
from tailor_fast.calibration.moments import DiagonalMoments, Moments
from tailor_fast.patching.equations import damping_of

_log = logging.getLogger("tailor_fast")
_PANEL = 512  # columns of an inverse that are formed at a time


def column_weight(
    sensitivity: str,
    new: Moments | DiagonalMoments,
    old: Moments | DiagonalMoments | None,
    percdamp: float,
    where: str,
) -> torch.Tensor:
    """Return ``c``, fp32 ``[cols]`` (table in section 2 of the design).

    Args:
        sensitivity: ``obs``, ``diag``, ``ratio`` or ``weight``.
        new: moments of the new task; ``obs`` and ``weight`` need the whole Gram.
        old: moments of old tasks; needed by ``ratio``.
        percdamp: λ as a share of the mean diagonal.
        where: the group's name, for messages.

    Raises:
        InputError: the damped Gram cannot be factored.
        ValueError: the moments do not hold what the sensitivity needs.
    """
    if sensitivity == "diag":
        return new.diag.sqrt()
    damping = damping_of(new.diag, percdamp)
    if sensitivity == "ratio":
        if old is None:
            raise ValueError("column_weight: old must be given for sensitivity 'ratio'; got None")
        return ((new.diag + damping) / (old.diag + damping_of(old.diag, percdamp))).sqrt()
    if not isinstance(new, Moments):
        raise ValueError(
            f"column_weight: new must hold a Gram for sensitivity {sensitivity!r}; got its diagonal"
        )
    if sensitivity == "weight":
        # U = chol(H⁻¹, upper) has U_jj = 1 / R_jj with R = J chol(J H J) J: no inverse is formed.
        flipped = factor_of(new.gram.flip(0, 1), damping, where)
        diagonal: torch.Tensor = flipped.diagonal().flip(0)
        return diagonal.square().float()
    diagonal = inverse_diagonal(factor_of(new.gram, damping, where))
    return diagonal.reciprocal_().float()


def inverse_diagonal(factor: torch.Tensor) -> torch.Tensor:
    """Diagonal of ``(L Lᵀ)⁻¹`` for a lower factor ``L``, ``[cols]`` in its dtype."""
    cols = factor.shape[0]
    diagonal = factor.new_empty(cols)
    for start in range(0, cols, _PANEL):
        # These columns of L⁻¹ are zero above their panel: a third of the work of all of L⁻¹.
        panel = factor.new_zeros((cols - start, min(_PANEL, cols - start)))
        panel.diagonal().fill_(1)
        inverse = torch.linalg.solve_triangular(factor[start:, start:], panel, upper=False)
        diagonal[start : start + _PANEL] = inverse.square_().sum(0)
    return diagonal


def factor_of(gram: torch.Tensor, damping: float, where: str) -> torch.Tensor:
    """Lower factor of ``gram + λI``: in fp32, else in fp64, else with λ up to ten times larger.

    Raises:
        InputError: none of them can be factored.
    """
    for dtype, scale in ((torch.float32, 1.0), (torch.float64, 1.0), (torch.float64, 10.0)):
        damped = gram.to(dtype, copy=True)
        damped.diagonal().add_(damping * scale)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            factor: torch.Tensor = lower
            return factor
        _log.warning(
            "%s: Cholesky failed at column %d in %s with damping %.3e",
            where,
            int(info) - 1,
            str(dtype).removeprefix("torch."),
            damping * scale,
        )
    raise InputError(
        f"{where}: its Gram is not positive definite even with ten times the damping; expected more"
        " calibration tokens, or a larger percdamp"
    )
