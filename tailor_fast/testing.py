"""What tests and benchmarks share: the one tolerance rule.

A kernel may be at most twice as far from the fp64 answer as plain torch in the same dtype is, plus
one rounding of that dtype at the size of the answer.
"""

import torch


def tolerance(expected: torch.Tensor, plain: torch.Tensor, dtype: torch.dtype) -> float:
    """Return the largest absolute error allowed.

    Args:
        expected: the answer in float64.
        plain: the same computed by plain torch in ``dtype`` (or its accumulation dtype).
        dtype: dtype whose rounding step counts.
    """
    if expected.numel() == 0:
        return 0.0
    error = (plain.double() - expected).abs().max().item()
    return 2.0 * error + torch.finfo(dtype).eps * expected.abs().max().item()


def assert_within(
    actual: torch.Tensor,
    expected: torch.Tensor,
    plain: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Raise ``AssertionError`` when ``actual`` is further from ``expected`` than the rule allows.

    Args:
        actual: what the code under test gave.
        expected: the answer in float64, of the same shape.
        plain: the same computed by plain torch in ``dtype``.
        dtype: dtype whose rounding step counts.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {list(actual.shape)}, expected {list(expected.shape)}")
    error = (actual.double() - expected).abs()
    limit = tolerance(expected, plain, dtype)
    if not bool((error <= limit).all()):
        worst = int(error.nan_to_num(nan=float("inf")).argmax())
        raise AssertionError(
            f"error {error.flatten()[worst].item():.3e} above {limit:.3e} at flat index {worst}"
        )
