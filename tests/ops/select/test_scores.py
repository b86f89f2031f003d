"""The scores: bit-equal to the stated arithmetic, within the tolerance rule of the definition."""

import itertools
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailor_fast.ops.select.options import NORMALIZATIONS, SENSITIVITIES, Scoring
from tailor_fast.ops.select.reference import score_pair, tensor_affine
from tailor_fast.ops.select.reference import scores as arithmetic
from tailor_fast.testing import assert_within
from tests.ops.select.cases import DTYPES, chunk_sizes, make_pair, tied_pair
from tests.ops.select.oracle import (
    exact_scores,
    plain_scores,
    spec_scores,
    spec_sums,
    terms,
    units,
)

ALL = list(itertools.product(SENSITIVITIES, NORMALIZATIONS))


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.view(torch.int32), right.view(torch.int32))


@pytest.mark.parametrize(("sensitivity", "normalize"), ALL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_the_stated_arithmetic(
    sensitivity: str, normalize: str, dtype: torch.dtype
) -> None:
    base, tuned, c = make_pair(7, 300, dtype)
    for w in (0.0, 0.3, 1.0):
        scoring = Scoring(sensitivity, w, normalize)
        expected = torch.from_numpy(spec_scores(base, tuned, c.numpy(), scoring))
        assert same_bits(score_pair(base, tuned, c, scoring), expected)


@settings(max_examples=60)
@given(st.data())
def test_bits_of_the_stated_arithmetic_for_any_numbers(data: st.DataObject) -> None:
    rows, cols = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 140))
    exponent = data.draw(st.integers(-149, 20))
    spread = data.draw(st.integers(0, 40))
    seed = data.draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    size = torch.randint(exponent, exponent + spread + 1, (rows, cols), generator=generator)
    tuned = torch.ldexp(torch.randn(rows, cols, generator=generator), size)
    tuned[torch.rand(rows, cols, generator=generator) < 0.2] = 0
    base = torch.where(torch.rand(rows, cols, generator=generator) < 0.2, tuned, tuned / 3)
    c = torch.rand(cols, generator=generator)
    scoring = Scoring(
        data.draw(st.sampled_from(SENSITIVITIES)),
        data.draw(st.sampled_from([0.0, 1e-30, 0.1, 0.5, 1.0])),
        data.draw(st.sampled_from(NORMALIZATIONS)),
    )
    expected = torch.from_numpy(spec_scores(base, tuned, c.numpy(), scoring))
    with chunk_sizes(data.draw(st.integers(1, 700)), 0):
        scores = score_pair(base, tuned, c, scoring)
    assert bool(scores.isfinite().all())
    assert same_bits(scores, expected)


@pytest.mark.parametrize("normalize", ["row_block", "row", "tensor"])
@pytest.mark.parametrize("shape", [(5, 300), (7, 129), (130, 3), (3, 1000)])
def test_order_of_the_sums(normalize: str, shape: tuple[int, int]) -> None:
    # Rounding to float32 hides the order of float64 sums from the scores, so look at the sums.
    base, tuned, c = make_pair(*shape)
    scoring = Scoring("obs", 0.5, normalize)
    with mock.patch.object(arithmetic, "_affine", wraps=arithmetic._affine) as affine:
        score_pair(base, tuned, c, scoring)
    for call, x in zip(affine.call_args_list, terms(base, tuned, c.numpy(), scoring), strict=True):
        _, s1, s2, n, w = call.args
        expected = [spec_sums(x[unit]) for unit in units(normalize, *shape)]
        sizes = [x[unit].size for unit in units(normalize, *shape)]
        assert s1.dtype == s2.dtype == n.dtype == torch.float64
        assert s1.flatten().tolist() == [one for one, _ in expected]
        assert s2.flatten().tolist() == [two for _, two in expected]
        assert n.expand_as(s1).flatten().tolist() == sizes
        assert w == 0.5


@pytest.mark.parametrize(("sensitivity", "normalize"), ALL)
@pytest.mark.parametrize("shape", [(9, 300), (40, 128), (3, 1)])
def test_definition_in_float64(sensitivity: str, normalize: str, shape: tuple[int, int]) -> None:
    base, tuned, c = make_pair(*shape, seed=5)
    for w in (0.0, 0.5, 1.0):
        scoring = Scoring(sensitivity, w, normalize)
        expected = torch.from_numpy(exact_scores(base, tuned, c.numpy(), scoring))
        plain = plain_scores(base, tuned, c.numpy(), scoring)
        assert_within(score_pair(base, tuned, c, scoring), expected, plain)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("shape", [(23, 300), (600, 40)])
