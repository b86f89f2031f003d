"""One layer from statistics to the weight that is written: score, mask, decorate, round."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, Protocol

import torch

from tailor_fast.models import Target
from tailor_fast.ops.decorate import Decorated, decorate_exact, decorate_obs, decorate_official
from tailor_fast.ops.select import TopKSelector, select_patch
from tailor_fast.patching.equations import Layer, System, build_system
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.report import LinearReport
from tailor_fast.patching.statistics import Moments


@dataclass(frozen=True)
class LayerPair:
    """A layer's tensors in both models, in the models' dtype; weights ``[rows, cols]``."""

    base: torch.Tensor
    tuned: torch.Tensor
    base_bias: torch.Tensor | None
    tuned_bias: torch.Tensor | None


class Weights(Protocol):
    """Where the engine takes layers from and puts patched weights."""

    def pair(self, target: Target) -> LayerPair:
        """Return the layer's tensors in the base and the tuned model."""

    def install(self, target: Target, weight: torch.Tensor) -> None:
        """Take the patched weight ``[rows, cols]``: the patched model runs with it from now on."""

    def preview(self, target: Target) -> None:
        """Let the patched model run with the tuned weight until ``install`` is called."""


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
        open_units = {self._units[name] for name in self._weights}
        for unit in sorted(open_units):
            self._selectors[unit] = TopKSelector(
                recipe.density,
                sensitivity=recipe.sensitivity,
                salience_weight=self._salience_weight,
                normalize=recipe.normalize,
            )
        while open_units:
            for name, column_weight in self._weights.items():
                if self._units[name] in open_units:
                    pair = weights.pair(targets[name])
                    selector = self._selectors[self._units[name]]
                    selector.observe(name, pair.base, pair.tuned, column_weight)
            open_units = {unit for unit in open_units if not self._selectors[unit].finish()}

    def mask(self, name: str, pair: LayerPair, column_weight: torch.Tensor | None) -> torch.Tensor:
        """Return the bool mask ``[rows, cols]`` of the weights that are kept."""
        if self.needs_scores_first:
            selector = self._selectors[self._units[name]]
            return selector.mask(name, pair.base, pair.tuned, self._weights[name])
        recipe = self._recipe
        return select_patch(
            pair.base,
            pair.tuned,
            column_weight,
            sensitivity=recipe.sensitivity,
            density=recipe.density,
            salience_weight=1.0 if column_weight is None else recipe.salience_weight,
            normalize=recipe.normalize,
            scope=_within_tensor(recipe),
            name=name,
        )

    @property
    def _salience_weight(self) -> float:
        data_free = any(weight is None for weight in self._weights.values())
        return 1.0 if data_free else self._recipe.salience_weight


def _within_tensor(recipe: Recipe) -> Literal["tensor", "block", "row"]:
    if recipe.scope == "layer" or recipe.scope == "global":  # noqa: PLR1714  narrows the type
        raise RuntimeError(f"scope {recipe.scope} has no units")
    return recipe.scope


@dataclass(frozen=True)
class GroupInputs:
    """What is known about a group's inputs when its layers are solved."""

    members: tuple[str, ...]
    new: Moments | None
    old: Moments | None
    column_weight: torch.Tensor | None


def solve_layer(
    target: Target, pair: LayerPair, inputs: GroupInputs, masks: Masks, recipe: Recipe
) -> tuple[torch.Tensor, LinearReport]:
    """Return the patched weight ``[rows, cols]`` in the models' dtype, and what was done."""
    start = time.perf_counter()
    rows, cols = pair.base.shape
    report = LinearReport(target.name, rows, cols, kept=0, group=inputs.members)
    if recipe.decorate == "official" and inputs.new is not None:
        weight, mask, decorated = _official(pair, inputs.new, recipe)
        report.loss = float(decorated)
    else:
        mask = masks.mask(target.name, pair, inputs.column_weight)
        patch, result, system = _decorate(pair, mask, inputs, recipe)
        weight = write_patch(pair.base, patch, mask)
        _record(report, result, system)
    report.kept = int(mask.sum())
    report.tokens = 0 if inputs.new is None else inputs.new.tokens
    report.seconds = time.perf_counter() - start
    return weight, report


def write_patch(base: torch.Tensor, patch: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``base + patch`` on the mask, rounded to ``base``'s dtype; ``base`` bit for bit elsewhere."""
    return torch.where(mask, (base.float() + patch).to(base.dtype), base)


def _decorate(
    pair: LayerPair, mask: torch.Tensor, inputs: GroupInputs, recipe: Recipe
) -> tuple[torch.Tensor, Decorated | None, System | None]:
    base, tuned = pair.base.float(), pair.tuned.float()
    delta = tuned - base
    if inputs.new is None or recipe.decorate == "none":
        return torch.where(mask, delta, torch.zeros_like(delta)), None, None
    if recipe.decorate == "obs":
        result = decorate_obs(delta, mask, inputs.new.gram, percdamp=recipe.percdamp)
        return result.patch, result, None
    biases = [None if b is None else b.float() for b in (pair.base_bias, pair.tuned_bias)]
    out_bias = biases[0] if recipe.untouched == "base" else biases[1]
    layer = Layer(base, tuned, biases[0], biases[1], out_bias)
    system = build_system(layer, inputs.new, inputs.old, recipe.percdamp, recipe.retain_weight)
    result = decorate_exact(
        delta,
        mask,
        system.gram,
        system.rhs,
        damping=system.damping,
        target_energy=None if system.rhs is None else system.target_energy,
        tol=recipe.tol,
        max_iterations=recipe.max_iterations,
    )
    return result.patch, result, system


def _official(
    pair: LayerPair, new: Moments, recipe: Recipe
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    result = decorate_official(
        pair.base,
        pair.tuned,
        new.gram,
        sparsity=float(1 - Fraction(repr(recipe.density))),
        score_weights=(recipe.salience_weight, 1.0 - recipe.salience_weight),
        percdamp=recipe.percdamp,
    )
    return result.weight, result.mask, result.loss


def _record(report: LinearReport, result: Decorated | None, system: System | None) -> None:
    if result is None:
        return
    report.loss = float(result.loss)
    report.loss_undecorated = float(result.loss_undecorated)
    report.loss_reverted = float(result.loss_reverted)
    report.iterations = int(result.iterations)
    if system is not None:
        report.damping = system.damping
        report.retain_scale = system.retain_scale


def left_at_base(target: Target, pair: LayerPair, note: str) -> LinearReport:
    """The report of a layer for which nothing is known, so that nothing is kept."""
    rows, cols = pair.base.shape
    return replace(LinearReport(target.name, rows, cols, kept=0), note=note)
