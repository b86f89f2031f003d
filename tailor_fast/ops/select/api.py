"""Public functions of the ``select`` op: checks, then one dispatch line each."""

from collections.abc import Sequence

import torch

from tailor_fast._core.backend import Backend
from tailor_fast._core.checks import FLOATS, check_choice, check_range, check_tensor, fail
from tailor_fast.ops.select import schema as _schema  # noqa: F401  registers the ops
from tailor_fast.ops.select.options import (
    SCOPES,
    Normalize,
    Scope,
    Sensitivity,
    check_options,
    check_pair,
)

_OPS = torch.ops.tailor_fast
WIDE_SCOPES = ("layer", "global")


def topk_mask(scores: torch.Tensor, k: int, *, backend: Backend = "auto") -> torch.Tensor:
    """Return the mask of the ``k`` largest scores.

    Exactly ``k`` elements are True. Ties go to the lowest linear index, -0 equals +0, infinities
    are ordinary scores. The answer depends on nothing but ``scores`` and ``k``. Sizes and counts
    are 64-bit throughout.

    Args:
        scores: float32/bfloat16/float16 of any shape, contiguous.
        k: how many to keep, from 0 to the number of scores.
        backend: see ``tailor_fast.backends()``.

    Returns:
        bool, shape of ``scores``.

    Raises:
        TypeError: ``scores`` is no float tensor or ``k`` no integer.
        ValueError: ``k`` out of range, a wrong stride, an input that requires grad, or a NaN, named
            by its linear index.
    """
    op = "topk_mask"
    check_tensor(op, "scores", scores, None, FLOATS)
    check_range(op, "k", k, 0, scores.numel(), whole=True)
    mask: torch.Tensor = _OPS.topk_mask(scores, k, backend)
    return mask


