"""The published merge rules on cases small enough to work out by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.quality import baselines


def _state(**values: Any) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


BASE = _state(a=[[1.0, 2.0], [3.0, 4.0]], b=[1.0, 1.0])
TUNED = _state(a=[[1.5, 2.0], [2.0, 4.25]], b=[5.0, 5.0])


def test_dare_keeps_or_reverts_and_rescales() -> None:
    base = {"a": torch.randn(200, 300)}
    tuned = {"a": base["a"] + torch.randn(200, 300)}
    merged = baselines.dare(base, tuned, ["a"], 0.1, seed=0)["a"]
    kept = merged != base["a"]
    assert abs(kept.double().mean().item() - 0.1) < 5 * (0.09 / 60_000) ** 0.5
    expected = base["a"] + (tuned["a"] - base["a"]) * (1 / 0.1)
    assert torch.equal(merged[kept], expected[kept])
    again = baselines.dare(base, tuned, ["a"], 0.1, seed=0)["a"]
    other = baselines.dare(base, tuned, ["a"], 0.1, seed=1)["a"]
    assert torch.equal(merged, again)
    assert not torch.equal(merged, other)


def test_dare_draws_anew_for_each_tensor() -> None:
    base = {"a": torch.zeros(1000), "b": torch.zeros(1000)}
    tuned = {"a": torch.ones(1000), "b": torch.ones(1000)}
    merged = baselines.dare(base, tuned, ["a", "b"], 0.5, seed=0)
    assert not torch.equal(merged["a"], merged["b"])


def test_dare_of_everything_is_the_tuned_tensor() -> None:
    merged = baselines.dare(BASE, TUNED, ["a"], 1.0, seed=0)
    assert torch.equal(merged["a"], TUNED["a"])
    assert merged["b"] is BASE["b"]


def test_magnitude_keeps_the_largest_changes() -> None:
    merged = baselines.magnitude(BASE, TUNED, ["a"], 0.5)
    assert merged["a"].tolist() == [[1.5, 2.0], [2.0, 4.0]]
    assert merged["b"] is BASE["b"]
    assert BASE["a"].tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_magnitude_reads_the_density_as_a_decimal() -> None:
    base, tuned = {"a": torch.zeros(100)}, {"a": torch.arange(1.0, 101.0)}
    merged = baselines.magnitude(base, tuned, ["a"], 0.29)
    assert merged["a"].count_nonzero() == 29  # int(0.29 * 100) is 28


def test_a_scale_lengthens_what_is_kept() -> None:
    merged = baselines.magnitude(BASE, TUNED, ["a"], 0.5, scale=2.0)
    assert merged["a"].tolist() == [[2.0, 2.0], [1.0, 4.0]]
    base, tuned = {"a": torch.zeros(400)}, {"a": torch.ones(400)}
    kept = baselines.dare(base, tuned, ["a"], 0.5, seed=0, scale=0.75)["a"]
    assert kept.unique().tolist() == [0.0, 1.5]


def test_ties_compares_all_tensors_with_each_other() -> None:
    merged = baselines.ties_trim(BASE, TUNED, ["a", "b"], 0.5)
    assert merged["a"].tolist() == [[1.0, 2.0], [2.0, 4.0]]
    assert merged["b"].tolist() == [5.0, 5.0]
    longer = baselines.ties_trim(BASE, TUNED, ["b", "a"], 0.34, scale=0.5)
    assert longer["b"].tolist() == [3.0, 3.0]
    assert torch.equal(longer["a"], BASE["a"])


def test_breadcrumbs_leave_out_the_largest() -> None:
    base, tuned = {"a": torch.zeros(2, 5)}, {"a": torch.arange(1.0, 11.0).view(2, 5)}
    merged = baselines.breadcrumbs(base, tuned, ["a"], 0.3, outliers=0.2, scale=1.0)["a"]
    assert merged.flatten().tolist() == [0, 0, 0, 0, 0, 6, 7, 8, 0, 0]
    merged = baselines.breadcrumbs(base, tuned, ["a"], 0.3, outliers=0.0, scale=2.0)["a"]
    assert merged.flatten().tolist() == [0, 0, 0, 0, 0, 0, 0, 16, 18, 20]


def test_della_keeps_large_changes_more_often_and_the_mean_unchanged() -> None:
    base = {"a": torch.zeros(4000, 11)}
    tuned = {"a": torch.arange(1.0, 12.0).flip(0).expand(4000, 11).clone()}
    merged = baselines.della(base, tuned, ["a"], 0.4, seed=0, window=0.2, scale=1.0)["a"]
    chance = torch.linspace(0.6, 0.2, 11)
    kept = (merged != 0).double().mean(0)
    assert torch.allclose(kept, chance.double(), atol=5 * 0.5 / 4000**0.5)
    values = torch.where(merged != 0, merged * chance, tuned["a"])
    assert torch.allclose(values, tuned["a"])
    half = baselines.della(base, tuned, ["a"], 0.4, seed=0, window=0.2, scale=0.5)["a"]
    assert torch.allclose(half, merged / 2)


def test_della_needs_a_window_below_the_density() -> None:
    message = r"della: window must be in \[0, 0.1\); got 0.1"
    with pytest.raises(ValueError, match=message):
        baselines.della(BASE, TUNED, ["a"], 0.1, seed=0, window=0.1, scale=1.0)


def test_lines_scales_by_depth() -> None:
    names = ("head.weight", "layers.0.up", "layers.1.up", "layers.2.up")
    base = {name: torch.zeros(1) for name in names}
    tuned = {name: torch.ones(1) for name in names}
    merged = baselines.lines(base, tuned, 0.2, blocks=3)
    assert [round(merged[name].item(), 6) for name in names] == [0.2, 0.2, 0.6, 1.0]


def test_the_best_of_each_row_are_kept() -> None:
    scores = {"a": torch.tensor([[4.0, 3.0], [1.0, 2.0]])}
    assert baselines.keep_best(BASE, TUNED, scores, 0.5)["a"].tolist() == [[1.5, 2.0], [3.0, 4.0]]
    rows = baselines.keep_best(BASE, TUNED, scores, 0.5, per_row=True)["a"]
    assert rows.tolist() == [[1.5, 2.0], [3.0, 4.25]]


def test_wise_ft_lies_between() -> None:
    at = [baselines.wise_ft(BASE, TUNED, alpha) for alpha in (0.0, 0.5, 1.0)]
    for name in BASE:
        assert torch.equal(at[0][name], BASE[name])
        assert torch.equal(at[1][name], (BASE[name] + TUNED[name]) / 2)
        assert torch.equal(at[2][name], TUNED[name])
    assert baselines.WISE_FT_GRID == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@pytest.mark.parametrize("density", [0, -0.1, 1.5, float("nan")])
@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("dare", lambda density: baselines.dare(BASE, TUNED, ["a"], density, seed=0)),
        ("magnitude", lambda density: baselines.magnitude(BASE, TUNED, ["a"], density)),
        ("ties_trim", lambda density: baselines.ties_trim(BASE, TUNED, ["a"], density)),
        (
            "breadcrumbs",
            lambda density: baselines.breadcrumbs(
                BASE, TUNED, ["a"], density, outliers=0.1, scale=1.0
            ),
        ),
        (
            "della",
            lambda density: baselines.della(
                BASE, TUNED, ["a"], density, seed=0, window=0.0, scale=1.0
            ),
        ),
    ],
)
def test_a_density_outside_its_range(
    name: str, rule: Callable[[float], object], density: float
) -> None:
    with pytest.raises(ValueError, match=rf"{name}: density must be in \(0, 1\]; got {density}"):
        rule(density)
