"""Factors of damped Grams: what is tried where the first attempt fails, and what is said then."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from tailor_fast._core.errors import InputError
from tailor_fast.patching.scores import factor_of
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
    assert_within(factor @ factor.T, damped, damped.float())


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
