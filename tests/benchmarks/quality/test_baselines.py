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
    expected = base["a"] + (tuned["a"] - base["a"]) / 0.1
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
    ],
)
def test_a_density_outside_its_range(
    name: str, rule: Callable[[float], object], density: float
) -> None:
    with pytest.raises(ValueError, match=rf"{name}: density must be in \(0, 1\]; got {density}"):
        rule(density)
