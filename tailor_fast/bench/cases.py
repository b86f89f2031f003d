"""What is timed: one ``Case`` per op and kind of work, on inputs like a layer's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tailor_fast._core.density import kept_count
from tailor_fast.ops.codec import apply_patch_, encode_patch
from tailor_fast.ops.decorate import decorate_exact, decorate_obs, decorate_official
from tailor_fast.ops.gram import accumulate_cross_gram_, accumulate_gram_, accumulate_gram_diag_
from tailor_fast.ops.select import select_patch, topk_mask

DENSITY = 0.1
SIZES: Mapping[str, tuple[int, int, int]] = {  # rows, cols, tokens
    "small": (256, 256, 512),
    "medium": (1024, 1024, 2048),
    "large": (4096, 4096, 16384),
}
_SEED = 20240712
_TRADES = 1e-3  # share of words that may differ where a rounding can move a tie in the mask
_ROUNDING = 1e-3  # of the answer's norm

Gate = Callable[[Any, Any], str | None]  # (got, reference) -> what is wrong, or None


@dataclass(frozen=True)
class Case:
    """One kind of work.

    Attributes:
        op: folder under ``tailor_fast.ops``.
        work: what is computed.
        shape: sizes and dtype, for people.
        call: takes a backend's name; the result of its first call is what ``gate`` compares.
        gate: holds a result against the reference's.
        moved: bytes that any method must read and write.
        flops: floating-point operations that the method cannot do without.
    """

    op: str
    work: str
    shape: str
    call: Callable[[Any], Any]
    gate: Gate
    moved: int
    flops: int


def make_cases(op: str, size: str, device: torch.device) -> Iterator[Case]:
    """Yield the cases of ``op``; each holds its inputs until it is dropped.

    Args:
        op: ``"gram"``, ``"select"``, ``"decorate"`` or ``"codec"``.
        size: key of ``SIZES``.
        device: where the inputs live.
    """
    generator = torch.Generator(device).manual_seed(_SEED)
    yield from _MAKERS[op](*SIZES[size], generator)


def _randn(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device)


def _tokens(tokens: int, cols: int, generator: torch.Generator) -> torch.Tensor:
    """Correlated inputs with columns of different sizes, as a layer sees them."""
    rank = max(1, cols // 4)
    mixed = _randn((tokens, rank), generator) @ _randn((rank, cols), generator)
    return mixed / math.sqrt(rank) + 0.3 * _randn((tokens, cols), generator)


def _pair(rows: int, cols: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    base = 0.02 * _randn((rows, cols), generator)
    return base, base + 0.002 * _randn((rows, cols), generator)


def _gram(rows: int, cols: int, tokens: int, generator: torch.Generator) -> Iterator[Case]:
    del rows
    x = _tokens(tokens, cols, generator).to(torch.bfloat16)
    y = x.flip(0)
    shape = f"{tokens}x{cols} bfloat16"
    square = 4 * cols * cols

    totals: dict[tuple[str, ...], torch.Tensor] = {}

    def total(*key: str) -> torch.Tensor:
        """One sum per backend, added to again and again as over a run's batches."""
        sizes = (cols,) if key[0] == "diagonal" else (cols, cols)
        if key not in totals:
            totals[key] = torch.zeros(sizes, device=x.device)
        return totals[key]

    yield Case(
        "gram",
        "gram",
        shape,
        lambda backend: accumulate_gram_(total("gram", backend), x, backend=backend),
        _close,
        x.nbytes + 2 * square,
        tokens * cols * (cols + 1),
    )
    yield Case(
        "gram",
        "cross gram",
        shape,
        lambda backend: accumulate_cross_gram_(total("cross", backend), x, y, backend=backend),
        _close,
        2 * x.nbytes + 2 * square,
        2 * tokens * cols * cols,
    )
    yield Case(
        "gram",
        "diagonal",
        shape,
        lambda backend: accumulate_gram_diag_(total("diagonal", backend), x, backend=backend),
        _close,
        x.nbytes,
        2 * x.numel(),
    )


