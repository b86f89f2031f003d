"""The ``gram`` op on CUDA tensors."""

import pytest
import torch

from tailor_fast.ops.gram import (
    accumulate_cross_gram_,
    accumulate_gram_,
    accumulate_gram_diag_,
)
from tailor_fast.ops.gram.reference import CHUNK_TOKENS
from tailor_fast.testing import assert_within
from tests.ops.gram.test_gram import inputs

pytestmark = pytest.mark.gpu


def sums(x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=x.device)

    cols = x.shape[1]
    return (
        accumulate_gram_(zeros(cols, cols), x, token_mask=mask),
        accumulate_cross_gram_(zeros(cols, 8), x, x[:, :8].contiguous(), token_mask=mask),
        accumulate_gram_diag_(zeros(cols), x, token_mask=mask),
    )


@pytest.mark.parametrize("tokens", [0, 1, CHUNK_TOKENS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_float64(dtype: torch.dtype, tokens: int) -> None:
    x = inputs(tokens, 600, dtype).cuda()
    mask = torch.rand(tokens, device="cuda") < 0.7
    wide, plain = x[mask].double(), x[mask].float()
    got = sums(x, mask)
    assert torch.equal(got[0], got[0].T)
    assert_within(got[0], wide.T @ wide, plain.T @ plain)
    assert_within(got[1], wide.T @ wide[:, :8], plain.T @ plain[:, :8])
    assert_within(got[2], wide.square().sum(0), plain.square().sum(0))


def test_same_bits_from_run_to_run() -> None:
    x = inputs(CHUNK_TOKENS + 1, 600, torch.bfloat16).cuda()
    mask = torch.rand(x.shape[0], device="cuda") < 0.7
    first = sums(x, mask)
    assert all(torch.equal(a, b) for a, b in zip(first, sums(x, mask), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_columns_and_segments(dtype: torch.dtype) -> None:
    """Wide tiles, several bands of them, and more tokens than one accumulator takes."""
    x = inputs(5000, 2304, dtype).cuda()
    got = accumulate_gram_(torch.zeros(2304, 2304, device="cuda"), x)
    wide, plain = x.double(), x.float()
    assert torch.equal(got, got.T)
    assert_within(got, wide.T @ wide, plain.T @ plain)
