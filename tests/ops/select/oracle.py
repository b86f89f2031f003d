"""What the select tests compare with: numpy alone, by definition, with sorts and loops.

``spec_scores`` follows the arithmetic that the ``reference`` package states, operation by
operation, so its bits must be equal. ``exact_scores`` is the textbook formula in float64.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from tailor_fast.ops.select.options import BLOCK, Scoring

Array = NDArray[np.generic]


def lexsort_mask(scores: Array, k: int) -> Array:
    """Mask of the k best of all elements; ties to the lowest linear index."""
    flat = scores.reshape(-1)
    order = np.lexsort((np.arange(flat.size), -flat))
    mask = np.zeros(flat.size, dtype=bool)
    mask[order[:k]] = True
    return mask.reshape(scores.shape)


def scope_mask(scores: Array, scope: str, count: dict[int, int]) -> Array:
    """Mask per unit of scope; ``count`` gives k for each size of a unit."""
    rows, cols = scores.shape
    mask = np.zeros((rows, cols), dtype=bool)
    for part in units(scope, rows, cols):
        mask[part] = lexsort_mask(scores[part], count[scores[part].size])
    return mask


def units(kind: str, rows: int, cols: int) -> list[tuple[slice, slice]]:
    """The units of a scope or a normalisation, as slices."""
    every = slice(0, rows)
    blocks = [slice(j, min(j + BLOCK, cols)) for j in range(0, cols, BLOCK)]
    if kind == "row_block":
        return [(slice(i, i + 1), block) for i in range(rows) for block in blocks]
    if kind == "row":
        return [(slice(i, i + 1), slice(0, cols)) for i in range(rows)]
    if kind == "block":
        return [(every, block) for block in blocks]
    return [(every, slice(0, cols))]


def terms(base: torch.Tensor, tuned: torch.Tensor, c: Array, scoring: Scoring) -> list[Array]:
    """Salience and sensitivity in the dtype of ``c``."""
    t = tuned.float().numpy().astype(c.dtype)
    d = t - base.float().numpy().astype(c.dtype)
    s = np.abs(d)
    square = {"obs": d * d, "weight": t * t}
    return [s, square.get(scoring.sensitivity, s) * c]


def weights(scoring: Scoring) -> list[float]:
    return [scoring.salience_weight, 1.0 - scoring.salience_weight]


def spec_scores(base: torch.Tensor, tuned: torch.Tensor, c: Array, scoring: Scoring) -> Array:
    """The stated arithmetic: float32 terms, float64 moments by halves, float32 score."""
    score = None
    for x, w in zip(terms(base, tuned, c, scoring), weights(scoring), strict=True):
        if w == 0:
            continue
        part = np.empty_like(x)
        if scoring.normalize == "none":
            part = x * np.float32(w)
        else:
            for unit in units(scoring.normalize, *x.shape):
                part[unit] = _spec_z(x[unit], w)
        score = part if score is None else score + part
    assert score is not None
    assert score.dtype == np.float32
    return score


def spec_sums(x: Array) -> tuple[np.float64, np.float64]:
    """S1 and S2 of one unit: float32 differences, float64 sums."""
    e = (x - x[0, 0]).astype(np.float64)
    return _fold_unit(e), _fold_unit(e * e)


def _spec_z(x: Array, w: float) -> Array:
    (s1, s2), n = spec_sums(x), np.float64(x.size)
    q = s1 / n
    with np.errstate(invalid="ignore"):
        std = np.sqrt((s2 - s1 * q) / (n - 1)) if n > 1 else np.float64(0)
    a = np.float64(w) / std if std >= 2.0**-126 else np.float64(0)
    return (x - np.float32(np.float64(x[0, 0]) + q)) * np.float32(a)


def _fold_unit(e: Array) -> np.float64:
    """Along the columns of each block, then the blocks of each row, then the rows."""
    starts = range(0, e.shape[1], BLOCK)
    return _fold([_fold([_fold(row[j : j + BLOCK]) for j in starts]) for row in e])


def _fold(values: Sequence[np.float64] | Array) -> np.float64:
    size = 1
    while size < len(values):
        size *= 2
    padded = np.zeros(size)
    padded[: len(values)] = values
    while size > 1:
        size //= 2
        padded = padded[:size] + padded[size:]
    return padded[0]


def exact_scores(base: torch.Tensor, tuned: torch.Tensor, c: Array, scoring: Scoring) -> Array:
    """The definition in float64: ``w z(s) + (1 - w) z(v)``, numpy's mean and unbiased std."""
    score = np.zeros(tuple(base.shape))
    for x, w in zip(
        terms(base, tuned, c.astype(np.float64), scoring), weights(scoring), strict=True
    ):
        for unit in units(scoring.normalize, *x.shape):
            z = x[unit]
            if scoring.normalize != "none":
                std = z.std(ddof=1) if z.size > 1 else 0.0
                z = (z - z.mean()) / std if std > 0 else np.zeros_like(z)
            score[unit] += w * z
    return score


def plain_scores(
    base: torch.Tensor, tuned: torch.Tensor, c: Array, scoring: Scoring
) -> torch.Tensor:
    """The same by plain float32 torch: what the tolerance rule measures itself by."""
    s, v = (torch.from_numpy(x) for x in terms(base, tuned, c.astype(np.float32), scoring))
    score = torch.zeros(base.shape)
    for x, w in zip((s, v), weights(scoring), strict=True):
        for unit in units(scoring.normalize, *x.shape):
            z = x[unit]
            if scoring.normalize != "none":
                std = z.std() if z.numel() > 1 else torch.zeros(())
                z = (z - z.mean()) / std if std > 0 else torch.zeros_like(z)
            score[unit] += w * z
    return score
