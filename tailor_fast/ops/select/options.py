"""Options of the ``select`` op: their names, what a backend receives, and their checks."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch

from tailor_fast._core.checks import (
    FLOAT32,
    FLOATS,
    check_choice,
    check_range,
    check_tensor,
    fail,
)

Sensitivity = Literal["obs", "diag", "ratio", "weight"]
Normalize = Literal["row_block", "row", "tensor", "none"]
Scope = Literal["tensor", "block", "row"]
SENSITIVITIES: tuple[str, ...] = get_args(Sensitivity)
NORMALIZATIONS: tuple[str, ...] = get_args(Normalize)
SCOPES: tuple[str, ...] = get_args(Scope)

BLOCK = 128  # columns of a block: the authors' blocksize


class Scoring(NamedTuple):
    """How scores are computed, and what to call their tensor in an error.

    Attributes:
        sensitivity: one of ``SENSITIVITIES``.
        salience_weight: omega, in [0, 1].
        normalize: one of ``NORMALIZATIONS``.
        op: public function's name, first word of an error.
        name: tensor's name for errors, or None.
        first_index: linear index of the first element, for errors, where a chunk of rows is given.
        affine: float32 ``[terms, 2]`` (mean, factor) of a tensor-wide normalisation where only a
            chunk of rows is given; None computes it from the tensor.
    """

    sensitivity: str
    salience_weight: float
    normalize: str
    op: str = "select_patch"
    name: str | None = None
    first_index: int = 0
    affine: torch.Tensor | None = None

    def describe(self, what: str) -> str:
        """``what``, with the tensor's name where there is one."""
        return what if self.name is None else f"{what} of {self.name!r}"


def ranking_normalize(normalize: str, scope: str, salience_weight: float) -> str:
    """Return ``none`` where normalising one term cannot change the order within a unit of scope.

    A single term and a unit of scope inside one unit of normalisation: standardising is increasing,
    so it is left out, and with it a read of the tensor and two roundings.
    """
    inside = normalize == "tensor" or (normalize == "row" and scope == "row")
    return "none" if inside and salience_weight in (0, 1) else normalize


def check_options(op: str, sensitivity: str, salience_weight: float, normalize: str) -> None:
    """Check the options that decide a score."""
    check_choice(op, "sensitivity", sensitivity, SENSITIVITIES)
    check_range(op, "salience_weight", salience_weight, 0, 1)
    check_choice(op, "normalize", normalize, NORMALIZATIONS)


def check_pair(op: str, base: Any, tuned: Any, column_weight: Any, salience_weight: float) -> None:
    """Check the tensors that scores are computed from; values are the backends' business."""
    dims: dict[str, int] = {}
    check_tensor(op, "base", base, ("rows", "cols"), FLOATS, dims)
    check_tensor(op, "tuned", tuned, ("rows", "cols"), (base.dtype,), dims, like=base)
    if column_weight is not None:
        check_tensor(op, "column_weight", column_weight, ("cols",), FLOAT32, dims, like=base)
    elif salience_weight != 1:
        hint = "only salience_weight=1 needs no column_weight"
        fail(op, "column_weight", "float32 [cols]", "None", hint, error=TypeError)


def check_column_weight(column_weight: torch.Tensor | None, scoring: Scoring) -> None:
    """Check that the weights of the sensitivity, where it is used, are finite and not negative."""
    if column_weight is None or scoring.salience_weight == 1:
        return
    bad = ~((column_weight >= 0) & column_weight.isfinite())
    if bool(bad.any()):
        column = int(bad.nonzero()[0])
        got = f"{column_weight[column].item()} at column {column}"
        fail(scoring.op, scoring.describe("column_weight"), "finite and >= 0", got)


def check_column_weights(
    column_weights: Sequence[torch.Tensor], scorings: Sequence[Scoring]
) -> None:
    """``check_column_weight`` of several, which looks at all of them at once."""
    if not column_weights or scorings[0].salience_weight == 1:
        return
    distinct = {weight.data_ptr(): weight for weight in column_weights}
    together = torch.cat(list(distinct.values()))
    if not bool(((together >= 0) & together.isfinite()).all()):
        for weight, scoring in zip(column_weights, scorings, strict=True):
            check_column_weight(weight, scoring)
