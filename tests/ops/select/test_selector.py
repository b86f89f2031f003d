"""``TopKSelector`` against one sort of all scores, whatever the order, chunks and memory."""

import itertools
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailor_fast.ops.select import TopKSelector, kept_count, select_patch, selector
from tailor_fast.ops.select.options import NORMALIZATIONS, SENSITIVITIES, Scoring
from tests.ops.select.cases import DTYPES, chunk_sizes, make_pair, tied_pair
from tests.ops.select.oracle import lexsort_mask, spec_scores

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Tensors = dict[str, Triple]


def one_sort(tensors: Tensors, density: float, scoring: Scoring) -> dict[str, torch.Tensor]:
    """The masks by one sort of all scores, tensors in the order of their names."""
    names = sorted(tensors)
    scores = {}
    for name in names:
        base, tuned, c = tensors[name]
        scores[name] = spec_scores(base, tuned, c.numpy(), scoring)
    everything = np.concatenate([scores[name].reshape(-1) for name in names])
    flat = torch.from_numpy(lexsort_mask(everything, kept_count(everything.size, density)))
    parts = flat.split([scores[name].size for name in names])
    return {name: part.view(scores[name].shape) for name, part in zip(names, parts, strict=True)}


def observe(found: TopKSelector, tensors: Tensors, names: list[str], step: int) -> None:
    for name in names:
        base, tuned, c = tensors[name]
        for row in range(0, max(1, len(base)), step):
            part = slice(row, row + step)
            found.observe(name, base[part], tuned[part], c, first_row=row, rows=len(base))


def run(found: TopKSelector, tensors: Tensors, *, step: int = 10**9) -> int:
    """Observe until the threshold is exact; returns the rounds it took."""
    for rounds in itertools.count(1):
        observe(found, tensors, list(tensors), step)
        if found.finish():
            return rounds
    raise AssertionError


def masks(found: TopKSelector, tensors: Tensors) -> dict[str, torch.Tensor]:
    return {name: found.mask(name, *triple) for name, triple in tensors.items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert sorted(left) == sorted(right)
    for name in left:
        assert torch.equal(left[name], right[name]), name


def some_tensors(count: int, seed: int = 0, tied: bool = False) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i in range(count):
        rows, cols = (int(x) for x in torch.randint(1, 16, (2,), generator=generator))
        make = tied_pair if tied else make_pair
        tensors[f"layers.{i}.w"] = make(rows, cols * 13, seed=seed + i)
    return tensors


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_equals_one_sort(sensitivity: str, normalize: str) -> None:
    tensors = {f"layers.{i}.w": make_pair(9, 140, DTYPES[i % 3], seed=i) for i in range(12)}
    found = TopKSelector(0.07, sensitivity=sensitivity, normalize=normalize)
    assert run(found, tensors) == 1
    expected = one_sort(tensors, 0.07, Scoring(sensitivity, 0.5, normalize))
    assert_same(masks(found, tensors), expected)
    for name, mask in expected.items():
        assert found.kept(name) == int(mask.sum())


@settings(max_examples=100)
@given(st.data())
def test_equals_one_sort_whatever_the_way(data: st.DataObject) -> None:
    tensors = some_tensors(
        data.draw(st.integers(1, 6)), data.draw(st.integers(0, 10**6)), data.draw(st.booleans())
    )
    density = data.draw(st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9, 1.0]))
    w = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    normalize = data.draw(st.sampled_from(NORMALIZATIONS))
    memory = data.draw(st.sampled_from([0, 4, 40, 400, 4000, 2**26]))
    found = TopKSelector(
        density, sensitivity="diag", salience_weight=w, normalize=normalize, memory=memory
    )
    with mock.patch.object(selector, "SLICE", data.draw(st.integers(1, 1000))):
        for _ in range(3):
            names = data.draw(st.permutations(list(tensors)))
            step = 10**9 if normalize == "tensor" else data.draw(st.integers(1, 16))
            observe(found, tensors, names, step)
            if found.finish():
                break
    expected = one_sort(tensors, density, Scoring("diag", w, normalize))
    assert_same(masks(found, tensors), expected)
    assert {name: found.kept(name) for name in tensors} == {
        name: int(mask.sum()) for name, mask in expected.items()
    }


def test_a_single_tensor_is_scope_tensor() -> None:
    base, tuned, c = make_pair(30, 333, torch.bfloat16)
    found = TopKSelector(0.1)
    run(found, {"w": (base, tuned, c)})
    assert torch.equal(found.mask("w", base, tuned, c), select_patch(base, tuned, c))


def test_one_round_while_all_keys_fit() -> None:
    tensors = some_tensors(8, tied=True)
    elements = sum(base.numel() for base, _, _ in tensors.values())
    assert run(TopKSelector(0.1, memory=4 * elements), tensors) == 1