def _select(rows: int, cols: int, tokens: int, generator: torch.Generator) -> Iterator[Case]:
    del tokens
    base, tuned = (words.to(torch.bfloat16) for words in _pair(rows, cols, generator))
    column_weight = _randn((cols,), generator).exp()
    scores = _randn((rows, cols), generator).abs()
    pair = base.nbytes + tuned.nbytes + base.numel()
    shape = f"{rows}x{cols} bfloat16"
    yield Case(
        "select",
        "salience",
        shape,
        lambda backend: _by_salience(base, tuned, backend),
        _same,
        pair,
        base.numel(),
    )
    yield Case(
        "select",
        "fused score",
        shape,
        lambda backend: select_patch(base, tuned, column_weight, density=DENSITY, backend=backend),
        _same,
        pair,
        8 * base.numel(),
    )
    kept = kept_count(scores.numel(), DENSITY)
    yield Case(
        "select",
        "top k of scores",
        f"{rows}x{cols} float32",
        lambda backend: topk_mask(scores, kept, backend=backend),
        _same,
        scores.nbytes + scores.numel(),
        0,
    )


def _decorate(rows: int, cols: int, tokens: int, generator: torch.Generator) -> Iterator[Case]:
    x = _tokens(tokens, cols, generator)
    gram = x.T @ x / tokens
    base, tuned = _pair(rows, cols, generator)
    delta = tuned - base
    mask = topk_mask(delta.abs(), kept_count(delta.numel(), DENSITY))
    shape = f"{rows}x{cols} float32"
    matrices = 2 * delta.nbytes + gram.nbytes
    product = 2 * rows * cols * cols
    factor = cols**3 // 3
    yield Case(
        "decorate",
        "exact",
        shape,
        lambda backend: decorate_exact(delta, mask, gram, backend=backend),
        _as_low,
        matrices + mask.numel(),
        product,
    )
    yield Case(
        "decorate",
        "obs",
        shape,
        lambda backend: decorate_obs(delta, mask, gram, backend=backend).patch,
        _close,
        matrices + mask.numel(),
        product // 2 + 2 * factor,
    )
    yield Case(
        "decorate",
        "official",
        shape,
        lambda backend: (
            decorate_official(base, tuned, gram, sparsity=1 - DENSITY, backend=backend).weight
        ),
        _nearly_same,
        matrices + base.nbytes,
        product // 2 + 2 * factor,
    )


def _codec(rows: int, cols: int, tokens: int, generator: torch.Generator) -> Iterator[Case]:
    del tokens
    base, tuned = (words.to(torch.bfloat16) for words in _pair(rows, cols, generator))
    mask = _by_salience(base, tuned, "auto")
    patch = encode_patch(base, tuned, mask)
    stored = base.numel() // 8 + patch.words.nbytes
    shape = f"{rows}x{cols} bfloat16, {DENSITY:.0%} kept"
    yield Case(
        "codec",
        "encode",
        shape,
        lambda backend: encode_patch(base, tuned, mask, backend=backend).words,
        _same,
        base.nbytes + tuned.nbytes + mask.numel() + stored,
        0,
    )
    target = base.clone()
    yield Case(
        "codec",
        "apply twice",
        shape,
        lambda backend: _twice(target, patch, backend),
        _same,
        4 * target.nbytes + 2 * stored,
        0,
    )


def _by_salience(base: torch.Tensor, tuned: torch.Tensor, backend: Any) -> torch.Tensor:
    return select_patch(base, tuned, salience_weight=1.0, density=DENSITY, backend=backend)


def _twice(target: torch.Tensor, patch: Any, backend: Any) -> torch.Tensor:
    """Apply a patch and take it back: every call then finds the same words."""
    apply_patch_(target, patch, backend=backend)
    return apply_patch_(target, patch, backend=backend)


def _same(got: torch.Tensor, expected: torch.Tensor) -> str | None:
    if got.shape == expected.shape and torch.equal(got, expected):
        return None
    return "not the reference's bits"


def _close(got: torch.Tensor, expected: torch.Tensor) -> str | None:
    error = ((got - expected).norm() / expected.norm()).item()
    return None if error <= _ROUNDING else f"relative error {error:.1e}"


def _nearly_same(got: torch.Tensor, expected: torch.Tensor) -> str | None:
    """Scores that differ by a rounding choose another weight now and then."""
    scale = expected.abs().max()
    share = ((got - expected).abs() > _ROUNDING * scale).double().mean().item()
    return None if share <= _TRADES else f"{share:.1e} of the words differ"


def _as_low(got: Any, expected: Any) -> str | None:
    excess = (got.loss.sum() / expected.loss.sum()).item() - 1
    return None if excess <= _ROUNDING else f"loss {excess:.1e} above the reference's"


_MAKERS: Mapping[str, Callable[[int, int, int, torch.Generator], Iterator[Case]]] = {
    "gram": _gram,
    "select": _select,
    "decorate": _decorate,
    "codec": _codec,
}
