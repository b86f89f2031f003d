"""The in-place forms: the functional result, rounded once, and base's very words elsewhere."""

import pytest
import torch

from tailor_fast.ops.decorate import (
    decorate_exact,
    decorate_exact_,
    decorate_obs,
    decorate_obs_,
    decorate_official,
    decorate_official_,
    native,
    reference,
)

from .problems import drawn

WORDS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
DTYPES = list(WORDS)
SHAPES = [(1, 40), (23, 150)]


def words(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(WORDS[tensor.dtype])


def layer(
    shape: tuple[int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tuned and base weight, mask and Gram; base holds both zeros, which arithmetic would merge."""
    problem = drawn(*shape, tokens=2 * shape[1], density=0.3, decades=1.0, seed=7)
    base = 0.02 * torch.randn(shape)
    base[:, ::5], base[:, 1::5] = -0.0, 0.0
    return (base + problem.delta).to(dtype), base.to(dtype), problem.mask, problem.gram


def check(weight, base, mask, patch, before) -> None:
    expected = torch.where(mask, (base.float() + patch).to(base.dtype), base)
    assert torch.equal(words(weight), words(expected))
    assert torch.equal(words(base), words(before))
    assert bool((words(weight) != words(base)).any())


@pytest.fixture(autouse=True)
def _many_tiles(monkeypatch) -> None:
    monkeypatch.setattr(reference, "EXACT_TILE", 10 * 150)
    monkeypatch.setattr(reference, "OBS_TILE", 10 * 150)
    monkeypatch.setattr(native, "TILE", 10 * 150)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("right_side", [False, True])
def test_exact(shape: tuple[int, int], dtype: torch.dtype, right_side: bool) -> None:
    weight, base, mask, gram = layer(shape, dtype)
    before, delta = base.clone(), weight.float() - base.float()
    rhs = 1.1 * delta @ gram if right_side else None
    options = {"rhs": rhs, "percdamp": 0.05, "target_energy": 2.0 if right_side else None}
    functional = decorate_exact(delta, mask, gram, **options)
    in_place = decorate_exact_(weight, base, mask, gram, **options)
    check(weight, base, mask, functional.patch, before)
    assert all(torch.equal(a, b) for a, b in zip(functional[1:], in_place, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_obs(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, base, mask, gram = layer(shape, dtype)
    before, delta = base.clone(), weight.float() - base.float()
    functional = decorate_obs(delta, mask, gram, percdamp=0.05)
    in_place = decorate_obs_(weight, base, mask, gram, percdamp=0.05)
    check(weight, base, mask, functional.patch, before)
    assert all(torch.equal(a, b) for a, b in zip(functional[1:], in_place, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"prunen": 2, "prunem": 4}])
def test_official(shape: tuple[int, int], dtype: torch.dtype, options: dict[str, int]) -> None:
    weight, base, _, gram = layer(shape, dtype)
    before = base.clone()
    functional = decorate_official(base, weight, gram, sparsity=0.8, **options)
    in_place = decorate_official_(weight, base, gram, sparsity=0.8, **options)
    assert in_place.weight is weight
    assert torch.equal(words(weight), words(functional.weight))
    assert torch.equal(words(base), words(before))
    dropped = ~functional.mask
    assert bool(dropped.any())
    assert torch.equal(words(weight)[dropped], words(base)[dropped])
    assert torch.equal(in_place.mask, functional.mask)
    assert torch.equal(in_place.loss, functional.loss)
