"""Factors of damped Grams: what is tried where the first attempt fails, and what is said then."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import pytest
import torch

from tailor_fast._core.errors import InputError
from tailor_fast._core.processes import Processes
from tailor_fast.calibration.moments import Moments
from tailor_fast.patching.scores import column_weight, factor_of
from tailor_fast.testing import assert_within

ONES = torch.ones(3, 3)  # the second pivot is exactly zero in every precision


def test_a_singular_gram_takes_more_damping_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "tailor_fast"):
        factor = factor_of(ONES, 1e-30, "model.q_proj")
    assert [record.getMessage() for record in caplog.records] == [
        "model.q_proj: no Cholesky factor in torch.float32 at percdamp 1e-30",
        "model.q_proj: no Cholesky factor in torch.float64 at percdamp 1e-30",
        "model.q_proj: factorised in torch.float64 at percdamp 0.001",
    ]
    assert factor.dtype == torch.float64
    damped = ONES.double() + 1e-3 * torch.eye(3).double()
    lower = factor.tril()  # what is above has no meaning
    assert_within(lower @ lower.T, damped, damped.float())


def test_an_indefinite_gram_is_refused_with_its_layer() -> None:
    with pytest.raises(InputError) as caught:
        factor_of(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 0.01, "model.q_proj")
    assert str(caught.value) == (
        "model.q_proj: its Gram is not positive definite with a damping of 0.1 of its mean"
        " diagonal; expected more calibration tokens, or a larger percdamp"
    )


def test_entries_that_are_not_finite_are_named_first(caplog: pytest.LogCaptureFixture) -> None:
    gram = torch.eye(3)
    gram[2, 1] = math.inf
    gram[1, 2] = math.inf
    with caplog.at_level(logging.WARNING, "tailor_fast"), pytest.raises(InputError) as caught:
        factor_of(gram, 0.01, "model.q_proj")
    assert not caplog.records
    assert str(caught.value) == (
        "model.q_proj: its Gram must be finite; got inf at [1, 2]. Hint: look for inputs of the"
        " layer that overflow its dtype"
    )


class OneOf(Processes):
    """A process whose others tell of a damping; what it adds to is kept as it was."""

    def __init__(self, rank: int, count: int, theirs: float = 0.0) -> None:
        super().__init__(rank, count)
        self.theirs = theirs
        self.told: list[float] = []
        self.part = torch.empty(0)

    def gather(self, *values: float) -> list[tuple[float, ...]]:
        self.told += values
        return [tuple(max(value, self.theirs) for value in values), values]

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        (self.part,) = (tensor.clone() for tensor in tensors)


def moments_of(cols: int) -> Moments:
    torch.manual_seed(cols)
    x = torch.randn(2 * cols, cols)
    gram = x.t() @ x / len(x)
    return Moments(gram, x.mean(0), gram.diagonal().clone(), None, None, None, len(x))


def inverse_of(gram: torch.Tensor, damping: float) -> torch.Tensor:
    damped = gram + damping * torch.eye(len(gram), dtype=gram.dtype)
    inverse: torch.Tensor = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return inverse.diagonal()


@pytest.mark.parametrize("cols", [1, 2, 7, 96])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_processes_share_the_columns_of_the_inverse(cols: int, count: int) -> None:
    new = moments_of(cols)
    damping = 0.01 * new.diag.double().mean().item()
    whole = torch.zeros(cols, dtype=torch.float64)
    for rank in range(count):
        process = OneOf(rank, count)
        column_weight("obs", new, None, 0.01, "model.q_proj", process)
        own = process.share(cols)
        assert not process.part[: own.start].any()
        assert not process.part[own.stop :].any()
        whole += process.part
    assert_within(whole, inverse_of(new.gram.double(), damping), inverse_of(new.gram, damping))
    alone = column_weight("obs", new, None, 0.01, "model.q_proj").double().reciprocal()
    assert_within(alone, inverse_of(new.gram.double(), damping), inverse_of(new.gram, damping))


def test_all_processes_take_the_damping_of_the_one_that_needs_most() -> None:
    new, process = moments_of(8), OneOf(1, 2, theirs=0.5)
    column_weight("obs", new, None, 0.01, "model.q_proj", process)
    assert process.told == [pytest.approx(0.01 * new.diag.mean().item()), 0.5]
    truth = inverse_of(new.gram.double(), 0.5)
    assert_within(process.part[4:], truth[4:], inverse_of(new.gram, 0.5)[4:])
