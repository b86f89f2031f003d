"""λ and the ladder of a failed factorisation."""

import logging

import pytest
import torch

from tailor_fast.ops.damping import climb, damping_of

GRAM = torch.diag(torch.tensor([1.0, 3.0]))  # mean diagonal 2


def test_damping_is_a_share_of_the_mean_diagonal() -> None:
    assert damping_of(GRAM.diagonal(), 0.1) == pytest.approx(0.2, rel=1e-15)
    assert damping_of(torch.zeros(3), 0.1) == 0.0
    assert damping_of(torch.zeros(0), 0.1) == 0.0
    large = torch.full((1 << 16,), 2.0**24 + 2)  # float32 sums of these round
    assert damping_of(large, 1.0) == 2.0**24 + 2


def steps(first: float, succeeds: int) -> tuple[list[tuple[torch.dtype, float]], float | None]:
    """What is tried until the attempt of that number succeeds, and the damping that is returned."""
    tried: list[tuple[torch.dtype, float]] = []

    def factorize(gram: torch.Tensor, damping: float, dtype: torch.dtype) -> str | None:
        assert gram is GRAM
        tried.append((dtype, damping))
        return "factor" if len(tried) == succeeds else None

    found = climb("layer", GRAM, first, factorize)
    return tried, None if found is None else found[1]


@pytest.mark.parametrize(
    ("first", "after"),
    [
        (0.0, [0.002, 0.02, 0.2]),  # from a thousandth of the mean diagonal to a tenth
        (0.00001, [0.002, 0.02, 0.2]),
        (0.02, [0.2]),
        (0.05, [0.2]),
        (0.2, []),
        (4.0, []),
    ],
)
def test_attempts(first: float, after: list[float]) -> None:
    tried, damping = steps(first, succeeds=0)
    assert damping is None
    wide = torch.float64
    expected = [(torch.float32, first), (wide, first), *((wide, value) for value in after)]
    assert [dtype for dtype, _ in tried] == [dtype for dtype, _ in expected]
    assert [value for _, value in tried] == pytest.approx([value for _, value in expected])


def test_every_step_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "tailor_fast"):
        assert steps(0.02, succeeds=1) == ([(torch.float32, 0.02)], 0.02)
        assert not caplog.records
        assert steps(0.02, succeeds=3)[1] == pytest.approx(0.2)
    assert [record.getMessage() for record in caplog.records] == [
        "layer: no Cholesky factor in torch.float32 at percdamp 0.01",
        "layer: no Cholesky factor in torch.float64 at percdamp 0.01",
        "layer: factorised in torch.float64 at percdamp 0.1",
    ]