def test_chunks_do_not_change_a_bit(normalize: str, shape: tuple[int, int]) -> None:
    base, tuned, c = make_pair(*shape, torch.bfloat16)
    scoring = Scoring("obs", 0.5, normalize)
    whole = score_pair(base, tuned, c, scoring)
    for chunk in (1, 299, 1201, 5000):
        with chunk_sizes(chunk, 0):
            assert same_bits(score_pair(base, tuned, c, scoring), whole)


@pytest.mark.parametrize("normalize", ["row_block", "row", "none"])
def test_rows_do_not_see_each_other(normalize: str) -> None:
    base, tuned, c = make_pair(20, 200)
    scoring = Scoring("diag", 0.5, normalize)
    order = torch.randperm(20)
    whole = score_pair(base, tuned, c, scoring)
    shuffled = score_pair(base[order], tuned[order], c, scoring)
    assert same_bits(shuffled, whole[order])


def test_blocks_do_not_see_each_other() -> None:
    base, tuned, c = make_pair(6, 300)
    scoring = Scoring("obs", 0.5, "row_block")
    whole = score_pair(base, tuned, c, scoring)
    parts = [
        score_pair(
            base[:, j : j + 128].contiguous(),
            tuned[:, j : j + 128].contiguous(),
            c[j : j + 128],
            scoring,
        )
        for j in (0, 128, 256)
    ]
    assert same_bits(torch.cat(parts, dim=1), whole)


def test_tensor_moments_serve_chunks_of_rows() -> None:
    base, tuned, c = make_pair(11, 150)
    scoring = Scoring("obs", 0.5, "tensor")
    whole = score_pair(base, tuned, c, scoring)
    known = scoring._replace(affine=tensor_affine(base, tuned, c, scoring))
    parts = [score_pair(base[i : i + 4], tuned[i : i + 4], c, known) for i in (0, 4, 8)]
    assert same_bits(torch.cat(parts), whole)


@pytest.mark.parametrize("normalize", ["row_block", "row", "tensor"])
@pytest.mark.parametrize("value", [0.1, 0.0, 3.0e38, 1e-42])
@pytest.mark.parametrize("cols", [1, 5, 100, 128, 129, 321])
def test_equal_elements_score_zero(normalize: str, value: float, cols: int) -> None:
    # 5 or 100 times 0.1 is not exact in float32; the differences from a pivot are.
    tuned = torch.full((3, cols), value)
    scores = score_pair(
        torch.zeros(3, cols), tuned, torch.ones(cols), Scoring("diag", 0.4, normalize)
    )
    assert not bool(scores.any())


@pytest.mark.parametrize("normalize", ["row_block", "row", "tensor"])
def test_unmeasurable_spread_scores_zero(normalize: str) -> None:
    tuned = torch.arange(130.0).expand(2, 130) * 2.0**-149
    scores = score_pair(
        torch.zeros(2, 130), tuned, torch.ones(130), Scoring("diag", 0.5, normalize)
    )
    assert not bool(scores.any())


def test_the_last_column_of_129_is_a_unit_of_one() -> None:
    base, tuned, c = make_pair(4, 129)
    scores = score_pair(base, tuned, c, Scoring("obs", 0.5, "row_block"))
    assert not bool(scores[:, 128].any())
    assert bool(scores[:, :128].all())


@pytest.mark.parametrize("normalize", ["row_block", "row", "tensor"])
def test_an_outlier_as_pivot_costs_no_accuracy(normalize: str) -> None:
    base, tuned, c = make_pair(8, 256)
    tuned[:, 0] += 1e4
    scoring = Scoring("diag", 0.5, normalize)
    expected = torch.from_numpy(exact_scores(base, tuned, c.numpy(), scoring))
    plain = plain_scores(base, tuned, c.numpy(), scoring)
    assert_within(score_pair(base, tuned, c, scoring), expected, plain)


def test_powers_of_two_cancel() -> None:
    base, tuned, c = make_pair(8, 256)
    scoring = Scoring("obs", 0.5, "row_block")
    scores = score_pair(base, tuned, c, scoring)
    assert same_bits(score_pair(base / 1024, tuned / 1024, c * 8, scoring), scores)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_threads_do_not_change_a_bit(
    normalize: str, set_num_threads: Callable[[int], None]
) -> None:
    base, tuned, c = make_pair(300, 1100, torch.float16)
    found = []
    for threads in (1, 2):
        set_num_threads(threads)
        found.append(score_pair(base, tuned, c, Scoring("obs", 0.5, normalize)))
    assert same_bits(*found)


def test_column_weight_is_not_read_without_sensitivity() -> None:
    base, tuned, _ = tied_pair(4, 130)
    scoring = Scoring("obs", 1.0, "none")
    scores = score_pair(base, tuned, torch.full((130,), float("nan")), scoring)
    assert same_bits(scores, score_pair(base, tuned, None, scoring))
    assert np.array_equal(scores.numpy(), np.abs(tuned.numpy()))
