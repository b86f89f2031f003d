"""The ``select`` op in C++, on CPU tensors: one pass over the pair in the common case.

A sample gives two cuts, in the order by score and then by linear index, that should lie on both
sides of the threshold, however many scores equal it; one pass marks what is before the first and
collects the little between them; counts prove the cuts, or an exact search follows. Units smaller
than a cache are held and counted instead. The bits are those of the reference.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from tailor_fast import _C
from tailor_fast._core.checks import fail
from tailor_fast._core.density import kept_count
from tailor_fast.ops.select.options import BLOCK, Scoring
from tailor_fast.ops.select.radix import KeyInterval

# The numbers of csrc/select: Dtype, Terms, Normalize.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SCORES, _SALIENCE, _BOTH, _SENSITIVITY = 0, 1, 2, 5
_SENSITIVITIES = {"obs": 0, "diag": 1, "ratio": 1, "weight": 2}
_NORMALIZE = {"none": 0, "tensor": 1, "row": 2, "row_block": 3}

_Pair = tuple[int, int, int, int, int, int, int, float, int, int]
_Fault = tuple[int, float] | None


class Tuning(NamedTuple):
    """What tests turn; the mask does not depend on it.

    Attributes:
        stream_from: elements of a unit from which it is streamed instead of held.
        budget_part: candidates may be this part of the elements of a unit.
        bracket: score and linear index of two cuts between which the threshold is said to lie,
            instead of the estimated ones: before a cut are the larger scores, and the equal ones
            of lower indices.
    """

    stream_from: int = 1 << 20
    budget_part: int = 16
    bracket: tuple[float, int, float, int] | None = None


_DEFAULTS = Tuning()


class Work(NamedTuple):
    """What a selection took: passes over the data, and candidates held in the last ones."""

    passes: int
    candidates: int


def _describe(
    base: torch.Tensor,
    tuned: torch.Tensor,
    column_weight: torch.Tensor | None,
    scoring: Scoring,
) -> _Pair:
    """Addresses and numbers of a pair; the tensors must outlive their use."""
    salience_weight = float(scoring.salience_weight)
    terms, weight = _SALIENCE, 0
    if column_weight is not None and salience_weight != 1:
        terms = _BOTH if salience_weight > 0 else _SENSITIVITY
        terms += _SENSITIVITIES[scoring.sensitivity]
        weight = column_weight.data_ptr()
    return (
        base.data_ptr(),
        tuned.data_ptr(),
        weight,
        base.shape[0],
        base.shape[1],
        _DTYPES[base.dtype],
        terms,
        salience_weight,
        _NORMALIZE[scoring.normalize],
        0 if scoring.affine is None else scoring.affine.data_ptr(),
    )


def _require_finite(fault: _Fault, scoring: Scoring) -> None:
    if fault is None:
        return
    index, value = fault
    hint = "look there for NaN or infinity in base and tuned, or for overflow of their delta"
    got = f"{value} at linear index {scoring.first_index + index}"
    fail(scoring.op, scoring.describe("scores"), "finite", got, hint)


def topk_mask(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Mask of the k best scores; see the public function."""
    mask, fault, _ = _topk_mask(scores, k, _DEFAULTS)
    if fault is not None:
        fail("topk_mask", "scores", "free of NaN", f"nan at linear index {fault[0]}")
    return mask


def select_patch(
    base: torch.Tensor,
    tuned: torch.Tensor,
    column_weight: torch.Tensor | None,
    scoring: Scoring,
    scope: str,
    density: float,
) -> torch.Tensor:
    """Mask of the best scores in each unit of scope; see the public function."""
    mask, fault, _ = _select_patch(base, tuned, column_weight, scoring, scope, density, _DEFAULTS)
    _require_finite(fault, scoring)
    return mask


def select_patches(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]],
    scorings: Sequence[Scoring],
    scope: str,
    density: float,
) -> list[torch.Tensor]:
    """``select_patch`` of each pair: a call costs nothing beside its tensor."""
    return [
        select_patch(*pair, scoring, scope, density)
        for pair, scoring in zip(pairs, scorings, strict=True)
    ]


