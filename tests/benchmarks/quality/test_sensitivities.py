"""What data says about single weights, on a model small enough to differentiate by hand."""

import pytest
import torch
from torch import nn

from benchmarks.quality import sensitivities
from benchmarks.quality.families import FAMILIES, Family
from benchmarks.quality.tinyllava import Batch

NAMES = ["out.weight"]


class Logits:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


class Mini(nn.Module):
    """Answers one word by a linear map of four pixels."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.out = nn.Linear(4, 3, bias=False)

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor, **_: object) -> Logits:
        return Logits(self.out(pixel_values)[:, None])


@pytest.fixture
def family() -> Family:
    return FAMILIES["llava"]


@pytest.fixture
def batch() -> Batch:
    torch.manual_seed(7)
    return Batch(
        torch.randn(6, 4), torch.zeros(6, 1, dtype=torch.int64), torch.arange(6)[:, None] % 3
    )


def test_norms_are_those_of_the_input_columns(family: Family, batch: Batch) -> None:
    norms = sensitivities.input_norms(Mini(0), family, batch, NAMES)
    assert torch.allclose(norms["out.weight"], batch.pixel_values.norm(dim=0))


def test_fisher_is_the_mean_squared_gradient_of_single_answers(
    family: Family, batch: Batch
) -> None:
    model = Mini(0).requires_grad_(False)
    found = sensitivities.fisher(model, family, batch, NAMES)["out.weight"]
    expected = torch.zeros(3, 4)
    for x, answer in zip(batch.pixel_values, batch.answer_ids[:, 0], strict=True):
        error = torch.softmax(model.out.weight @ x, 0) - nn.functional.one_hot(answer, 3)
        expected += torch.outer(error, x).square() / 6
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-7)
    assert not model.out.weight.requires_grad


def test_grafting_starts_from_the_largest_deltas_and_follows_the_loss(
    family: Family, batch: Batch
) -> None:
    base, tuned = Mini(0), Mini(1)
    states = base.state_dict(), tuned.state_dict()

    def graft(rate: float, steps: int) -> torch.Tensor:
        return sensitivities.graft(
            tuned, family, batch, states, NAMES, density=0.25, rate=rate, steps=steps
        )["out.weight"]

    start = graft(0.0, 1)
    delta = (states[1]["out.weight"] - states[0]["out.weight"]).abs().flatten()
    assert sorted(start.flatten().topk(3).indices.tolist()) == sorted(
        delta.topk(3).indices.tolist()
    )

    def loss(mask: torch.Tensor) -> float:
        weight = torch.lerp(states[0]["out.weight"], states[1]["out.weight"], mask)
        logits = batch.pixel_values @ weight.T
        return nn.functional.cross_entropy(logits, batch.answer_ids[:, 0]).item()

    learned = graft(2e4, 40)
    assert learned.min() >= 0
    assert learned.max() <= 1
    assert loss(learned) < loss(start) - 0.01
