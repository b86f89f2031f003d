"""``select_patch``: masks against sorts of the scores, and against the definition in float64."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tailor_fast._core.density import kept_count
from tailor_fast.ops.select import select_patch
from tailor_fast.ops.select.options import BLOCK, NORMALIZATIONS, SCOPES, SENSITIVITIES, Scoring
from tailor_fast.ops.select.reference import score_pair
from tailor_fast.testing import tolerance
from tests.ops.select.cases import DTYPES, chunk_sizes, make_pair, tied_pair
from tests.ops.select.oracle import (
    exact_scores,
    lexsort_mask,
    plain_scores,
    scope_mask,
    spec_scores,
    units,
)

ALL = list(itertools.product(SENSITIVITIES, NORMALIZATIONS, SCOPES))


def counts(scope: str, rows: int, cols: int, density: float) -> dict[int, int]:
    """k for each size of a unit."""
    masks = (np.empty((rows, cols))[part].size for part in units(scope, rows, cols))
    return {size: kept_count(size, density) for size in masks}


def ranked(scores: np.ndarray, scope: str, density: float) -> torch.Tensor:
    return torch.from_numpy(scope_mask(scores, scope, counts(scope, *scores.shape, density)))


@pytest.mark.parametrize(("sensitivity", "normalize", "scope"), ALL)
@pytest.mark.parametrize("shape", [(9, 300), (200, 40), (1, 129)])
def test_equals_a_sort_of_the_stated_scores(
    sensitivity: str, normalize: str, scope: str, shape: tuple[int, int]
) -> None:
    base, tuned, c = make_pair(*shape, torch.bfloat16)
    scores = spec_scores(base, tuned, c.numpy(), Scoring(sensitivity, 0.5, normalize))
    mask = select_patch(
        base, tuned, c, sensitivity=sensitivity, density=0.29, normalize=normalize, scope=scope
    )
    assert torch.equal(mask, ranked(scores, scope, 0.29))


@pytest.mark.parametrize(("sensitivity", "normalize", "scope"), ALL)
def test_one_term_alone(sensitivity: str, normalize: str, scope: str) -> None:
    # Where standardising cannot change the order it is left out: the scores are the term itself.
    # Its roundings would merge the smallest of terms as far apart as these.
    base, tuned, c = make_pair(12, 200)
    base, tuned = base * 0, torch.ldexp(tuned, torch.arange(0, -200, -1).clamp(min=-50))
    for w in (0.0, 1.0):
        skipped = normalize == "tensor" or (normalize == "row" and scope == "row")
        scoring = Scoring(sensitivity, w, "none" if skipped else normalize)
        scores = spec_scores(base, tuned, c.numpy(), scoring)
        options = {
            "sensitivity": sensitivity,
            "normalize": normalize,
            "scope": scope,
            "density": 0.9,
        }
        mask = select_patch(base, tuned, c, salience_weight=w, **options)
        assert torch.equal(mask, ranked(scores, scope, 0.9))
        if w == 1:
            alone = select_patch(base, tuned, salience_weight=1, **options)
            assert torch.equal(mask, alone)


@pytest.mark.parametrize(("sensitivity", "normalize", "scope"), ALL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_keeps_the_best_by_the_definition(
    sensitivity: str, normalize: str, scope: str, dtype: torch.dtype
) -> None:
    base, tuned, c = make_pair(16, 300, dtype, seed=3)
    mask = select_patch(
        base, tuned, c, sensitivity=sensitivity, normalize=normalize, scope=scope
    ).numpy()
    scoring = Scoring(sensitivity, 0.5, normalize)
    exact = exact_scores(base, tuned, c.numpy(), scoring)
    plain = plain_scores(base, tuned, c.numpy(), scoring)
    margin = 2 * tolerance(torch.from_numpy(exact), plain, torch.float32)
    for part in units(scope, 16, 300):
        kept, dropped = exact[part][mask[part]], exact[part][~mask[part]]
        assert kept.size == kept_count(mask[part].size, 0.1)
        assert kept.min() >= dropped.max() - margin


@settings(max_examples=120)
@given(st.data())
def test_exact_count_and_lowest_index_under_ties(data: st.DataObject) -> None:
    rows, cols = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 270))
    base, tuned, c = tied_pair(rows, cols, data.draw(st.integers(0, 10**6)))
    density = data.draw(st.sampled_from([0.0, 0.1, 0.29, 0.5, 0.999, 1.0]))
    normalize = data.draw(st.sampled_from(NORMALIZATIONS))
    scope = data.draw(st.sampled_from(SCOPES))
    w = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    scores = spec_scores(base, tuned, c.numpy(), Scoring("diag", w, normalize))
    with chunk_sizes(data.draw(st.integers(1, 2000)), data.draw(st.sampled_from([0, 10**9]))):
        mask = select_patch(
            base,
            tuned,
            c,
            sensitivity="diag",
            density=density,
            salience_weight=w,
            normalize=normalize,
            scope=scope,
        )
    assert torch.equal(mask, ranked(scores, scope, density))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_chunks_do_not_change_the_mask(scope: str, normalize: str) -> None:
    base, tuned, c = make_pair(40, 1000, torch.bfloat16)
    whole = select_patch(base, tuned, c, scope=scope, normalize=normalize)
    for chunk, keep in [(1, 10**9), (3001, 0), (17_000, 0)]:
        with chunk_sizes(chunk, keep):
            mask = select_patch(base, tuned, c, scope=scope, normalize=normalize)
        assert torch.equal(mask, whole)


@pytest.mark.parametrize("scope", SCOPES)
def test_threads_do_not_change_the_mask(scope: str, set_num_threads: Callable[[int], None]) -> None:
    base, tuned, c = make_pair(100, 1000, torch.bfloat16)
    masks = []
    for threads in (1, 2):
        set_num_threads(threads)
        masks.append(select_patch(base, tuned, c, scope=scope))
    assert torch.equal(*masks)


@pytest.mark.parametrize("scope", ["block", "row"])
def test_units_of_scope_do_not_see_each_other(scope: str) -> None:
    base, tuned, c = make_pair(10, 300)
    whole = select_patch(base, tuned, c, scope=scope)
    for part in units(scope, 10, 300):
        alone = select_patch(
            base[part].contiguous(), tuned[part].contiguous(), c[part[1]], scope=scope
        )
        assert torch.equal(alone, whole[part])


def test_permuted_rows_permute_the_mask() -> None:
    base, tuned, c = make_pair(64, 256)
    order = torch.randperm(64)
    whole = select_patch(base, tuned, c)
    assert score_pair(base, tuned, c, Scoring("obs", 0.5, "row_block")).unique().numel() > 16_000
    assert torch.equal(select_patch(base[order], tuned[order], c), whole[order])


def test_unchanged_rows_come_last_but_for_their_place() -> None:
    base, tuned, c = make_pair(8, 256)
    tuned[3] = base[3]
    assert not bool(select_patch(base, tuned, c)[3].any())
    everything = select_patch(base, base, c, density=0.5)
    assert torch.equal(everything.flatten(), torch.arange(8 * 256) < 8 * 128)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 7), (0, 4), (4, 0)])
def test_smallest_shapes(scope: str, shape: tuple[int, int]) -> None:
    base, tuned, c = make_pair(*shape)
    for density in (0.0, 0.5, 1.0):
        mask = select_patch(base, tuned, c, scope=scope, density=density)
        assert mask.shape == shape
        if density != 0.5:
            assert int(mask.sum()) == density * mask.numel()


def test_density_is_a_decimal() -> None:
    base, tuned, c = make_pair(10, 10)
    assert int(0.29 * 100) == 28
    assert int(select_patch(base, tuned, c, density=0.29).sum()) == 29


@pytest.mark.golden
@pytest.mark.parametrize(
    "case", ["eval_64x256", "eval_width_129", "eval_96x320_ragged_block", "eval_dead_columns"]
)
def test_first_block_of_the_authors(case: str, golden_dir: Path) -> None:
    # The first block is not compensated yet, so its mask is that of `weight` with block scope.
    # The authors keep one element less than the rest: those strictly above a sorted element.
    data = load_file(golden_dir / f"{case}.safetensors")
    rows, cols = data["in.base"].shape
    hessian = data["out.gram"].double()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(cols, dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    c = (1 / factor.diagonal().square()).float()
    base, tuned = data["in.base"], data["in.tuned"]
    size = rows * BLOCK
    kept = size - 1 - int(size * 0.9)
    mask = select_patch(
        base[:, :BLOCK].contiguous(),
        tuned[:, :BLOCK].contiguous(),
        c[:BLOCK],
        sensitivity="weight",
        scope="block",
        density=(kept + 0.5) / size,
    )
    authors = data["out.mask"][:, :BLOCK].bool()
    assert int(mask.sum()) == kept
    assert torch.equal(mask, authors)


def test_lexsort_oracle_itself() -> None:
    scores = np.array([[1.0, 2.0, 2.0], [0.0, 2.0, -np.inf]])
    assert lexsort_mask(scores, 2).tolist() == [[False, True, True], [False, False, False]]