def _topk_mask(scores: torch.Tensor, k: int, tuning: Tuning) -> tuple[torch.Tensor, _Fault, Work]:
    size, address = scores.numel(), scores.data_ptr()
    pair = (address, address, 0, 1, size, _DTYPES[scores.dtype], _SCORES, 1.0, 0, 0)
    mask = torch.empty(scores.shape, dtype=torch.bool)
    return _run(pair, mask, (1, size), (k, k), tuning)


def _select_patch(
    base: torch.Tensor,
    tuned: torch.Tensor,
    column_weight: torch.Tensor | None,
    scoring: Scoring,
    scope: str,
    density: float,
    tuning: Tuning,
) -> tuple[torch.Tensor, _Fault, Work]:
    rows, cols = base.shape
    unit = {"tensor": (rows, cols), "block": (rows, BLOCK), "row": (1, cols)}[scope]
    k = kept_count(unit[0] * unit[1], density)
    last = kept_count(rows * ((cols - 1) % BLOCK + 1), density) if scope == "block" else k
    mask = torch.empty((rows, cols), dtype=torch.bool)
    pair = _describe(base, tuned, column_weight, scoring)
    return _run(pair, mask, unit, (k, last), tuning)


def _run(
    pair: _Pair, mask: torch.Tensor, unit: tuple[int, int], k: tuple[int, int], tuning: Tuning
) -> tuple[torch.Tensor, _Fault, Work]:
    """Select in every unit of scope, of which the last one has its own k."""
    if mask.numel() == 0:
        return mask, None, Work(0, 0)
    fault, passes, candidates = _C.select_mask(
        pair,
        *unit,
        *k,
        mask.data_ptr(),
        torch.get_num_threads(),
        tuning.stream_from,
        tuning.budget_part,
        tuning.bracket,
    )
    return mask, fault, Work(passes, candidates)


def score_pair(
    base: torch.Tensor,
    tuned: torch.Tensor,
    column_weight: torch.Tensor | None,
    scoring: Scoring,
) -> torch.Tensor:
    """All scores of a pair, float32 ``[rows, cols]``: the bits that the masks rank by."""
    scores = torch.empty(base.shape)
    pair = _describe(base, tuned, column_weight, scoring)
    fault = _C.select_scores(pair, scores.data_ptr(), torch.get_num_threads())
    _require_finite(fault, scoring)
    return scores


def tensor_affine(
    base: torch.Tensor,
    tuned: torch.Tensor,
    column_weight: torch.Tensor | None,
    scoring: Scoring,
) -> torch.Tensor:
    """Mean and factor of each term over the tensor, float32 ``[terms, 2]``."""
    pair = _describe(base, tuned, column_weight, scoring._replace(affine=None))
    affine = torch.empty((2 if _BOTH <= pair[6] < _SENSITIVITY else 1, 2))
    fault = _C.select_affine(pair, affine.data_ptr(), torch.get_num_threads())
    _require_finite(fault, scoring)
    return affine


def count_keys_(
    counts: torch.Tensor,
    room: torch.Tensor,
    base: torch.Tensor,
    tuned: torch.Tensor,
    column_weight: torch.Tensor | None,
    scoring: Scoring,
    interval: KeyInterval,
) -> tuple[int, int]:
    """Count the digits of a pair's keys, and collect the keys inside an interval.

    As in the reference; all of ``room`` may be written to.
    """
    fault, found, above = _C.select_count(
        _describe(base, tuned, column_weight, scoring),
        *interval,
        counts.data_ptr(),
        room.data_ptr(),
        torch.get_num_threads(),
    )
    _require_finite(fault, scoring)
    return found, above


def mark_pair_(
    base: torch.Tensor,
    tuned: torch.Tensor,
    column_weight: torch.Tensor | None,
    scoring: Scoring,
    threshold: torch.Tensor,
    ties: torch.Tensor,
) -> torch.Tensor:
    """Mask of the keys above ``threshold`` and of its first ``ties``, which it reduces.

    As in the reference.
    """
    mask = torch.empty(base.shape, dtype=torch.bool)
    if mask.numel() == 0:
        return mask
    fault, taken = _C.select_mark(
        _describe(base, tuned, column_weight, scoring),
        int(threshold),
        int(ties),
        mask.data_ptr(),
        torch.get_num_threads(),
    )
    _require_finite(fault, scoring)
    ties -= taken
    return mask
