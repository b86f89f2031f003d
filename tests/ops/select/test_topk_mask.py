"""``topk_mask`` against a full sort, over every kind of float."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailor_fast.ops.select import topk_mask
from tailor_fast.ops.select.radix import float_keys, locate, mark_
from tests.ops.select.cases import DTYPES, chunk_sizes
from tests.ops.select.oracle import lexsort_mask

SPECIAL = [0.0, -0.0, 1.0, -1.0, 1.5, float("inf"), -float("inf"), 2.0**-149, -(2.0**-149)]
SPECIAL += [2.0**-24, -(2.0**-24), 65504.0, 1e-40, 3.0e38, -3.0e38]


def expected(scores: torch.Tensor, k: int) -> torch.Tensor:
    return torch.from_numpy(lexsort_mask(scores.float().numpy(), k))


@settings(max_examples=100)
@given(st.data())
def test_equals_a_stable_sort(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    number = st.one_of(st.sampled_from(SPECIAL), st.floats(allow_nan=False, width=32))
    values = data.draw(st.lists(number, max_size=60))
    scores = torch.tensor(values, dtype=torch.float32).to(dtype)
    k = data.draw(st.integers(0, len(values)))
    with chunk_sizes(data.draw(st.integers(1, 61)), 0):
        mask = topk_mask(scores, k)
    assert mask.dtype == torch.bool
    assert int(mask.sum()) == k
    assert torch.equal(mask, expected(scores, k))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 1000, 33333, 60000])
def test_every_16_bit_number(dtype: torch.dtype, k: int) -> None:
    words = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    scores = words[torch.randperm(words.numel())].view(dtype)
    scores = scores[~scores.isnan()]
    assert torch.equal(topk_mask(scores, k), expected(scores, k))


def test_keys_have_the_order_of_floats() -> None:
    edges = [0, 1, 0x007FFFFF, 0x00800000, 0x3F800000, 0x7F7FFFFF, 0x7F800000]
    words = torch.randint(0, 0x7F800000, (20000,), dtype=torch.int32)
    words = torch.cat([words, torch.tensor(edges, dtype=torch.int32)])
    values = torch.cat([words.view(torch.float32), -words.view(torch.float32)])
    keys = float_keys(values).numpy()
    by_value = np.argsort(values.numpy(), kind="stable")
    assert (np.argsort(keys, kind="stable") == by_value).all()
    assert float_keys(torch.tensor([-0.0, 0.0])).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4), (0,), (4, 0)])
def test_any_rank_and_every_k(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    scores = torch.randint(-3, 4, shape).to(dtype)
    for k in range(scores.numel() + 1):
        mask = topk_mask(scores, k)
        assert mask.shape == scores.shape
        assert torch.equal(mask, expected(scores, k))


@pytest.mark.parametrize("value", [0.0, -0.0, -7.0, float("inf"), -float("inf"), 2.0**-149])
def test_all_equal_takes_the_first(value: float) -> None:
    mask = topk_mask(torch.full((4, 9), value), 10)
    assert mask.flatten().tolist() == [True] * 10 + [False] * 26


def test_zeros_of_both_signs_are_one_tie() -> None:
    scores = torch.tensor([-1.0, -0.0, 0.0, -0.0, 0.0])
    assert topk_mask(scores, 3).tolist() == [False, True, True, True, False]


def test_subnormals_are_not_flushed() -> None:
    scores = torch.tensor([0.0, 2.0**-149, 2.0**-148, -(2.0**-149)])
    assert topk_mask(scores, 1).tolist() == [False, False, True, False]
    assert topk_mask(scores, 2).tolist() == [False, True, True, False]
    assert topk_mask(scores, 3).tolist() == [True, True, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0, 3, 40])
def test_nan_is_named_by_its_first_index(dtype: torch.dtype, k: int) -> None:
    scores = torch.zeros(5, 8, dtype=dtype)
    scores[2, 3] = scores[4, 1] = float("nan")
    with chunk_sizes(6, 0), pytest.raises(ValueError, match=r"^topk_mask: scores .* index 19$"):
        topk_mask(scores, k)


def test_counts_beyond_32_bits() -> None:
    huge = 2**33
    counts = torch.tensor([[5, huge, 3, huge]])
    for rank, place in [
        (1, (3, 0)),
        (huge, (3, 0)),
        (huge + 3, (2, huge)),
        (huge + 4, (1, huge + 3)),
    ]:
        digit, above = locate(counts, torch.tensor([rank]))
        assert (int(digit), int(above)) == place
    ties = torch.tensor([huge])
    keys = torch.tensor([[7, 5, 7, 9]], dtype=torch.int32)
    mask = mark_(keys, torch.tensor([7], dtype=torch.int32), ties)
    assert mask.tolist() == [[True, False, True, True]]
    assert ties.tolist() == [huge - 2]


def test_does_not_depend_on_threads(set_num_threads: Callable[[int], None]) -> None:
    scores = torch.randn(300_000).half()
    masks = []
    for threads in (1, 2):
        set_num_threads(threads)
        masks.append(topk_mask(scores, 12_345))
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], expected(scores, 12_345))
