"""Which weights the joint patch may change: the union of the tasks' own masks, or the best of all.

Scores of several tasks are comparable because each is standardised within its own task.
"""

from __future__ import annotations

from typing import Literal

import torch

from tailor_fast.ops.select import kept_count, topk_mask
from tailor_fast.patching.masks import mask_within
from tailor_fast.patching.recipe import Recipe

Support = Literal["union", "best"]
_BLOCK = 128  # columns over which `row_block` standardises
_SMALLEST_STD = 2.0**-126


class SupportSums:
    """Gathers the support of one layer, task by task.

    Args:
        recipe: density, score and scope.
        support: ``union`` keeps what any task would keep by itself, each at the recipe's density;
            ``best`` keeps the elements with the best score in any task, all at that density.
        name: layer's name, for messages.
    """

    def __init__(self, recipe: Recipe, support: Support, name: str) -> None:
        self._recipe = recipe
        self._support = support
        self._name = name
        self._mask: torch.Tensor | None = None
        self._scores: torch.Tensor | None = None

    def add(
        self, base: torch.Tensor, tuned: torch.Tensor, column_weight: torch.Tensor | None
    ) -> None:
        """Add what is best for a task.

        Args:
            base: weight before fine-tuning ``[rows, cols]``.
            tuned: the task's weight.
            column_weight: ``c`` of its sensitivity; None scores by salience alone.
        """
        if self._support == "best":
            scores = fused_scores(base, tuned, column_weight, self._recipe)
            self._scores = scores if self._scores is None else torch.maximum(self._scores, scores)
            return
        self.add_mask(mask_within(self._recipe, base, tuned, column_weight, self._name))

    def add_mask(self, mask: torch.Tensor) -> None:
        """Add elements ``[rows, cols]`` to the union."""
        self._mask = mask if self._mask is None else self._mask | mask

    def finish(self) -> torch.Tensor | None:
        """Return the bool mask ``[rows, cols]``; None when nothing was added."""
        if self._scores is not None:
            return topk_mask(self._scores, kept_count(self._scores.numel(), self._recipe.density))
        return self._mask


def fused_scores(
    base: torch.Tensor, tuned: torch.Tensor, column_weight: torch.Tensor | None, recipe: Recipe
) -> torch.Tensor:
    """Scores ``ω z(|D|) + (1-ω) z(v)``, fp32 ``[rows, cols]``, as ``select_patch`` ranks by them.

    ``select_patch`` never makes them a tensor; here they must be compared between tasks. The two
    agree up to rounding.

    Args:
        base: weight before fine-tuning ``[rows, cols]``.
        tuned: weight after it.
        column_weight: ``c`` of the sensitivity; None scores by salience alone.
        recipe: which score.
    """
    tuned = tuned.float()
    delta = tuned - base.float()
    salience = delta.abs()
    weight = 1.0 if column_weight is None else recipe.salience_weight
    scores = weight * _standardised(salience, recipe.normalize)
    if column_weight is None or weight == 1.0:
        return scores
    if recipe.sensitivity in ("diag", "ratio"):
        sensitive = salience
    else:
        sensitive = (delta if recipe.sensitivity == "obs" else tuned).square()
    return scores.add_(
        _standardised(sensitive * column_weight, recipe.normalize), alpha=1.0 - weight
    )


def _standardised(x: torch.Tensor, normalize: str) -> torch.Tensor:
    """Zero mean and unit deviation within each unit; zeros where all elements are equal."""
    if normalize == "none":
        return x
    if normalize == "row_block":
        parts = [_standardised(part, "row") for part in x.split(_BLOCK, dim=1)]
        return torch.cat(parts, dim=1)
    rows = x if normalize == "row" else x.reshape(1, -1)
    std, mean = torch.std_mean(rows.double(), dim=1, keepdim=True)
    factor = torch.where(std >= _SMALLEST_STD, 1.0 / std, 0.0)  # a NaN of one element too
    return ((rows - mean) * factor).float().view_as(x)
