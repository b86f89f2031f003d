"""Triangular roots by blocks, and the diagonal of an inverse made from them, against float64."""

from collections.abc import Iterator

import pytest
import torch

from tailor_fast.testing import assert_within
from tests.backends import KERNELS, needs_native, on_kernels

pytestmark = needs_native
roots = pytest.importorskip("tailor_fast.ops.roots")

# Edges of a block (128 columns) and of a panel (512).
SIZES = [1, 127, 128, 129, 511, 640, 700]


@pytest.fixture(params=KERNELS)
def provider(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels of one instruction set, or torch in their place."""
    yield from on_kernels(request.param)


def matrix(cols: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A positive definite matrix whose neighbours are correlated."""
    generator = torch.Generator().manual_seed(cols)
    x = torch.randn(cols + 64, cols, generator=generator).cumsum(1)
    return (x.T @ x / len(x) + 0.3 * torch.eye(cols)).to(dtype)


@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("cols", SIZES)
def test_a_root_of_every_size_in_both_directions(provider: str, cols: int, forward: bool) -> None:
    given = matrix(cols)
    root = given.clone()
    inverses = roots.factorize_(root, forward=forward)
    root = root.tril() if forward else root.triu()
    if forward:
        plain = torch.linalg.cholesky(given)
    else:
        plain = torch.linalg.cholesky(given.flip(0, 1)).flip(0, 1)
    assert_within(root @ root.T, given.double(), plain @ plain.T)
    assert [len(block) for block in inverses] == [
        min(roots.BLOCK, cols - start) for start in range(0, cols, roots.BLOCK)
    ]
    for number, block in enumerate(inverses):
        own = slice(number * roots.BLOCK, number * roots.BLOCK + len(block))
        square = root[own, own]
        assert_within(block, torch.linalg.inv(square.double()), torch.linalg.inv(square))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cols", SIZES)
def test_the_inverse_from_any_column_on(provider: str, cols: int, dtype: torch.dtype) -> None:
    given = matrix(cols, dtype)
    truth = torch.linalg.inv(given.double()).diagonal()
    plain = torch.linalg.inv(given.float()).diagonal()
    for first in sorted({0, cols // 3, cols // 2, cols - 1}):
        lower = given.clone()
        inverses = roots.factorize_(lower, forward=True)
        before = lower[:, :first].clone()
        lower[torch.ones(cols, cols).triu(1).bool()] = torch.nan  # has no meaning
        lower.triu(1).fill_(torch.nan)
        found = roots.inverse_diagonal_(lower, inverses, first)
        assert found.dtype == dtype
        assert_within(torch.cat([truth[:first], found.double()]), truth, plain)
        assert torch.equal(lower[:, :first].tril(), before.tril())


@pytest.mark.parametrize("cols", [1, 129, 600])
@pytest.mark.parametrize("forward", [False, True])
def test_what_is_not_positive_definite_has_none(provider: str, cols: int, forward: bool) -> None:
    given = matrix(cols)
    given[cols // 2, cols // 2] = -1.0
    assert roots.factorize_(given, forward=forward) is None
