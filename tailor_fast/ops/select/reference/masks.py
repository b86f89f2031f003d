"""Masks from scores: one tensor at a time, and the passes over many that a selector asks for."""

from collections.abc import Iterator, Sequence

import torch

from tailor_fast._core.checks import fail
from tailor_fast._core.density import kept_count
from tailor_fast.ops.select.options import BLOCK, Scoring
from tailor_fast.ops.select.radix import (
    DIGITS,
    MANY_UNITS_BINS,
    Chunks,
    KeyInterval,
    float_keys,
    mark_,
    select_best,
)
from tailor_fast.ops.select.reference.scores import CHUNK, Pair

KEEP = 1 << 24  # elements up to which keys (64 MiB) are kept instead of computed once per digit


def _replay(*chunks: torch.Tensor) -> Chunks:
    return lambda: chunks


def topk_mask(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Mask of the k best scores; see the public function."""
    flat = scores.view(-1)
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    starts = range(0, flat.numel(), CHUNK)
    for start in starts:
        nan = flat[start : start + CHUNK].isnan()
        if bool(nan.any()):
            index = start + int(nan.nonzero()[0])
            fail("topk_mask", "scores", "free of NaN", f"nan at linear index {index}")

    def chunks() -> Iterator[torch.Tensor]:
        return (float_keys(flat[start : start + CHUNK].float())[None] for start in starts)

    marks = select_best(chunks, 1, k, scores.device)
    for start, part in zip(starts, marks, strict=True):
        mask.view(-1)[start : start + CHUNK] = part[0]
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
    rows, cols = base.shape
    mask = torch.empty((rows, cols), dtype=torch.bool, device=base.device)
    if mask.numel() == 0:
        return mask
    if scope == "row":
        pair = Pair(base, tuned, column_weight, scoring, widest=MANY_UNITS_BINS)
        k = kept_count(cols, density)
        for row, keys in zip(pair.starts, pair.key_chunks(), strict=True):
            (part,) = select_best(_replay(keys), len(keys), k, base.device)
            mask[row : row + pair.step] = part
        return mask
    pair = Pair(base, tuned, column_weight, scoring)
    chunks: Chunks = pair.key_chunks
    if mask.numel() <= KEEP:
        chunks = _replay(*pair.key_chunks())
    whole = cols - cols % BLOCK if scope == "block" else 0
    if whole:
        _select_columns(mask, chunks, slice(0, whole), whole // BLOCK, density)
    if cols > whole:
        _select_columns(mask, chunks, slice(whole, cols), 1, density)
    return mask


def select_patches(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]],
    scorings: Sequence[Scoring],
    scope: str,
    density: float,
) -> list[torch.Tensor]:
    """``select_patch`` of each pair."""
    return [
        select_patch(*pair, scoring, scope, density)
        for pair, scoring in zip(pairs, scorings, strict=True)
    ]


def _select_columns(
    mask: torch.Tensor, chunks: Chunks, columns: slice, units: int, density: float
) -> None:
    """Write the mask of some columns, cut into units of equal width."""
    target = mask[:, columns]
    k = kept_count(target.numel() // units, density)

    def unit_chunks() -> Iterator[torch.Tensor]:
        for keys in chunks():
            yield keys[:, columns].unflatten(1, (units, -1)).transpose(0, 1).flatten(1)

    row = 0
    for marks in select_best(unit_chunks, units, k, mask.device):
        part = marks.unflatten(1, (-1, target.shape[1] // units)).transpose(0, 1).flatten(1)
        target[row : row + len(part)] = part
        row += len(part)


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
        counts: int64 ``[65536]`` on cpu; added to in place. Counts the upper 16 bits (plus 32768)
            of every key, or the lower 16 bits of the keys whose upper 16 are ``interval.prefix``.
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
    found = above = 0
    for keys in Pair(base, tuned, column_weight, scoring).key_chunks():
        flat = keys.flatten()
        if interval.prefix is None:
            digits = (flat >> 16) + DIGITS // 2
        else:
            digits = flat[(flat >> 16) == interval.prefix] & (DIGITS - 1)
        counts += torch.bincount(digits, minlength=DIGITS).cpu()
        above += int((flat > interval.high).count_nonzero())
        inside = flat[(flat >= interval.low) & (flat <= interval.high)]
        room[found : found + inside.numel()] = inside
        found += inside.numel()
    return found, above


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
    pair = Pair(base, tuned, column_weight, scoring)
    for row, keys in zip(pair.starts, pair.key_chunks(), strict=True):
        marks = mark_(keys.view(1, -1), threshold, ties)
        mask[row : row + pair.step] = marks.view(keys.shape)
    return mask
