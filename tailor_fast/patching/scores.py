"""The score vector ``c [cols]`` of each sensitivity, from the statistics of one input group."""

from __future__ import annotations

import torch

from tailor_fast._core.errors import InputError
from tailor_fast._core.processes import ALONE, Processes
from tailor_fast.calibration.moments import DiagonalMoments, Moments
from tailor_fast.ops.damping import MAX_PERCDAMP, climb
from tailor_fast.patching.equations import positive_damping

_PANEL = 512  # columns of an inverse that are formed at a time, at most
_PANELS = 4  # of each process, at least: the last ones even the work out


def column_weight(
    sensitivity: str,
    new: Moments | DiagonalMoments,
    old: Moments | DiagonalMoments | None,
    percdamp: float,
    where: str,
    processes: Processes = ALONE,
) -> torch.Tensor:
    """Return ``c``, fp32 ``[cols]`` (table in section 2 of the design).

    Args:
        sensitivity: ``obs``, ``diag``, ``ratio`` or ``weight``.
        new: moments of the new task; ``obs`` and ``weight`` need the whole Gram.
        old: moments of old tasks; needed by ``ratio``.
        percdamp: λ as a share of the mean diagonal.
        where: the group's name, for messages.
        processes: share the columns of the inverse that ``obs`` needs.

    Returns:
        The vector, bit-equal in all processes, whatever their machines: the masks hang on it.

    Raises:
        InputError: the damped Gram cannot be factored.
        ValueError: the moments do not hold what the sensitivity needs.
    """
    if sensitivity == "obs" and isinstance(new, Moments):
        factor = factor_of(new.gram, positive_damping(new.diag, percdamp), where)
        return inverse_diagonal(factor, processes).reciprocal_().float()
    weight = _own_weight(sensitivity, new, old, percdamp, where)
    with processes.exchange():
        processes.gather()
        processes.broadcast(weight)
    return weight


def _own_weight(
    sensitivity: str,
    new: Moments | DiagonalMoments,
    old: Moments | DiagonalMoments | None,
    percdamp: float,
    where: str,
) -> torch.Tensor:
    """What costs too little to share."""
    if sensitivity == "diag":
        return new.diag.sqrt()
    damping = positive_damping(new.diag, percdamp)
    if sensitivity == "ratio":
        if old is None:
            raise ValueError("column_weight: old must be given for sensitivity 'ratio'; got None")
        return ((new.diag + damping) / (old.diag + positive_damping(old.diag, percdamp))).sqrt()
    if not isinstance(new, Moments):
        raise ValueError(
            f"column_weight: new must hold a Gram for sensitivity {sensitivity!r}; got its diagonal"
        )
    # U = chol(H⁻¹, upper) has U_jj = 1 / R_jj with R = J chol(J H J) J: no inverse is formed.
    flipped = factor_of(new.gram.flip(0, 1), damping, where)
    diagonal: torch.Tensor = flipped.diagonal().flip(0)
    return diagonal.square().float()


def inverse_diagonal(factor: torch.Tensor, processes: Processes = ALONE) -> torch.Tensor:
    """Diagonal of ``(L Lᵀ)⁻¹`` for a lower factor ``L``, ``[cols]`` in its dtype.

    Several processes take some of the columns each, and all get the same words, in fp64: one
    machine may have needed it for its factor where another has not.
    """
    cols, count = factor.shape[0], processes.count
    diagonal = factor.new_zeros(cols)
    width = _PANEL if count == 1 else max(1, min(_PANEL, cols // (_PANELS * count)))
    for number, start in enumerate(range(0, cols, width)):
        # 0 1 1 0 0 1 1 0: the later a panel, the less work it is.
        turn = number % (2 * count)
        if min(turn, 2 * count - 1 - turn) != processes.rank:
            continue
        # These columns of L⁻¹ are zero above their panel: a third of the work of all of L⁻¹.
        panel = factor.new_zeros((cols - start, min(width, cols - start)))
        panel.diagonal().fill_(1)
        inverse = torch.linalg.solve_triangular(factor[start:, start:], panel, upper=False)
        diagonal[start : start + width] = inverse.square_().sum(0)
    if count == 1:
        return diagonal
    whole = diagonal.double()
    with processes.exchange():
        processes.gather()
        processes.add([whole])
    return whole


def factor_of(gram: torch.Tensor, damping: float, where: str) -> torch.Tensor:
    """Lower factor of ``gram + λI``, float32 or float64; where that fails see ``climb``.

    Raises:
        InputError: the Gram is not finite, or no damping that is tried gives a factor.
    """
    if not bool(gram.sum(dtype=torch.float64).isfinite()):
        row, column = gram.isfinite().logical_not_().nonzero()[0].tolist()
        raise InputError(
            f"{where}: its Gram must be finite; got {gram[row, column].item()} at"
            f" [{row}, {column}]. Hint: look for inputs of the layer that overflow its dtype"
        )
    found = climb(where, gram, damping, _cholesky)
    if found is None:
        raise InputError(
            f"{where}: its Gram is not positive definite with a damping of {MAX_PERCDAMP:g} of its"
            " mean diagonal; expected more calibration tokens, or a larger percdamp"
        )
    return found[0]


def _cholesky(gram: torch.Tensor, damping: float, dtype: torch.dtype) -> torch.Tensor | None:
    damped = gram.to(dtype, copy=True)
    damped.diagonal().add_(damping)
    lower, info = torch.linalg.cholesky_ex(damped)
    factor: torch.Tensor = lower
    return factor if int(info) == 0 else None