def test_one_round_in_a_tenth_of_the_memory_when_tensors_are_alike() -> None:
    tensors = {f"{i}": make_pair(64, 128, seed=i) for i in range(40)}
    elements = sum(base.numel() for base, _, _ in tensors.values())
    found = TopKSelector(0.1, memory=4 * elements // 10)
    with mock.patch.object(selector, "SLICE", 4096):
        assert run(found, tensors) == 1
    assert_same(masks(found, tensors), one_sort(tensors, 0.1, Scoring("obs", 0.5, "row_block")))


def drifting() -> Tensors:
    """Tensors whose scores grow from one to the next: early estimates are wrong."""
    tensors = {}
    for i in range(10):
        base, tuned, c = make_pair(16, 64, seed=i)
        tensors[f"t{i}"] = (base * 4**i, tuned * 4**i, c)
    return tensors


def test_a_wrong_estimate_costs_a_second_round() -> None:
    tensors = drifting()
    found = TopKSelector(0.3, normalize="none", salience_weight=1, memory=400)
    assert run(found, tensors) == 2
    assert_same(masks(found, tensors), one_sort(tensors, 0.3, Scoring("obs", 1.0, "none")))


def test_a_threshold_just_above_the_interval_costs_a_second_round() -> None:
    # One key is held, the 5; the five best of all, 6 to 11, lie exactly above it.
    c = torch.ones(8)
    first, second = torch.arange(1.0, 9.0)[None], torch.tensor([[10.0, 11.0]])
    tensors = {
        "a": (torch.zeros(1, 8), first, c),
        "b": (torch.zeros(1, 2), second, c[:2].clone()),
    }
    found = TopKSelector(0.5, normalize="none", salience_weight=1, memory=4)
    assert run(found, tensors) == 2
    assert found.mask("a", *tensors["a"]).tolist() == [[False] * 5 + [True] * 3]
    assert found.mask("b", *tensors["b"]).tolist() == [[True] * 2]


def test_a_third_round_when_a_bin_does_not_fit() -> None:
    # Two tie classes in one bin of 2**16 keys, each larger than the memory.
    ladder = torch.tensor([1.0, 1.0 + 2.0**-23, 64.0]).repeat(100, 40)
    late = torch.full((100, 120), 1.0 + 2.0**-22)
    c = torch.ones(120)
    zero = torch.zeros(100, 120)
    tensors = {"a": (zero, ladder, c), "b": (zero, late, c)}
    found = TopKSelector(0.25, normalize="none", salience_weight=1, memory=400)
    assert run(found, tensors) == 3
    expected = one_sort(tensors, 0.25, Scoring("obs", 1.0, "none"))
    assert_same(masks(found, tensors), expected)
    assert 0 < int(expected["b"].sum()) < late.numel()


def with_a_tie_class(rows: int, cols: int, seed: int) -> Triple:
    """A pair of which six scores in ten, the median among them, are equal."""
    base, tuned, c = make_pair(rows, cols, seed=seed)
    delta = (tuned - base).abs()
    common = (delta > delta.quantile(0.2)) & (delta < delta.quantile(0.8))
    return torch.zeros_like(base), torch.where(common, 0.002, delta), c


@pytest.mark.parametrize("make", [make_pair, with_a_tie_class])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.79])
def test_held_keys_stay_within_memory(make: Callable[..., Triple], density: float) -> None:
    tensors = {f"{i}": make(32, 128, seed=i) for i in range(20)}
    found = TopKSelector(density, normalize="none", salience_weight=1, memory=12_000)
    with mock.patch.object(selector, "SLICE", 128):
        for name, triple in tensors.items():
            found.observe(name, *triple)
            assert found._search._held() <= 3000
            assert found._search._keys.nbytes <= 12_000 + 4 * 128
    assert found.finish()
    assert found._search._keys.nbytes == 0
    assert_same(masks(found, tensors), one_sort(tensors, density, Scoring("obs", 1.0, "none")))


def test_masks_in_chunks_of_rows_repeat_and_restart() -> None:
    tensors = some_tensors(3, seed=4, tied=True)
    found = TopKSelector(0.35, sensitivity="diag", normalize="none")
    run(found, tensors, step=3)
    expected = one_sort(tensors, 0.35, Scoring("diag", 0.5, "none"))
    for name in ("layers.2.w", "layers.0.w", "layers.2.w"):
        base, tuned, c = tensors[name]
        rows = len(base)
        found.mask(name, base[:1], tuned[:1], c, rows=rows)  # given up: row 0 starts again
        parts = [
            found.mask(name, base[i : i + 4], tuned[i : i + 4], c, first_row=i, rows=rows)
            for i in range(0, rows, 4)
        ]
        assert torch.equal(torch.cat(parts), expected[name])


def test_ties_follow_sorted_names() -> None:
    zero, c = torch.zeros(1, 4), torch.ones(4)
    tensors = {name: (zero, torch.ones(1, 4), c) for name in ("b", "a10", "a9")}
    found = TopKSelector(0.5, normalize="none")
    run(found, tensors)
    assert found.mask("a10", *tensors["a10"]).tolist() == [[True] * 4]
    assert found.mask("a9", *tensors["a9"]).tolist() == [[True, True, False, False]]
    assert found.mask("b", *tensors["b"]).tolist() == [[False] * 4]


def test_more_elements_than_32_bits_count() -> None:
    zero, c = torch.zeros(1, 4), torch.ones(4)
    tuned = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    found = TopKSelector(0.5, normalize="none", salience_weight=1)
    found.observe("w", zero, tuned, c)
    # As if 2**33 elements above and as many below had gone by.
    huge = 2**33
    found._search.counts[[60_000, 100]] += huge
    found._search.add("v", 0, huge)
    assert found.finish()
    assert found.kept("w") == 2
    assert found._found is not None
    assert found._found.shares["v"].kept == huge
    assert found.mask("w", zero, tuned, c).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_empty_tensors_take_part(shape: tuple[int, int]) -> None:
    tensors = {"a": make_pair(*shape), "b": make_pair(6, 10)}
    found = TopKSelector(0.5)
    run(found, tensors)
    assert found.mask("a", *tensors["a"]).shape == shape
    assert torch.equal(found.mask("b", *tensors["b"]), select_patch(*tensors["b"], density=0.5))


def test_chunk_sizes_of_the_reference_do_not_matter() -> None:
    tensors = some_tensors(5, seed=9)
    whole = TopKSelector(0.1, normalize="tensor")
    run(whole, tensors)
    expected = masks(whole, tensors)
    with chunk_sizes(50, 0):
        found = TopKSelector(0.1, normalize="tensor")
        run(found, tensors)
        assert_same(masks(found, tensors), expected)
