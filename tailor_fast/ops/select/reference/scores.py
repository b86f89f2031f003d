"""The scores of a tensor pair, by the arithmetic that this package states, chunk by chunk."""

import functools
import math
from collections.abc import Iterator

import torch

from tailor_fast._core.checks import fail
from tailor_fast.ops.select.options import BLOCK, Scoring
from tailor_fast.ops.select.radix import float_keys

CHUNK = 1 << 18  # elements scored at a time: float64 temporaries of 2 MiB stay in cache
SMALLEST_STD = 2.0**-126


def _fold(x: torch.Tensor) -> torch.Tensor:
    """Add along the last dimension by halves."""
    width = x.shape[-1]
    half = 1 << (width - 1).bit_length()
    x = torch.nn.functional.pad(x, (0, half - width))
    while half > 1:
        half //= 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def _spread(values: torch.Tensor, cols: int) -> torch.Tensor:
    """Repeat one value per block, ``[rows, blocks]``, to one per column, ``[rows, cols]``."""
    return values.repeat_interleave(BLOCK, dim=1)[:, :cols]


def _block_sums(x: torch.Tensor, pivot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """S1 and S2 of every block, float64 ``[rows, blocks]``."""
    e = (x - pivot).double()
    e = torch.nn.functional.pad(e, (0, -x.shape[1] % BLOCK)).view(x.shape[0], -1, BLOCK)
    return _fold(e), _fold(e * e)


def _affine(
    pivot: torch.Tensor, s1: torch.Tensor, s2: torch.Tensor, n: torch.Tensor, weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``m`` and ``a`` of each unit, float32, from its pivot and its float64 sums."""
    q = s1 / n
    std = ((s2 - s1 * q) / (n - 1)).sqrt()
    factor = torch.full_like(std, weight) / std
    usable = std >= SMALLEST_STD  # False for the NaN of a one-element unit
    return (pivot.double() + q).float(), torch.where(usable, factor, 0.0).float()


def _standardise(x: torch.Tensor, weight: float, normalize: str) -> torch.Tensor:
    """``(x - m) * a`` with units inside the rows of ``x [rows, cols]``."""
    cols = x.shape[1]
    if normalize == "row_block":
        pivot = x[:, ::BLOCK]
        s1, s2 = _block_sums(x, _spread(pivot, cols))
        starts = torch.arange(0, cols, BLOCK, dtype=torch.float64, device=x.device)
        mean, factor = _affine(pivot, s1, s2, (cols - starts).clamp(max=BLOCK), weight)
        return (x - _spread(mean, cols)) * _spread(factor, cols)
    pivot = x[:, :1]
    s1, s2 = (_fold(sums)[:, None] for sums in _block_sums(x, pivot))
    mean, factor = _affine(pivot, s1, s2, torch.full_like(s1, cols), weight)
    return (x - mean) * factor


def _require_finite(values: tuple[torch.Tensor, ...], scoring: Scoring, row: int) -> None:
    finite = values[0].isfinite()
    for value in values[1:]:
        finite &= value.isfinite()
    if bool(finite.all()):
        return
    place = int((~finite).flatten().nonzero()[0])
    found = [float(value.flatten()[place]) for value in values]
    got = next(value for value in found if not math.isfinite(value))
    index = scoring.first_index + row * finite.shape[1] + place
    hint = "look there for NaN or infinity in base and tuned, or for overflow of their delta"
    what = scoring.describe("scores")
    fail(scoring.op, what, "finite", f"{got} at linear index {index}", hint)


class Pair:
    """A tensor pair, scored a chunk of rows at a time."""

    def __init__(
        self,
        base: torch.Tensor,  # [rows, cols]
        tuned: torch.Tensor,  # [rows, cols]
        column_weight: torch.Tensor | None,  # [cols]
        scoring: Scoring,
        widest: int = 0,
    ) -> None:
        self.base, self.tuned, self.column_weight = base, tuned, column_weight
        self.scoring = scoring
        self.step = max(1, CHUNK // max(base.shape[1], widest, 1))
        self.starts = range(0, base.shape[0], self.step)
        w = float(scoring.salience_weight)
        self.weights = [weight for weight in (w, 1.0 - w) if weight > 0]

    def terms(self, row: int) -> tuple[torch.Tensor, ...]:
        """The terms that are used, s before v, of the chunk that starts at ``row``."""
        w, sensitivity = self.scoring.salience_weight, self.scoring.sensitivity
        tuned = self.tuned[row : row + self.step].float()
        delta = tuned - self.base[row : row + self.step].float()
        salience = delta.abs()
        if self.column_weight is None or w == 1:
            _require_finite((salience,), self.scoring, row)
            return (salience,)
        if sensitivity == "obs":
            sensitive = delta * delta
        elif sensitivity == "weight":
            sensitive = tuned * tuned
        else:
            sensitive = salience
        sensitive = sensitive * self.column_weight
        _require_finite((salience, sensitive), self.scoring, row)
        return (salience, sensitive) if w > 0 else (sensitive,)

    @functools.cached_property
    def affine(self) -> torch.Tensor:
        """``m`` and ``a`` of each term over the whole tensor, float32 ``[terms, 2]``."""
        if self.scoring.affine is not None:
            return self.scoring.affine
        pivots: list[torch.Tensor] = []
        sums: list[list[torch.Tensor]] = [[] for _ in range(2 * len(self.weights))]
        for row in self.starts:
            terms = self.terms(row)
            pivots = pivots or [x[0, 0] for x in terms]
            for i, (x, pivot) in enumerate(zip(terms, pivots, strict=True)):
                for j, part in enumerate(_block_sums(x, pivot)):
                    sums[2 * i + j].append(_fold(part))
        totals = [_fold(torch.cat(rows)) for rows in sums]
        n = torch.full_like(totals[0], self.base.numel())
        affine = [
            torch.stack(_affine(pivots[i], totals[2 * i], totals[2 * i + 1], n, weight))
            for i, weight in enumerate(self.weights)
        ]
        return torch.stack(affine)

    def scores(self, row: int) -> torch.Tensor:
        """Float32 scores of the chunk of rows that starts at ``row``."""
        parts = []
        for i, (x, weight) in enumerate(zip(self.terms(row), self.weights, strict=True)):
            if self.scoring.normalize == "none":
                parts.append(x * weight)
            elif self.scoring.normalize == "tensor":
                parts.append((x - self.affine[i, 0]) * self.affine[i, 1])
            else:
                parts.append(_standardise(x, weight, self.scoring.normalize))
        score = parts[0] + parts[1] if len(parts) == 2 else parts[0]
        if self.scoring.normalize == "none":  # a finite term's z is below sqrt(n), hence finite
            _require_finite((score,), self.scoring, row)
        return score

    def key_chunks(self) -> Iterator[torch.Tensor]:
        """Int32 keys of every chunk of rows, computed as they are asked for."""
        return (float_keys(self.scores(row)) for row in self.starts)


def score_pair(
    base: torch.Tensor,
    tuned: torch.Tensor,
    column_weight: torch.Tensor | None,
    scoring: Scoring,
) -> torch.Tensor:
    """All scores of a pair, float32 ``[rows, cols]``: the bits that every backend ranks by."""
    pair = Pair(base, tuned, column_weight, scoring)
    return torch.cat([pair.scores(row) for row in pair.starts])


def tensor_affine(
    base: torch.Tensor,
    tuned: torch.Tensor,
    column_weight: torch.Tensor | None,
    scoring: Scoring,
) -> torch.Tensor:
    """``m`` and ``a`` of each term over the tensor, float32 ``[terms, 2]``."""
    return Pair(base, tuned, column_weight, scoring).affine
