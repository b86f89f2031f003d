"""How many elements a density keeps: one rule for the ops, the plan and the verification."""

from fractions import Fraction

from tailor_fast._core.checks import check_range


def kept_count(elements: int, density: float) -> int:
    """Return ``floor(density * elements)`` with the density read as the decimal that it prints as.

    ``int(0.29 * 100)`` is 28, because the nearest float64 lies below 0.29; this gives 29. Integer
    arithmetic throughout, so that it is exact for any number of elements.

    Args:
        elements: size of one unit of scope, >= 0.
        density: fraction kept, in [0, 1].

    Raises:
        TypeError: ``elements`` is not an integer or ``density`` not a number.
        ValueError: out of range.
    """
    check_range("kept_count", "elements", elements, 0, float("inf"), whole=True)
    check_range("kept_count", "density", density, 0, 1)
    return int(Fraction(repr(float(density))) * elements)
