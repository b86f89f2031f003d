"""What ``decorate_obs`` does when the damped Gram does not factorise."""

import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from tailor_fast._core.checks import fail
from tailor_fast.ops.decorate.values import damping_of

_log = logging.getLogger("tailor_fast")

_MAX_PERCDAMP = 0.1
_FIRST_PERCDAMP = 1e-3  # where the ladder starts when the caller asked for less

Factor = TypeVar("Factor")


def climb(
    gram: torch.Tensor,
    percdamp: float,
    factorize: Callable[[torch.Tensor, float, torch.dtype], Factor | None],
) -> tuple[Factor, float]:
    """Return the first factor that succeeds, and its damping.

    In float32, then float64, then with ten times the damping up to 0.1 of the mean diagonal; each
    step is logged.

    Args:
        gram: undamped, float32 ``[cols, cols]``.
        percdamp: first damping to try, as a share of the mean diagonal.
        factorize: (gram, damping, dtype) to a factor computed in that dtype, None where it fails.

    Raises:
        ValueError: not positive definite even then.
    """
    for dtype, share in _attempts(percdamp):
        damping = damping_of(gram, share)
        factor = factorize(gram, damping, dtype)
        if factor is not None:
            break
        _log.warning("decorate_obs: no Cholesky factor in %s at percdamp %g", dtype, share)
    else:
        fail(
            "decorate_obs",
            "gram",
            "positive definite with damping",
            f"a failed Cholesky factorisation at percdamp {share:g}",
            "a mean of outer products is; was it accumulated and divided in full?",
        )
    if (dtype, share) != (torch.float32, percdamp):
        _log.warning("decorate_obs: factorised in %s at percdamp %g", dtype, share)
    return factor, damping


def _attempts(percdamp: float) -> Iterator[tuple[torch.dtype, float]]:
    yield torch.float32, percdamp
    yield torch.float64, percdamp
    while percdamp < _MAX_PERCDAMP:
        percdamp = min(max(10 * percdamp, _FIRST_PERCDAMP), _MAX_PERCDAMP)
        yield torch.float64, percdamp
