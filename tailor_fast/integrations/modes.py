"""What ``SparseGPT`` does in the modes that the authors' class does not have."""

from __future__ import annotations

import logging
from decimal import Decimal
from typing import NamedTuple

import torch

from tailor_fast._core.backend import Backend
from tailor_fast.calibration.moments import Moments
from tailor_fast.ops.decorate import decorate_exact, decorate_obs
from tailor_fast.ops.select import select_patch
from tailor_fast.ops.select.options import BLOCK
from tailor_fast.patching.scores import column_weight

_log = logging.getLogger("tailor_fast")


class Task(NamedTuple):
    """One layer.

    Attributes:
        base: base weight ``[rows, cols]``.
        tuned: tuned weight, same shape and dtype.
        hessian: the authors' H, float32 ``[cols, cols]``.
        percdamp: λ as a share of the mean diagonal.
        backend: of the ops.
    """

    base: torch.Tensor
    tuned: torch.Tensor
    hessian: torch.Tensor
    percdamp: float
    backend: Backend

    def column_weight(self) -> torch.Tensor:
        """The paper's ``1 / [H⁻¹]_jj``, float32 ``[cols]``."""
        mean = torch.zeros_like(self.hessian[0])  # no score needs it
        moments = Moments(self.hessian, mean, self.hessian.diagonal(), None, None, None, 0)
        return column_weight("obs", moments, None, self.percdamp, "SparseGPT")


def keep_by_score(task: Task, sparsity: float, weights: tuple[float, float]) -> torch.Tensor:
    """Keep the best scores of each block of 128 columns; bool ``[rows, cols]``."""
    delta = task.tuned != task.base
    flat = sum(int((~block).all(1).sum()) for block in delta.split(BLOCK, dim=1))
    if flat:
        _log.warning(
            "SparseGPT: %d rows were not tuned within a block: their scores count as average, where"
            " the authors' class keeps such rows whole",
            flat,
        )
    return select_patch(
        task.base,
        task.tuned,
        task.column_weight(),
        density=float(1 - Decimal(repr(sparsity))),  # 1 - 0.9 is not 0.1 in binary
        salience_weight=weights[0] / sum(weights),
        scope="block",
        backend=task.backend,
    )


def keep_by_pattern(task: Task, reverted: int, group: int) -> torch.Tensor:
    """Keep all but the ``reverted`` least sensitive of each ``group`` columns of a row.

    Raises:
        ValueError: ``reverted`` is not below ``group``.
    """
    if not 0 < reverted < group:
        raise ValueError(
            f"SparseGPT: prunen must be between 0 and prunem; got {reverted} of {group}"
        )
    delta = task.tuned.float() - task.base.float()
    sensitivity = delta.square_().mul_(task.column_weight())
    rows, cols = sensitivity.shape
    # A last group that is narrower is filled up with columns that come first in nobody's order.
    padded = torch.nn.functional.pad(sensitivity, (0, -cols % group), value=torch.inf)
    lowest = padded.view(rows, -1, group).topk(reverted, dim=2, largest=False).indices
    keep = torch.ones_like(padded, dtype=torch.bool).view(rows, -1, group)
    return keep.scatter_(2, lowest, False).view(rows, -1)[:, :cols].contiguous()


def decorate(task: Task, keep: torch.Tensor, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Decorate what is kept, by ``"obs"`` or ``"exact"``.

    Returns:
        The weight in its dtype, bit-equal to ``base`` outside ``keep``, and the damped objective.
    """
    method = decorate_exact if mode == "exact" else decorate_obs
    base = task.base.float()
    delta = task.tuned.float() - base
    found = method(delta, keep, task.hessian, percdamp=task.percdamp, backend=task.backend)
    patched = (base + found.patch).to(task.base.dtype)
    return torch.where(keep, patched, task.base), found.loss
