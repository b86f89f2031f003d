"""``select`` beside eager torch on a 1024 x 4096 pair; a correctness gate runs before any timing.

The baselines rank the same scores: z-scores per row within 128 columns, then the value at the
threshold's place of a full ``torch.sort`` (what the authors' code does, per block), or
``torch.topk`` and a scatter. ``make bench`` groups the rows by what they compute.
"""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from tailor_fast.ops.select import kept_count, select_patch, topk_mask
from tailor_fast.testing import tolerance

ROWS, COLS, BLOCK = 1024, 4096, 128
DENSITY = 0.1
K = kept_count(ROWS * COLS, DENSITY)

Pair = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Select = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _standardise(x: torch.Tensor) -> torch.Tensor:
    x = x.view(x.shape[0], -1, BLOCK)
    return ((x - x.mean(2, keepdim=True)) / x.std(2, keepdim=True)).flatten(1)


def _scores(base: torch.Tensor, tuned: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    delta = tuned - base
    return 0.5 * _standardise(delta.abs()) + 0.5 * _standardise(delta.square() * c)


def _by_sort(scores: torch.Tensor, k: int) -> torch.Tensor:
    threshold = torch.sort(scores.flatten())[0][scores.numel() - k]
    return scores >= threshold


def _by_topk(scores: torch.Tensor, k: int) -> torch.Tensor:
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[torch.topk(scores.flatten(), k, sorted=False).indices] = True
    return mask.view(scores.shape)


def eager_sort(base: torch.Tensor, tuned: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Score the tensor, sort all of it, compare with one element."""
    return _by_sort(_scores(base.float(), tuned.float(), c), K)


def eager_topk(base: torch.Tensor, tuned: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Score the tensor, ``torch.topk``, scatter."""
    return _by_topk(_scores(base.float(), tuned.float(), c), K)


def eager_sort_blocks(base: torch.Tensor, tuned: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """The authors' way: score, sort and compare one block of 128 columns after the other."""
    base, tuned = base.float(), tuned.float()
    mask = torch.empty(base.shape, dtype=torch.bool)
    for j in range(0, COLS, BLOCK):
        block = slice(j, j + BLOCK)
        scores = _scores(base[:, block].contiguous(), tuned[:, block].contiguous(), c[block])
        mask[:, block] = _by_sort(scores, kept_count(scores.numel(), DENSITY))
    return mask


def select_tensor(base: torch.Tensor, tuned: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """``select_patch`` with its defaults."""
    return select_patch(base, tuned, c, density=DENSITY)


def select_blocks(base: torch.Tensor, tuned: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """``select_patch`` with the authors' scope."""
    return select_patch(base, tuned, c, density=DENSITY, scope="block")


WAYS: dict[str, tuple[Select, ...]] = {
    "tensor": (select_tensor, eager_sort, eager_topk),
    "block": (select_blocks, eager_sort_blocks),
}
FLAT: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "topk_mask": topk_mask,
    "eager_sort": _by_sort,
    "eager_topk": _by_topk,
}


@pytest.fixture(scope="module")
def pair() -> Pair:
    """A bfloat16 pair as fine-tuning leaves it, and a column weight of wide spread."""
    generator = torch.Generator().manual_seed(7)
    base = torch.randn(ROWS, COLS, generator=generator) * 0.02
    tuned = base + torch.randn(ROWS, COLS, generator=generator) * 0.002
    c = torch.randn(COLS, generator=generator).exp()
    return base.bfloat16(), tuned.bfloat16(), c


@pytest.fixture(scope="module")
def gate(pair: Pair) -> None:
    """Every way keeps the best scores by float64; ties at the threshold may differ."""
    base, tuned, c = pair
    exact = _scores(base.double(), tuned.double(), c.double())
    margin = 2 * tolerance(exact, _scores(base.float(), tuned.float(), c), torch.float32)
    for scope, ways in WAYS.items():
        width = BLOCK if scope == "block" else COLS
        for way in ways:
            mask = way(base, tuned, c)
            for j in range(0, COLS, width):
                kept, score = mask[:, j : j + width], exact[:, j : j + width]
                excess = int(kept.sum()) - kept_count(kept.numel(), DENSITY)
                ties = int((score[kept] <= score[kept].min() + margin).sum())
                if not 0 <= excess < ties or score[kept].min() < score[~kept].max() - margin:
                    raise AssertionError(f"{way.__name__} does not keep the best at column {j}")


@pytest.mark.parametrize("way", WAYS["tensor"], ids=lambda way: way.__name__)
@pytest.mark.benchmark(group="select_patch 1024x4096 bf16, scope tensor")
@pytest.mark.usefixtures("gate")
def test_select_tensor(benchmark: BenchmarkFixture, pair: Pair, way: Select) -> None:
    benchmark(way, *pair)


@pytest.mark.parametrize("way", WAYS["block"], ids=lambda way: way.__name__)
@pytest.mark.benchmark(group="select_patch 1024x4096 bf16, scope block")
@pytest.mark.usefixtures("gate")
def test_select_blocks(benchmark: BenchmarkFixture, pair: Pair, way: Select) -> None:
    benchmark(way, *pair)


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.benchmark(group="topk_mask 4194304 fp32")
def test_topk_mask(benchmark: BenchmarkFixture, name: str) -> None:
    scores = torch.randn(ROWS * COLS, generator=torch.Generator().manual_seed(8))
    mask = benchmark(FLAT[name], scores, K)
    kept = scores[mask]
    if kept.numel() < K or kept.min() < scores[~mask].max():
        raise AssertionError(f"{name} does not keep the best")
