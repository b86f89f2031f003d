"""The score vector ``c [cols]`` of each sensitivity, from the statistics of one input group."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from tailor_fast._core.errors import InputError
from tailor_fast._core.extension import load_extension
from tailor_fast._core.processes import ALONE, Processes
from tailor_fast.calibration.moments import DiagonalMoments, Moments
from tailor_fast.ops.damping import MAX_PERCDAMP, climb
from tailor_fast.patching.equations import positive_damping

_PANEL = 512  # columns of an inverse that are formed at a time, at most
_PANELS = 4  # of the columns of one process of several: half of a panel's square is zeros


class Factor(NamedTuple):
    """``L`` with ``L Lᵀ = gram + λI``.

    Attributes:
        lower: L ``[cols, cols]``, float32 or float64; what stands above its diagonal has no
            meaning.
        inverses: diagonal blocks of ``L⁻¹`` (``ops.roots``); empty where L was not made by blocks.
    """

    lower: torch.Tensor
    inverses: Sequence[torch.Tensor] = ()

    def inverse_diagonal_(self, first: int = 0) -> torch.Tensor:
        """Diagonal of ``(L Lᵀ)⁻¹`` from column ``first`` on, in L's dtype; L may be overwritten."""
        if self.inverses:
            from tailor_fast.ops.roots import inverse_diagonal_

            return inverse_diagonal_(self.lower, self.inverses, first)
        size = len(self.lower) - first
        return inverse_diagonal(self.lower, first, max(1, min(_PANEL, size // _PANELS)))


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
        damping = positive_damping(new.diag, percdamp)
        if processes.count == 1:
            factor, _ = _damped_factor(new.gram, damping, where)
            diagonal = factor.inverse_diagonal_()
        else:
            diagonal = _shared_diagonal(new.gram, damping, where, processes)
        return diagonal.reciprocal_().float()
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


def inverse_diagonal(factor: torch.Tensor, first: int = 0, width: int = _PANEL) -> torch.Tensor:
    """Diagonal of ``(L Lᵀ)⁻¹`` for a lower factor ``L`` ``[cols, cols]``, in its dtype.

    Args:
        factor: ``L``; only what is below and right of ``first`` is read.
        first: the column to begin with.
        width: how many columns of ``L⁻¹`` are formed at a time.

    Returns:
        The diagonal from ``first`` on, ``[cols - first]``.
    """
    cols = factor.shape[0]
    diagonal = factor.new_zeros(cols - first)
    for start in range(first, cols, width):
        # These columns of L⁻¹ are zero above their panel: a third of the work of all of L⁻¹.
        panel = factor.new_zeros((cols - start, min(width, cols - start)))
        panel.diagonal().fill_(1)
        inverse = torch.linalg.solve_triangular(factor[start:, start:], panel, upper=False)
        begin = start - first
        diagonal[begin : begin + width] = inverse.square_().sum(0)
    return diagonal


def _shared_diagonal(
    gram: torch.Tensor, damping: float, where: str, processes: Processes
) -> torch.Tensor:
    """Diagonal of ``(gram + λI)⁻¹``, float64 ``[cols]``, the same words in all processes.

    Each process turns its own columns to the end. Their part of the inverse needs only the last
    square of that order's factor: of two processes, each forms an eighth of what it would of the
    whole, and not a half.
    """
    cols = gram.shape[0]
    own = processes.share(cols)
    size = own.stop - own.start
    while True:
        factor, used = _damped_factor(gram, damping, where, turn=own.stop)
        with processes.exchange():
            told = [value for (value,) in processes.gather(used)]
        damping = max(told)
        if damping == min(told):
            break
        del factor  # an order of the columns may need more damping than another: all take the most
    whole = torch.zeros(cols, dtype=torch.float64, device=gram.device)
    whole[own] = factor.inverse_diagonal_(cols - size).double()
    del factor
    with processes.exchange():
        processes.gather()
        processes.add([whole])
    return whole


def factor_of(gram: torch.Tensor, damping: float, where: str) -> torch.Tensor:
    """Lower factor of ``gram + λI``, float32 or float64; where that fails see ``climb``.

    What stands above its diagonal has no meaning.

    Raises:
        InputError: the Gram is not finite, or no damping that is tried gives a factor.
    """
    return _damped_factor(gram, damping, where)[0].lower


def _damped_factor(
    gram: torch.Tensor, damping: float, where: str, turn: int = 0
) -> tuple[Factor, float]:
    """``factor_of`` with the first ``turn`` columns moved behind the others, and the λ it took."""
    # A sum is quick to form, and finite only where all entries are.
    if not bool(gram.sum().isfinite()) and not bool((finite := gram.isfinite()).all()):
        row, column = finite.logical_not_().nonzero()[0].tolist()
        raise InputError(
            f"{where}: its Gram must be finite; got {gram[row, column].item()} at"
            f" [{row}, {column}]. Hint: look for inputs of the layer that overflow its dtype"
        )
    found = climb(where, gram, damping, partial(_cholesky, turn=turn))
    if found is None:
        raise InputError(
            f"{where}: its Gram is not positive definite with a damping of {MAX_PERCDAMP:g} of its"
            " mean diagonal; expected more calibration tokens, or a larger percdamp"
        )
    return found


def _cholesky(gram: torch.Tensor, damping: float, dtype: torch.dtype, turn: int) -> Factor | None:
    damped = torch.empty_like(gram, dtype=dtype)
    rest = gram.shape[0] - turn  # turned in one copy: ``roll`` would make one for each dimension
    for rows, old_rows in ((slice(rest), slice(turn, None)), (slice(rest, None), slice(turn))):
        damped[rows, :rest] = gram[old_rows, turn:]
        damped[rows, rest:] = gram[old_rows, :turn]
    damped.diagonal().add_(damping)
    if _by_blocks(gram.device):
        from tailor_fast.ops.roots import factorize_

        inverses = factorize_(damped, forward=True)
        return None if inverses is None else Factor(damped, inverses)
    lower, info = torch.linalg.cholesky_ex(damped)
    return Factor(lower) if int(info) == 0 else None


def _by_blocks(device: torch.device) -> bool:
    """Whether the extension's products make a factor faster than torch's library does."""
    if device.type != "cpu" or isinstance(load_extension(), ImportError):
        return False
    from tailor_fast.ops.gemm import has_kernels

    return has_kernels()