def select_patch(
    base: torch.Tensor,
    tuned: torch.Tensor,
    column_weight: torch.Tensor | None = None,
    *,
    sensitivity: Sensitivity = "obs",
    density: float = 0.1,
    salience_weight: float = 0.5,
    normalize: Normalize = "row_block",
    scope: Scope = "tensor",
    name: str | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Return the mask of the weights whose fine-tuned value is worth keeping.

    With ``D = tuned - base`` a weight's score is ``omega z(|D|) + (1 - omega) z(v)``; the best
    ``floor(density * n)`` of each unit of scope are True, ties to the lowest linear index. The mask
    is the same, bit for bit, on every backend and device and for any number of threads; the
    arithmetic is written down in the ``reference`` package. No scores of a whole tensor are sorted.

    Source: Zhu et al., "Model Tailor", arXiv 2402.12048; ``weight`` is what the authors' code
    computes.

    Args:
        base: weights before fine-tuning, float32/bfloat16/float16 ``[rows, cols]`` (out, in).
        tuned: fine-tuned weights, same shape and dtype.
        column_weight: the vector ``c``, float32 ``[cols]``, finite and >= 0. None only with
            ``salience_weight=1``, which does not read it.
        sensitivity: what ``v`` is: ``obs`` ``D^2 c`` with ``c = 1 / diag(H^-1)``; ``diag``
            ``|D| c`` with ``c = sqrt(diag G)``; ``ratio`` ``|D| c`` with the root of the ratio of
            the damped diagonals on new and old data; ``weight`` ``tuned^2 c`` with
            ``c = 1 / diag(U)^2``, U the upper Cholesky factor of ``H^-1``.
        density: fraction kept, in [0, 1], read as the decimal that it prints as.
        salience_weight: omega in [0, 1].
        normalize: unit of the z-score (mean and unbiased standard deviation): ``row_block``, each
            row within 128 columns; ``row``; ``tensor``; ``none`` leaves ``|D|`` and ``v`` as they
            are. Equal elements have z = 0. Where it cannot change the order within a unit of scope
            (one term, a unit of scope inside one of normalisation) it is left out.
        scope: what competes for the places: ``tensor``, ``block`` (128 columns, all rows; the last
            one may be narrower) or ``row``.
        name: tensor's name for error messages.
        backend: see ``tailor_fast.backends()``.

    Returns:
        bool ``[rows, cols]``.

    Raises:
        TypeError: not a tensor, another dtype, or ``column_weight`` missing.
        ValueError: wrong shape, device or stride, an input that requires grad, an option out of
            range, or NaN or infinity in the scores (a delta that overflows included), with ``name``
            and the first linear index.
    """
    op = "select_patch"
    _check_recipe(op, sensitivity, density, salience_weight, normalize, scope)
    check_pair(op, base, tuned, column_weight, salience_weight)
    mask: torch.Tensor = _OPS.select_patch(
        base,
        tuned,
        column_weight,
        sensitivity,
        density,
        salience_weight,
        normalize,
        scope,
        name,
        backend,
    )
    return mask


def select_patches(
    bases: Sequence[torch.Tensor],
    tuneds: Sequence[torch.Tensor],
    column_weights: Sequence[torch.Tensor] | None = None,
    *,
    sensitivity: Sensitivity = "obs",
    density: float = 0.1,
    salience_weight: float = 0.5,
    normalize: Normalize = "row_block",
    scope: Scope = "tensor",
    names: Sequence[str] | None = None,
    backend: Backend = "auto",
) -> list[torch.Tensor]:
    """Return the masks of several pairs: ``select_patch`` of each, bit for bit.

    On a GPU the pairs share their launches and the host waits once, where a call per tensor costs
    more time than the tensor. Units of scope stay within their tensors.

    Args:
        bases: weights before fine-tuning, each float32/bfloat16/float16 ``[rows, cols]``, all on
            one device.
        tuneds: as many fine-tuned weights, each of its base's shape and dtype.
        column_weights: one vector ``c`` for each, float32 ``[cols]``. None only with
            ``salience_weight=1``, which does not read it.
        sensitivity: as in ``select_patch``, like the other options.
        density: fraction kept.
        salience_weight: omega in [0, 1].
        normalize: unit of the z-score.
        scope: what competes for the places.
        names: tensors' names for error messages.
        backend: see ``tailor_fast.backends()``.

    Returns:
        A bool mask ``[rows, cols]`` for each.

    Raises:
        TypeError: as ``select_patch``.
        ValueError: as ``select_patch``, or sequences of different lengths.
    """
    op = "select_patches"
    _check_recipe(op, sensitivity, density, salience_weight, normalize, scope)
    count = len(bases)
    for name, given in (("tuneds", tuneds), ("column_weights", column_weights), ("names", names)):
        if given is not None and len(given) != count:
            fail(op, name, f"{count} like bases", f"{len(given)}")
    weights = [None] * count if column_weights is None else column_weights
    for base, tuned, weight in zip(bases, tuneds, weights, strict=True):
        check_pair(op, base, tuned, weight, salience_weight)
        if base.device != bases[0].device:
            fail(op, "bases", f"all on {bases[0].device}", f"one on {base.device}")
    if count == 0:  # torch finds an op's device by its tensors
        return []
    options = sensitivity, density, salience_weight, normalize, scope, names, backend
    masks: list[torch.Tensor] = _OPS.select_patches(
        list(bases), list(tuneds), list(column_weights or []), *options
    )
    return masks


def _check_recipe(
    op: str, sensitivity: str, density: float, salience_weight: float, normalize: str, scope: str
) -> None:
    check_options(op, sensitivity, salience_weight, normalize)
    check_range(op, "density", density, 0, 1)
    if scope in WIDE_SCOPES:
        hint = "TopKSelector finds one k over several tensors"
        fail(op, "scope", f"one of {', '.join(SCOPES)}", repr(scope), hint)
    check_choice(op, "scope", scope, SCOPES)
