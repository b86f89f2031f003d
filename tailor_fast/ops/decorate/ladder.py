"""What ``decorate_obs`` does when the damped Gram does not factorise."""

import torch

from tailor_fast._core.checks import fail
from tailor_fast.ops import damping as _damping
from tailor_fast.ops.damping import MAX_PERCDAMP, Factor, Factorize, damping_of


def climb(
    gram: torch.Tensor, percdamp: float, factorize: Factorize[Factor]
) -> tuple[Factor, float]:
    """Return the first factor on the ladder of ``ops/damping.py`` that succeeds, and its damping.

    Args:
        gram: undamped, float32 ``[cols, cols]``.
        percdamp: first damping to try, as a share of the mean diagonal.
        factorize: (gram, damping, dtype) to a factor computed in that dtype, None where it fails.

    Raises:
        ValueError: not positive definite even then.
    """
    damping = damping_of(gram.diagonal(), percdamp)
    found = _damping.climb("decorate_obs", gram, damping, factorize)
    if found is None:
        fail(
            "decorate_obs",
            "gram",
            "positive definite with damping",
            f"a failed Cholesky factorisation at percdamp {max(percdamp, MAX_PERCDAMP):g}",
            "a mean of outer products is; was it accumulated and divided in full?",
        )
    return found
