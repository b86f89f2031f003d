"""λ, and what is tried when a damped Gram has no Cholesky factor."""

import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

_log = logging.getLogger("tailor_fast")

MAX_PERCDAMP = 0.1
_FIRST_PERCDAMP = 1e-3  # where the ladder goes on when the caller asked for less

Factor = TypeVar("Factor")
Factorize = Callable[[torch.Tensor, float, torch.dtype], Factor | None]


def damping_of(diagonal: torch.Tensor, percdamp: float) -> float:
    """λ: ``percdamp`` times the mean of a Gram's diagonal ``[cols]``; 0 where that is empty."""
    return percdamp * diagonal.double().mean().item() if diagonal.numel() else 0.0


def climb(
    where: str, gram: torch.Tensor, damping: float, factorize: Factorize[Factor]
) -> tuple[Factor, float] | None:
    """Return the first factor that succeeds, and its damping; None where none does.

    In float32, then float64, then with ten times the damping up to 0.1 of the mean diagonal; each
    step is logged.

    Args:
        where: what is factorised, first word of the messages.
        gram: undamped, float32 ``[cols, cols]``, finite.
        damping: λ to try first.
        factorize: (gram, λ, dtype) to a factor computed in that dtype, None where it fails.
    """
    unit = damping_of(gram.diagonal(), 1.0)
    for step, (dtype, value) in enumerate(_attempts(damping, unit)):
        share = value / unit if unit > 0.0 else value
        factor = factorize(gram, value, dtype)
        if factor is not None:
            if step > 0:
                _log.warning("%s: factorised in %s at percdamp %g", where, dtype, share)
            return factor, value
        _log.warning("%s: no Cholesky factor in %s at percdamp %g", where, dtype, share)
    return None


def _attempts(damping: float, unit: float) -> Iterator[tuple[torch.dtype, float]]:
    yield torch.float32, damping
    yield torch.float64, damping
    first, last = _FIRST_PERCDAMP * unit, MAX_PERCDAMP * unit
    while damping < last:
        damping = min(max(10 * damping, first), last)
        yield torch.float64, damping
