"""Equation (6) of the design: from moments to the score vector, Gram and right-hand side.

    min over supp(P)=K of  |W1 X_t + b1 - (W0+P) X_p - b_out|²
                           + β' |W0 X_b + b0 - (W0+P) X_q - b_out|² + λ |D - P|²

The normal equations per row are ``A_KK p = B_K`` with ``A = G_p + β' G_q + λI``. The right-hand
side is written with the differences of the streams, which does not cancel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tailor_fast._core.extension import load_extension
from tailor_fast._core.transfer import panels
from tailor_fast.calibration.moments import Moments
from tailor_fast.ops.damping import damping_of

_PANEL = 2048  # rows of a matrix in the host's memory that are on the device at a time
_INNER_ELEMENTS = 1 << 20  # of an inner product that are in float64 at a time


@dataclass(frozen=True)
class Layer:
    """One linear layer as matrices: weights fp32 ``[rows, cols]``, biases fp32 ``[rows]``."""

    base: torch.Tensor
    tuned: torch.Tensor
    base_bias: torch.Tensor | None
    tuned_bias: torch.Tensor | None
    out_bias: torch.Tensor | None


@dataclass(frozen=True)
class System:
    """The undamped normal equations of one layer.

    Attributes:
        gram: ``G_p + β' G_q``, fp32 ``[cols, cols]``.
        rhs: ``B - λD``, fp32 ``[rows, cols]``; None stands for ``D @ gram``.
        damping: λ.
        target_energy: mean squared target, without ``λ|D|²``, a float64 scalar; None without rhs.
        retain_scale: β'; 0 without retention.
    """

    gram: torch.Tensor
    rhs: torch.Tensor | None
    damping: float
    target_energy: torch.Tensor | None
    retain_scale: float


def positive_damping(diag: torch.Tensor, percdamp: float) -> float:
    """λ of a Gram's diagonal; 1 where that is 0: for inputs that were never seen any λ serves."""
    return damping_of(diag, percdamp) or 1.0


def retain_scale(new: Moments, old: Moments, weight: float, damping: float) -> float:
    """β': ``weight`` in units of the new task's mean diagonal over the old tasks'."""
    old_mean = old.target_diag.double().mean().item()
    if old_mean <= 0.0:
        return 0.0
    return weight * (new.diag.double().mean().item() + damping) / old_mean


class Equations:
    """The normal equations of any rows that read one input; what the rows share is made once.

    Args:
        new: moments of (tuned model, patched model) on the new task.
        old: moments of (base model, patched model) on old tasks; None without retention.
        percdamp: λ as a share of the new task's mean diagonal.
        retain_weight: β.
        over_old: write ``gram`` into ``old.gram``, of which nothing else needs the words: one
            matrix less.

    Attributes:
        damping: λ.
        retain_scale: β'; 0 without retention.
        gram: ``G_p + β' G_q``, fp32 ``[cols, cols]``.
    """

    def __init__(
        self,
        new: Moments,
        old: Moments | None,
        percdamp: float,
        retain_weight: float,
        *,
        over_old: bool = False,
    ) -> None:
        self.damping = positive_damping(new.diag, percdamp)
        self.retain_scale = (
            0.0 if old is None else retain_scale(new, old, retain_weight, self.damping)
        )
        self._new, self._old = new, old if self.retain_scale > 0.0 else None
        self.gram = new.gram
        if self._old is not None:
            out = self._old.gram if over_old else torch.empty_like(new.gram)
            self.gram = torch.add(new.gram, self._old.gram, alpha=self.retain_scale, out=out)

    def system(self, layer: Layer) -> System:
        """Form the equations of some rows of a layer."""
        new, old, damping, scale = self._new, self._old, self.damping, self.retain_scale
        delta = layer.tuned - layer.base
        shift = bias_shift(layer.tuned_bias, layer.out_bias)
        if old is None and new.cross is None and shift is None:
            return System(self.gram, None, damping, None, 0.0)
        rhs, energy = answer_terms(layer.tuned, delta, shift, new)
        if old is not None:
            kept_shift = bias_shift(layer.base_bias, layer.out_bias)
            kept_rhs, kept_energy = answer_terms(layer.base, None, kept_shift, old)
            rhs.add_(kept_rhs, alpha=scale)
            energy = energy + scale * kept_energy
        return System(self.gram, rhs, damping, energy, scale)


def bias_shift(target: torch.Tensor | None, out: torch.Tensor | None) -> torch.Tensor | None:
    """``b_target - b_out``; None when it is zero."""
    if target is None or out is None or torch.equal(target, out):
        return None
    return target - out


def answer_terms(
    weight: torch.Tensor,
    delta: torch.Tensor | None,
    shift: torch.Tensor | None,
    m: Moments,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One data set's part of the system; the answer to fit is ``W δ + D x + s`` at input ``x``.

    Args:
        weight: ``W``, what answers in the target stream, ``[rows, cols]``.
        delta: ``D = W - W0``; None where the base model is the target, so that ``D = 0``.
        shift: ``s = b_target - b_out`` ``[rows]``; None when zero.
        m: moments of ``x`` and ``δ``.

    Returns:
        Mean of answer times ``xᵀ`` ``[rows, cols]``, and the mean squared answer summed over the
        rows (float64 scalar).
    """
    energy = torch.zeros((), dtype=torch.float64, device=m.gram.device)
    mean = torch.zeros(weight.shape[0], dtype=torch.float32, device=m.gram.device)
    if delta is None:
        rhs = torch.zeros_like(weight)
    else:
        rhs = _product(delta, m.gram)
        energy += _inner(rhs, delta)
        mean += delta @ m.mean
    if m.cross is not None and m.error_gram is not None and m.error_mean is not None:
        moved = _product(weight, m.cross)
        if delta is not None:
            energy += 2.0 * _inner(moved, delta)
        rhs += moved
        energy += quadratic(weight, m.error_gram)
        mean += weight @ m.error_mean
    if shift is not None:
        rhs.addr_(shift, m.mean)
        energy += 2.0 * _inner(mean, shift) + _inner(shift, shift)
    return rhs, energy


def _product(weight: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """``W M`` of a ``matrix`` that may lie in the host's memory: panel by panel."""
    if weight.device.type == "cpu":
        return _multiply(weight, matrix)
    out = torch.zeros_like(weight)
    for rows, panel in panels(matrix, _PANEL, weight.device):
        out.addmm_(weight[:, rows], panel)
    return out


def quadratic(weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """``<W G, W>`` of a symmetric ``gram``, which may lie in the host's memory: panel by panel."""
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for columns, panel in panels(gram, _PANEL, weight.device):
        total += _inner(_multiply(weight, panel.t()), weight[:, columns])
    return total


def _multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b``, on the CPU as the native ops multiply."""
    if a.device.type != "cpu" or isinstance(load_extension(), ImportError):
        return a @ b
    from tailor_fast.ops.gemm import product

    return product(a, b)


def _inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``<a, b>`` in float64, some rows at a time: the copies are twice the size of both."""
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    step = max(1, _INNER_ELEMENTS // max(1, a.shape[-1]))
    for mine, other in zip(a.split(step), b.split(step), strict=True):
        total += (mine.double() * other.double()).sum()
    return total
