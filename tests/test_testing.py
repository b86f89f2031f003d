"""The tolerance rule itself: it must let through what it should, and nothing more."""

import pytest
import torch

from tailor_fast.testing import assert_within, tolerance

EXACT = torch.tensor([1.0, -8.0], dtype=torch.float64)


def test_tolerance_is_twice_plain_torch_and_one_rounding() -> None:
    plain = torch.tensor([1.0, -7.5])
    assert tolerance(EXACT, plain, torch.float32) == 2 * 0.5 + 8 * torch.finfo(torch.float32).eps
    assert tolerance(EXACT, plain, torch.bfloat16) == 2 * 0.5 + 8 * torch.finfo(torch.bfloat16).eps


def test_tolerance_of_nothing() -> None:
    empty = torch.zeros(0, dtype=torch.float64)
    assert tolerance(empty, empty, torch.float32) == 0.0
    assert_within(empty.float(), empty, empty.float())


def test_within() -> None:
    assert_within(torch.tensor([1.0, -7.0]), EXACT, torch.tensor([1.0, -7.5]))


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        (torch.tensor([1.0, -6.9]), "at flat index 1"),
        (torch.tensor([float("nan"), -8.0]), "error nan above .* at flat index 0"),
        (torch.tensor([float("inf"), -8.0]), "error inf above .* at flat index 0"),
        (torch.tensor([1.0]), r"shape \[1\], expected \[2\]"),
    ],
)
def test_beyond(actual: torch.Tensor, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_within(actual, EXACT, torch.tensor([1.0, -7.5]))


def test_exact_plain_torch_leaves_one_rounding() -> None:
    plain = EXACT.float()
    step = 8 * torch.finfo(torch.float32).eps
    assert_within(EXACT + step, EXACT, plain)
    with pytest.raises(AssertionError):
        assert_within(EXACT + 1.01 * step, EXACT, plain)
