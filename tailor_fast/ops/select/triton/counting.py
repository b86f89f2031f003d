"""What ``TopKSelector`` calls: counts and collected keys, and masks of a known threshold."""

from dataclasses import replace

import torch

from tailor_fast.ops.select.options import Scoring
from tailor_fast.ops.select.radix import KeyInterval
from tailor_fast.ops.select.triton import state, whole
from tailor_fast.ops.select.triton.masks import Work, mark, refuse, write_scores
from tailor_fast.ops.select.triton.moments import with_moments
from tailor_fast.ops.select.triton.pair import Pair, describe

DIGITS: int = whole.DIGITS.value
COPIES = 16  # of the histogram: neighbouring programs add to different ones


def _moments(pair: Pair, scoring: Scoring) -> Pair:
    """The pair with the affine map that the caller knows, or with its own."""
    if scoring.affine is None:
        return with_moments(pair)
    return replace(pair, affine=scoring.affine)


def score_pair(
    base: torch.Tensor,
    tuned: torch.Tensor,
    column_weight: torch.Tensor | None,
    scoring: Scoring,
) -> torch.Tensor:
    """All scores of a pair, float32 ``[rows, cols]``: the bits that the masks rank by."""
    scores = torch.empty(base.shape, dtype=torch.float32, device=base.device)
    if scores.numel():
        pair = _moments(describe(base, tuned, column_weight, scoring), scoring)
        flags = torch.zeros(state.FLAGS.value, dtype=torch.int64, device=base.device)
        write_scores(pair, scores, flags)
        if bool(flags[state.FAULT.value]):
            refuse(pair, scoring)
    return scores


def tensor_affine(
    base: torch.Tensor,
    tuned: torch.Tensor,
    column_weight: torch.Tensor | None,
    scoring: Scoring,
) -> torch.Tensor:
    """Mean and factor of each term over the tensor, float32 ``[terms, 2]``."""
    pair = with_moments(describe(base, tuned, column_weight, scoring))
    affine = pair.affine
    if affine is None or not bool(affine.isfinite().all()):
        refuse(pair, scoring)
    return affine[..., 0]


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

    Args:
        counts: int64 ``[65536]`` on cpu, added to in place; which digits: see ``KeyInterval``.
        room: int32 on cpu, for as many keys as the pair has; its first ones become those that are
            collected, in linear order.
        base: ``[rows, cols]``.
        tuned: ``[rows, cols]``.
        column_weight: float32 ``[cols]`` or None.
        scoring: how to score.
        interval: which keys to count and to collect.

    Returns:
        How many keys lie in ``[low, high]``, and how many above ``high``.
    """
    keys = torch.empty(base.numel(), dtype=torch.int32, device=base.device)
    if not keys.numel():
        return 0, 0
    pair = _moments(describe(base, tuned, column_weight, scoring), scoring).ordered("tensor")
    flags = torch.zeros(state.FLAGS.value + 1, dtype=torch.int64, device=base.device)
    found = torch.zeros((COPIES, DIGITS), dtype=torch.int32, device=base.device)
    write_scores(pair, keys, flags, found, interval)
    fault, _, above = flags.tolist()
    if fault:
        refuse(pair, scoring)
    counts += found.sum(0).cpu()
    if interval.low > interval.high:
        return 0, above
    inside = keys[(keys >= interval.low) & (keys <= interval.high)]
    room[: inside.numel()] = inside
    return inside.numel(), above


def mark_pair_(
    base: torch.Tensor,
    tuned: torch.Tensor,
    column_weight: torch.Tensor | None,
    scoring: Scoring,
    threshold: torch.Tensor,
    ties: torch.Tensor,
) -> torch.Tensor:
    """Mask of the keys above ``threshold`` (int32 ``[1]``) and of its first ``ties``.

    ``ties`` (int64 ``[1]``) is reduced in place by the ties that were taken.
    """
    mask = torch.empty(base.shape, dtype=torch.bool, device=base.device)
    if mask.numel() == 0:
        return mask
    pair = _moments(describe(base, tuned, column_weight, scoring), scoring).ordered("tensor")
    work = Work(pair, 1)
    work.field(state.FLOOR.value).copy_(threshold)
    work.field(state.NEED.value).copy_(ties)
    if mark(pair, mask.view(torch.uint8), work):
        refuse(pair, scoring)
    ties -= work.field(state.TAKEN.value)
    return mask
