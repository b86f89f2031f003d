"""A layer solved some rows at a time is the layer solved whole."""

from __future__ import annotations

import pytest
import torch

from tailor_fast.calibration.moments import Moments, MomentSums
from tailor_fast.models import Target
from tailor_fast.patching import Recipe, solving
from tailor_fast.patching.layers import LayerPair
from tailor_fast.patching.masks import Masks
from tailor_fast.patching.report import LinearReport
from tailor_fast.patching.solving import GroupInputs, solve_layer
from tailor_fast.testing import assert_within
from tests.backends import needs_native

ROWS, COLS, TOKENS = 37, 24, 256

pytestmark = needs_native  # whose rows do not depend on their neighbours, bit for bit


def whole_numbers(*shape: int, seed: int, most: int = 4) -> torch.Tensor:
    """Small ones, of which every sum of products is exact in float32, whatever its order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=generator).float()


def moments(seed: int, *, moved: bool) -> Moments:
    sums, x = MomentSums("layer"), whole_numbers(TOKENS, COLS, seed=seed)
    target = x + whole_numbers(TOKENS, COLS, seed=seed + 1, most=1) if moved else None
    sums.add(x, None, "batch", target)
    made = sums.finish()
    assert made is not None
    return made


def solved(
    at_once: int, monkeypatch: pytest.MonkeyPatch, *, moved: bool, retains: bool, biased: bool
) -> tuple[torch.Tensor, LinearReport, list[int]]:
    """The patched weight, its line of the report, and the rows of each exact solve."""
    monkeypatch.setitem(solving.SOLVED_AT_ONCE, "cpu", at_once)
    heights: list[int] = []
    original = solving.Exact.solve

    def solve(self: solving.Exact, mask: torch.Tensor):
        heights.append(len(mask))
        return original(self, mask)

    monkeypatch.setattr(solving.Exact, "solve", solve)
    base = whole_numbers(ROWS, COLS, seed=1)
    biases = (whole_numbers(ROWS, seed=2), whole_numbers(ROWS, seed=3)) if biased else (None, None)
    pair = LayerPair(base, base + whole_numbers(ROWS, COLS, seed=4), *biases)
    recipe = Recipe(density=0.3, salience_weight=1.0, refits=0, retain_weight=1.0)
    old = moments(20, moved=moved) if retains else None
    inputs = GroupInputs(("layer",), moments(10, moved=moved), old, None)
    target = Target("layer", transposed=False)
    weight, row = solve_layer(target, pair, inputs, Masks(recipe, {}), recipe)
    monkeypatch.undo()
    return weight, row, heights


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("retains", [False, True])
@pytest.mark.parametrize("moved", [False, True])
def test_rows_at_a_time(
    moved: bool, retains: bool, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = {"moved": moved, "retains": retains, "biased": biased}
    whole, row, heights = solved(1 << 20, monkeypatch, **kind)
    assert heights == [ROWS]
    for at_once, rows in ((1, 1), (5 * COLS + 3, 5), (20 * COLS, 20)):
        tiled, told, heights = solved(at_once, monkeypatch, **kind)
        assert torch.equal(tiled, whole)
        assert sum(heights) == ROWS
        assert max(heights) == rows
        assert (told.kept, told.iterations) == (row.kept, row.iterations)
        assert (told.damping, told.retain_scale) == (row.damping, row.retain_scale)
        ours, theirs = (
            torch.tensor([r.loss, r.loss_undecorated, r.loss_reverted], dtype=torch.float64)
            for r in (told, row)
        )
        assert_within(ours, theirs, theirs.float())


def test_layers_of_one_input_share_a_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ``obs``; each layer has the words and losses that it has alone."""
    recipe = Recipe(density=0.3, salience_weight=1.0, decorate="obs", propagate="none")
    names, shared = ("q", "k", "v"), moments(10, moved=False)
    together, made = GroupInputs(names, shared, None, None), []
    factor_obs = solving.factor_obs

    def factored(gram: torch.Tensor, *, percdamp: float):
        made.append(percdamp)
        return factor_obs(gram, percdamp=percdamp)

    monkeypatch.setattr(solving, "factor_obs", factored)
    solved_by = []
    for number, name in enumerate(names):
        base = whole_numbers(ROWS, COLS, seed=number)
        pair = LayerPair(base, base + whole_numbers(ROWS, COLS, seed=7 + number), None, None)
        target = Target(name, transposed=False)
        for inputs in (together, GroupInputs((name,), shared, None, None)):
            solved_by.append(solve_layer(target, pair, inputs, Masks(recipe, {}), recipe))
        (ours, row), (alone, expected) = solved_by[-2:]
        assert torch.equal(ours, alone)
        assert (row.loss, row.loss_reverted) == (expected.loss, expected.loss_reverted)
    assert len(made) == 1 + len(names)
    assert not torch.equal(solved_by[0][0], solved_by[2][0])
