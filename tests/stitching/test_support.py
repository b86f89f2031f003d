"""Supports of several tasks, against ``select_patch`` of each."""

from __future__ import annotations

import pytest
import torch

from tailor_fast.ops.select import kept_count, select_patch, topk_mask
from tailor_fast.patching.recipe import Recipe
from tailor_fast.stitching.support import SupportSums, fused_scores

ROWS, COLS = 40, 300


def tensors(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(1))
    tuned = base + 0.1 * torch.randn(ROWS, COLS, generator=generator)
    return base, tuned, torch.rand(COLS, generator=generator) + 0.1


def mask_of(recipe: Recipe, base, tuned, weight) -> torch.Tensor:
    return select_patch(
        base,
        tuned,
        weight,
        sensitivity=recipe.sensitivity,
        density=recipe.density,
        salience_weight=1.0 if weight is None else recipe.salience_weight,
        normalize=recipe.normalize,
        scope=recipe.scope,
    )


RECIPES = [
    *(Recipe(normalize=n) for n in ("row_block", "row", "tensor", "none")),
    *(Recipe(sensitivity=s) for s in ("obs", "diag", "ratio", "weight")),
    Recipe(salience_weight=0.0),
    Recipe(salience_weight=1.0),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: str(sorted(r.model_fields_set)))
@pytest.mark.parametrize("weighted", [True, False])
def test_scores_rank_as_select_patch_does(recipe: Recipe, weighted: bool) -> None:
    base, tuned, weight = tensors(2)
    weight = weight if weighted else None
    scores = fused_scores(base, tuned, weight, recipe)
    expected = mask_of(recipe, base, tuned, weight)
    k = kept_count(base.numel(), recipe.density)
    differ = int((topk_mask(scores, k) != expected).sum())
    assert differ <= 2, "beyond one pair of scores that are equal up to rounding"


def test_equal_elements_score_zero() -> None:
    base = torch.randn(4, 130)
    scores = fused_scores(base, base, None, Recipe())
    assert torch.equal(scores, torch.zeros_like(base))


@pytest.mark.parametrize("scope", ["tensor", "row", "block"])
def test_union_is_the_tasks_own_masks(scope: str) -> None:
    recipe = Recipe(scope=scope, density=0.07)
    sums, expected = SupportSums(recipe, "union", "layer"), torch.zeros(ROWS, COLS).bool()
    for seed in (2, 3, 4):
        sums.add(*tensors(seed))
        expected |= mask_of(recipe, *tensors(seed))
    mask = sums.finish()
    assert torch.equal(mask, expected)
    assert kept_count(mask.numel(), 0.07) < int(mask.sum()) <= 3 * kept_count(mask.numel(), 0.07)


def test_best_keeps_the_density_and_the_best_of_any_task() -> None:
    recipe = Recipe(density=0.1)
    sums = SupportSums(recipe, "best", "layer")
    scores = []
    for seed in (2, 3):
        sums.add(*tensors(seed))
        scores.append(fused_scores(*tensors(seed), recipe))
    mask = sums.finish()
    best = torch.maximum(*scores)
    assert int(mask.sum()) == kept_count(mask.numel(), 0.1)
    assert best[mask].min() >= best[~mask].max()
    assert all(bool((mask & (score == best)).any()) for score in scores)


def test_a_patchs_own_support_joins_the_union() -> None:
    sums = SupportSums(Recipe(), "union", "layer")
    assert sums.finish() is None
    one, other = torch.zeros(2, 5, 5).bool()
    one[0, 0], other[1, 1] = True, True
    sums.add_mask(one)
    sums.add_mask(other)
    assert sums.finish().nonzero().tolist() == [[0, 0], [1, 1]]
