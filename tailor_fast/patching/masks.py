"""Which weights of a layer are kept, for scopes within a layer and for scopes that span layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from tailor_fast.models import Target
from tailor_fast.ops.select import TopKSelector, select_patch
from tailor_fast.patching.layers import LayerPair, Weights
from tailor_fast.patching.recipe import Recipe


class Masks:
    """Chooses the mask of each layer.

    Args:
        recipe: scope, sensitivity and the rest.
        units: unit of each layer for the scopes ``layer`` and ``global``; empty for the others.
    """

    def __init__(self, recipe: Recipe, units: Mapping[str, str]) -> None:
        self._recipe = recipe
        self._units = units
        self._weights: dict[str, torch.Tensor | None] = {}
        self._selectors: dict[str, TopKSelector] = {}

    @property
    def needs_scores_first(self) -> bool:
        """Whether every layer must be scored before the first mask is known."""
        return bool(self._units)

    def add(self, name: str, column_weight: torch.Tensor | None) -> None:
        """Keep a layer's score vector for the pass over all layers."""
        self._weights[name] = column_weight

    def observe_all(self, targets: Mapping[str, Target], weights: Weights) -> None:
        """Score every layer of every unit until each unit's threshold is exact."""
        recipe = self._recipe
        units: dict[str, list[str]] = {}  # names of their layers
        for name in self._weights:
            units.setdefault(self._units[name], []).append(name)
        for unit, names in units.items():  # one after the other: keys of one alone are held
            selector = self._selectors[unit] = TopKSelector(
                recipe.density,
                sensitivity=recipe.sensitivity,
                salience_weight=self._salience_weight,
                normalize=recipe.normalize,
            )
            finished = False
            while not finished:
                for name in names:
                    pair = weights.pair(targets[name])
                    selector.observe(name, pair.base, pair.tuned, self._weights[name])
                finished = selector.finish()

    def mask(self, name: str, pair: LayerPair, column_weight: torch.Tensor | None) -> torch.Tensor:
        """Return the bool mask ``[rows, cols]`` of the weights that are kept."""
        if self.needs_scores_first:
            selector = self._selectors[self._units[name]]
            return selector.mask(name, pair.base, pair.tuned, self._weights[name])
        return mask_within(self._recipe.of(name), pair.base, pair.tuned, column_weight, name)

    @property
    def _salience_weight(self) -> float:
        data_free = any(weight is None for weight in self._weights.values())
        return 1.0 if data_free else self._recipe.salience_weight


def mask_within(
    recipe: Recipe,
    base: torch.Tensor,
    tuned: torch.Tensor,
    column_weight: torch.Tensor | None,
    name: str,
) -> torch.Tensor:
    """The bool mask ``[rows, cols]`` of a recipe whose scope stays within one tensor.

    Args:
        recipe: density, score and scope.
        base: weight before fine-tuning ``[rows, cols]``.
        tuned: weight after it.
        column_weight: ``c`` of the sensitivity; None selects by salience alone.
        name: layer's name, for messages.
    """
    return select_patch(
        base,
        tuned,
        column_weight,
        sensitivity=recipe.sensitivity,
        density=recipe.density,
        salience_weight=1.0 if column_weight is None else recipe.salience_weight,
        normalize=recipe.normalize,
        scope=within_tensor(recipe),
        name=name,
    )


def within_tensor(recipe: Recipe) -> Literal["tensor", "block", "row"]:
    """The scope of a recipe that stays within one tensor."""
    if recipe.scope == "layer" or recipe.scope == "global":
        raise RuntimeError(f"scope {recipe.scope} has no units")
    return recipe.scope
