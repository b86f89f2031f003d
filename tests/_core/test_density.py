"""``kept_count``: floor, decimal, exact."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailor_fast._core.density import kept_count


@pytest.mark.parametrize(
    ("elements", "density", "kept"),
    [
        (100, 0.29, 29),
        (100, 0.57, 57),
        (10, 0.1, 1),
        (9, 0.1, 0),
        (0, 0.5, 0),
        (7, 1, 7),
        (7, 0, 0),
        (10**6, 1e-05, 10),
        (6_738_415_616, 0.1, 673_841_561),
        (10**18 + 9, 0.1, 10**17),
    ],
)
def test_examples(elements: int, density: float, kept: int) -> None:
    assert kept_count(elements, density) == kept


@settings(max_examples=200)
@given(st.integers(0, 10**12), st.integers(0, 10**9))
def test_is_the_floor_of_the_decimal(elements: int, billionths: int) -> None:
    density = billionths / 10**9
    assert kept_count(elements, density) == Fraction(billionths, 10**9) * elements // 1


@pytest.mark.parametrize(
    ("elements", "density", "error", "message"),
    [
        (-1, 0.1, ValueError, r"^kept_count: elements must be an integer in \[0, inf\]; got -1$"),
        (1.0, 0.1, TypeError, r"^kept_count: elements must be an integer in \[0, inf\]; got float"),
        (1, 1.1, ValueError, r"^kept_count: density must be a number in \[0, 1\]; got 1.1$"),
        (
            1,
            float("nan"),
            ValueError,
            r"^kept_count: density must be a number in \[0, 1\]; got nan$",
        ),
        (1, "0.1", TypeError, r"^kept_count: density must be a number in \[0, 1\]; got str '0.1'$"),
    ],
)
def test_refuses(elements: int, density: float, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kept_count(elements, density)
