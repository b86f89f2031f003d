"""Equation (6) of the design: from moments to the score vector, Gram and right-hand side.

    min over supp(P)=K of  |W1 X_t + b1 - (W0+P) X_p - b_out|²
                           + β' |W0 X_b + b0 - (W0+P) X_q - b_out|² + λ |D - P|²

The normal equations per row are ``A_KK p = B_K`` with ``A = G_p + β' G_q + λI``. The right-hand
side is written with the differences of the streams, which does not cancel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tailor_fast.calibration.moments import Moments


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


def damping_of(diag: torch.Tensor, percdamp: float) -> float:
    """λ: ``percdamp`` times the mean of a Gram's diagonal; 1 for zeros, where any λ serves."""
    value = percdamp * diag.double().mean().item()
    return value if value > 0.0 else 1.0


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

    Attributes:
        damping: λ.
        retain_scale: β'; 0 without retention.
        gram: ``G_p + β' G_q``, fp32 ``[cols, cols]``.
    """

    def __init__(
        self, new: Moments, old: Moments | None, percdamp: float, retain_weight: float
    ) -> None:
        self.damping = damping_of(new.diag, percdamp)
        self.retain_scale = (
            0.0 if old is None else retain_scale(new, old, retain_weight, self.damping)
        )
        self._new, self._old = new, old if self.retain_scale > 0.0 else None
        self.gram = new.gram
        if self._old is not None:
            self.gram = torch.add(new.gram, self._old.gram, alpha=self.retain_scale)

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


def build_system(
    layer: Layer, new: Moments, old: Moments | None, percdamp: float, retain_weight: float
) -> System:
    """Form the normal equations of one layer; the arguments are those of ``Equations``."""
    return Equations(new, old, percdamp, retain_weight).system(layer)


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
        rhs = delta @ m.gram
        energy += _inner(rhs, delta)
        mean += delta @ m.mean
    if m.cross is not None and m.error_gram is not None and m.error_mean is not None:
        moved = weight @ m.cross
        if delta is not None:
            energy += 2.0 * _inner(moved, delta)
        rhs += moved
        energy += _inner(weight @ m.error_gram, weight)
        mean += weight @ m.error_mean
    if shift is not None:
        rhs.addr_(shift, m.mean)
        energy += 2.0 * _inner(mean, shift) + _inner(shift, shift)
    return rhs, energy


def _inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.double() * b.double()).sum()
