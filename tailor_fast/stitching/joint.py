"""The joint problem of several tasks on one layer.

    min over supp(P)=K of  Σ_t s_t |W_t X_t + b_t - (W0+P) X_t - b0|²
                           + β' |P X_b|² + λ |D̄ - P|²

with ``D_t = W_t - W0``, ``D̄ = Σ w_t D_t / Σ w_t`` and ``s_t`` the share of task t's weight, divided
by the mean diagonal of its Gram: inputs of one task that are ten times larger do not outvote
another. Equation (6) of the design is the case of one task. The normal equations per row are
``A_KK p = B_K`` with

    A = Σ s_t G_t + β' G_b + λI,    B = Σ s_t (D_t G_t + (b_t - b0) m_tᵀ) + λ D̄.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tailor_fast._core.errors import InputError
from tailor_fast.calibration.moments import Moments
from tailor_fast.patching.equations import System, answer_terms, bias_shift, positive_damping
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.refit import Exact


@dataclass(frozen=True)
class Answer:
    """How one task's model answers at a layer, fp32.

    Attributes:
        weight: ``W_t`` ``[rows, cols]``.
        bias: ``b_t`` ``[rows]``; None where the layer has none.
        moments: of the task's inputs.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    moments: Moments

    def error(self, weight: torch.Tensor, bias: torch.Tensor | None) -> float:
        """Mean squared distance, summed over the rows, to the answer of another layer."""
        shift = bias_shift(self.bias, bias)
        return float(answer_terms(self.weight, self.weight - weight, shift, self.moments)[1])


@dataclass(frozen=True)
class JointSystem:
    """The undamped normal equations of one layer, as ``decorate_exact`` takes them.

    Attributes:
        gram: ``A - λI``, fp32 ``[cols, cols]``.
        rhs: ``B - λ D̄``, fp32 ``[rows, cols]``.
        pull: ``D̄``, fp32 ``[rows, cols]``.
        damping: λ.
        target_energy: ``Σ s_t |D_t X_t + b_t - b0|²``, a float64 scalar.
        retain_scale: β'; 0 without old tasks.
    """

    gram: torch.Tensor
    rhs: torch.Tensor
    pull: torch.Tensor
    damping: float
    target_energy: torch.Tensor
    retain_scale: float

    def tiles(self, rows: int, recipe: Recipe) -> list[Exact]:
        """The problem as ``refit_mask`` takes it, ``rows`` rows at a time; each row is its own.

        The energy, which is known of all rows together, counts in the first tile.
        """
        none = torch.zeros_like(self.target_energy)
        found: list[Exact] = []
        for pull, rhs in zip(self.pull.split(rows), self.rhs.split(rows), strict=True):
            energy = none if found else self.target_energy
            system = System(self.gram, rhs, self.damping, energy, self.retain_scale)
            found.append(Exact(pull, system, recipe.tol, recipe.max_iterations))
        return found


class JointSums:
    """Adds the tasks up, one at a time: memory does not grow with their number.

    Args:
        base: ``W0`` fp32 ``[rows, cols]``.
        bias: ``b0`` fp32 ``[rows]``; None where the layer has none.
    """

    def __init__(self, base: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._base = base
        self._bias = bias
        self._rhs = torch.zeros_like(base)
        self._pull = torch.zeros_like(base)
        self._gram: torch.Tensor | None = None
        self._energy = torch.zeros((), dtype=torch.float64, device=base.device)
        self._weight = 0.0
        self._unit = 0.0

    def add(self, answer: Answer, weight: float) -> float:
        """Add a task; returns the error that the base model makes on it.

        Args:
            answer: what is to be answered, and on which inputs; some input is not zero.
            weight: ``w_t``, above 0.
        """
        delta = answer.weight - self._base
        shift = bias_shift(answer.bias, self._bias)
        rhs, energy = answer_terms(answer.weight, delta, shift, answer.moments)
        mean = answer.moments.diag.double().mean().item()
        # In units of the first task, so that a single one is solved just as it is without others.
        self._unit = self._unit or mean
        scale = weight * self._unit / mean
        self._rhs.add_(rhs, alpha=scale)
        self._pull.add_(delta, alpha=weight)
        self._energy += scale * energy
        self._weight += weight
        if self._gram is None:
            self._gram = answer.moments.gram * scale
        else:
            self._gram.add_(answer.moments.gram, alpha=scale)
        return float(energy)

    def finish(self, old: Moments | None, percdamp: float, retain_weight: float) -> JointSystem:
        """Turn the sums into means over the tasks' weights, in place, and add retention.

        Args:
            old: moments of the base model's inputs on old tasks; None without retention.
            percdamp: λ as a share of the tasks' mean diagonal.
            retain_weight: β, in units of the tasks' mean diagonal over the old tasks'.
        """
        if self._gram is None:
            raise RuntimeError("no task was added")
        for total in (self._gram, self._rhs, self._pull, self._energy):
            total.div_(self._weight)
        damping = positive_damping(self._gram.diagonal(), percdamp)
        mean = 0.0 if old is None else old.diag.double().mean().item()
        scale = 0.0
        if old is not None and mean > 0.0:
            scale = retain_weight * (self._gram.diagonal().double().mean().item() + damping) / mean
            self._gram.add_(old.gram, alpha=scale)
        return JointSystem(self._gram, self._rhs, self._pull, damping, self._energy, scale)


def require_grams(name: str, moments: object) -> Moments:
    """Return ``moments`` if they hold a whole Gram.

    Raises:
        InputError: they are of kind ``diag``.
    """
    if not isinstance(moments, Moments):
        raise InputError(
            f"{name}: its statistics are of kind 'diag'; expected whole Grams to solve with;"
            " calibrate with kind 'full'"
        )
    return moments
