"""What both backends of ``decorate_official`` say when something is not as it should be."""

import logging

import torch

_log = logging.getLogger("tailor_fast")

LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # no stub


def warn_of_undefined(scores: int) -> None:
    """Log how many scores were not a number, if any."""
    if scores:
        _log.warning(
            "decorate_official: %d scores are not a number (rows without any delta in a block, or a"
            " block of one column); the weights are kept, as in the authors' code",
            scores,
        )


def no_factor(error: RuntimeError | str, percdamp: float) -> RuntimeError:
    """The error of a damped Gram that does not factorise, in the house's words."""
    return LinAlgError(
        f"decorate_official: gram must be positive definite at percdamp {percdamp:g}; got"
        f" {error}. Hint: a larger percdamp, or decorate_exact"
    )
