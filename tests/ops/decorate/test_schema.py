"""Registration with torch: schemas, fakes, and what an explicit backend does."""

from typing import Any

import pytest
import torch

from tailor_fast._core.backend import BackendUnavailableError
from tailor_fast.ops.decorate import (
    decorate_exact,
    decorate_exact_,
    decorate_obs,
    decorate_obs_,
    decorate_official,
    decorate_official_,
    factor_obs,
)

from .problems import drawn

OPS = torch.ops.tailor_fast


def samples() -> dict[str, tuple[Any, ...]]:
    delta, mask, gram = drawn(4, 12, 30, 0.4, 0.0, 8)
    base = torch.randn(4, 12).bfloat16()
    tuned = (base + delta).bfloat16()
    rhs, energy = delta @ gram, torch.ones((), dtype=torch.float64)
    solver = (0.01, None, 1e-4, 100, "auto")
    factor = factor_obs(gram)
    official = (gram, None, 0.5, [0.5, 0.5], 8, 0.01, 0, 0, True, "auto")
    return {
        "decorate_exact": (delta, mask, gram, rhs, energy, *solver),
        "decorate_exact_": (tuned, base, mask, gram, None, None, *solver),
        "decorate_obs": (delta, mask, gram, 0.01, None, "auto"),
        "decorate_obs_": (tuned, base, mask, gram, 0.01, [*factor[:3]], "auto"),
        "factor_obs": (gram, 0.01, "auto"),
        "decorate_official": (base, tuned, *official),
        "decorate_official_": (tuned, base, *official),
    }


@pytest.mark.parametrize("name", sorted(samples()))
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(OPS, name).default, samples()[name])


def test_shapes_without_data() -> None:
    delta = torch.empty(6, 10, device="meta")
    mask = torch.empty(6, 10, dtype=torch.bool, device="meta")
    gram = torch.empty(10, 10, device="meta")
    weight = torch.empty(6, 10, dtype=torch.bfloat16, device="meta")
    base = torch.empty_like(weight)
    losses = [torch.float64] * 3 + [torch.int64]
    for result in (decorate_exact(delta, mask, gram), decorate_obs(delta, mask, gram)):
        assert result.patch.shape == delta.shape
        assert result.patch.dtype == torch.float32
        assert [value.dtype for value in result[1:]] == losses
        assert all(value.shape == () for value in result[1:])
    factor = factor_obs(gram)
    assert [part.shape for part in factor[:3]] == [(10, 10), (1, 128, 128), ()]
    assert decorate_obs(delta, mask, gram, factor=factor).patch.shape == delta.shape
    for numbers in (
        decorate_exact_(weight, base, mask, gram),
        decorate_obs_(weight, base, mask, gram),
    ):
        assert [value.dtype for value in numbers] == losses
    for official in (
        decorate_official(base, weight, gram, sparsity=0.9),
        decorate_official_(weight, base, gram, sparsity=0.9),
    ):
        assert official.weight.dtype == torch.bfloat16
        assert official.mask.dtype == torch.bool
        assert official.weight.shape == official.mask.shape == (6, 10)
        assert official.loss.dtype == torch.float64


def test_a_named_backend_never_falls_back(backend) -> None:
    delta, mask, gram = drawn(2, 5, 10, 0.4, 0.0, 9)
    auto = decorate_exact(delta, mask, gram)
    assert torch.equal(decorate_exact(delta, mask, gram, backend=backend).patch, auto.patch)
    with pytest.raises(BackendUnavailableError, match="decorate: backend 'cuda' is not implem"):
        decorate_exact(delta, mask, gram, backend="cuda")
    with pytest.raises(ValueError, match="decorate: backend must be one of"):
        decorate_exact(delta, mask, gram, backend="fastest")
