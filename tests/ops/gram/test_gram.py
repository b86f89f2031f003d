"""The ``gram`` op against float64, and what it promises beyond closeness."""

import pytest
import torch

from tailor_fast.ops.gram import (
    accumulate_cross_gram_,
    accumulate_gram_,
    accumulate_gram_diag_,
)
from tailor_fast.ops.gram.reference import CHUNK_TOKENS, PANEL_COLS
from tailor_fast.testing import assert_within

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS = [0, 1, 63, CHUNK_TOKENS - 1, CHUNK_TOKENS, CHUNK_TOKENS + 1]
OPS = torch.ops.tailor_fast


def inputs(tokens: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """Correlated columns of very different sizes, as a layer's inputs have them."""
    scale = torch.logspace(-2, 1, cols)
    mixing = torch.randn(cols, cols) / cols**0.5
    return ((torch.randn(tokens, cols) @ mixing + 0.3) * scale).to(dtype)


def symmetric(cols: int) -> torch.Tensor:
    """A sum so far."""
    rows = torch.randn(2 * cols, cols)
    return accumulate_gram_(torch.zeros(cols, cols), rows)


def flip_mask(tokens: int) -> torch.Tensor:
    return torch.rand(tokens) < 0.5


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_full(tokens: int, dtype: torch.dtype, masked: bool) -> None:
    x, before = inputs(tokens, 37, dtype), symmetric(37)
    mask = flip_mask(tokens) if masked else None
    used = x if mask is None else x[mask]
    gram = accumulate_gram_(before.clone(), x, token_mask=mask)
    wide = used.double()
    assert_within(gram, before.double() + wide.T @ wide, before + used.float().T @ used.float())
    assert torch.equal(gram, gram.T)


@pytest.mark.parametrize(
    "cols", [1, PANEL_COLS - 1, PANEL_COLS, PANEL_COLS + 1, 2 * PANEL_COLS + 3]
)
def test_full_across_column_panels(cols: int) -> None:
    x, before = inputs(90, cols, torch.float32), symmetric(cols)
    gram = accumulate_gram_(before.clone(), x)
    assert_within(gram, before.double() + x.double().T @ x.double(), before + x.T @ x)
    assert torch.equal(gram, gram.T)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_cross(tokens: int, dtype: torch.dtype, masked: bool) -> None:
    x, y = inputs(tokens, 19, dtype), inputs(tokens, 41, dtype)
    before = torch.randn(19, 41)
    mask = flip_mask(tokens) if masked else None
    left, right = (x, y) if mask is None else (x[mask], y[mask])
    cross = accumulate_cross_gram_(before.clone(), x, y, token_mask=mask)
    expected = before.double() + left.double().T @ right.double()
    assert_within(cross, expected, before + left.float().T @ right.float())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [*TOKENS, 127, 128, 129])
def test_diag(tokens: int, dtype: torch.dtype, masked: bool) -> None:
    x, before = inputs(tokens, 37, dtype), torch.rand(37)
    mask = flip_mask(tokens) if masked else None
    used = x if mask is None else x[mask]
    diag = accumulate_gram_diag_(before.clone(), x, token_mask=mask)
    plain = before + used.float().square().sum(0)
    assert_within(diag, before.double() + used.double().square().sum(0), plain)


def test_only_the_lower_triangle_is_read() -> None:
    """So the two triangles cannot drift apart, however a GEMM rounds them."""
    cols = PANEL_COLS + 90
    x, before = inputs(40, cols, torch.float32), symmetric(cols)
    gram = accumulate_gram_(before + torch.full_like(before, 9.0).triu(1), x)
    assert torch.equal(gram, accumulate_gram_(before, x))
    assert torch.equal(gram, gram.T)


def test_returns_what_it_changed() -> None:
    x, gram, cross, diag = torch.randn(5, 3), torch.zeros(3, 3), torch.zeros(3, 3), torch.zeros(3)
    assert accumulate_gram_(gram, x) is gram
    assert accumulate_cross_gram_(cross, x, x) is cross
    assert accumulate_gram_diag_(diag, x) is diag
    assert bool(gram.any())
    assert bool(cross.any())
    assert bool(diag.any())


def test_half_precision_does_not_overflow() -> None:
    x = torch.full((4, 3), 60000.0, dtype=torch.float16)
    exact = 4 * 60000.0**2  # representable in float32 to one rounding, far beyond float16
    assert torch.equal(accumulate_gram_(torch.zeros(3, 3), x), torch.full((3, 3), exact))
    assert torch.equal(accumulate_gram_diag_(torch.zeros(3), x), torch.full((3,), exact))


@pytest.mark.parametrize("threads", [1, 2])
def test_same_bits_from_run_to_run(threads: int, set_num_threads) -> None:
    set_num_threads(threads)
    x, y = (
        inputs(CHUNK_TOKENS + 300, 130, torch.bfloat16),
        inputs(CHUNK_TOKENS + 300, 70, torch.float16),
    )

    def run() -> tuple[torch.Tensor, ...]:
        return (
            accumulate_gram_(torch.zeros(130, 130), x),
            accumulate_cross_gram_(torch.zeros(130, 70), x, y),
            accumulate_gram_diag_(torch.zeros(130), x),
        )

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_masked_tokens_leave_no_trace() -> None:
    """Within one chunk a mask gives the bits of the inputs without those tokens, NaN and all."""
    x, mask = inputs(100, 33, torch.bfloat16), flip_mask(100)
    x[~mask] = float("nan")
    kept = x[mask]
    masked = accumulate_gram_(torch.zeros(33, 33), x, token_mask=mask)
    assert torch.equal(masked, accumulate_gram_(torch.zeros(33, 33), kept))
    masked = accumulate_cross_gram_(torch.zeros(33, 33), x, x, token_mask=mask)
    assert torch.equal(masked, accumulate_cross_gram_(torch.zeros(33, 33), kept, kept))
    masked = accumulate_gram_diag_(torch.zeros(33), x, token_mask=mask)
    assert torch.equal(masked, accumulate_gram_diag_(torch.zeros(33), kept))


def test_no_token_counted_changes_nothing() -> None:
    x, gram = inputs(300, 17, torch.float32), symmetric(17)
    none = torch.zeros(300, dtype=torch.bool)
    assert torch.equal(accumulate_gram_(gram.clone(), x, token_mask=none), gram)
    assert torch.equal(accumulate_cross_gram_(gram.clone(), x, x, token_mask=none), gram)
    diag = gram.diagonal().clone()
    assert torch.equal(accumulate_gram_diag_(diag.clone(), x, token_mask=none), diag)


def test_batches_add_up() -> None:
    x, y = inputs(400, 23, torch.float32), inputs(400, 29, torch.float32)
    gram, cross, diag = torch.zeros(23, 23), torch.zeros(23, 29), torch.zeros(23)
    for part in (slice(0, 150), slice(150, 400)):
        accumulate_gram_(gram, x[part])
        accumulate_cross_gram_(cross, x[part], y[part])
        accumulate_gram_diag_(diag, x[part])
    assert_within(gram, x.double().T @ x.double(), x.T @ x)
    assert_within(cross, x.double().T @ y.double(), x.T @ y)
    assert_within(diag, x.double().square().sum(0), x.square().sum(0))


@pytest.mark.parametrize("mask", [None, torch.tensor([True, False, True, True, False])])
def test_opcheck(mask: torch.Tensor | None) -> None:
    x, y = torch.randn(5, 4), torch.randn(5, 3)
    for backend in ("auto", "reference"):
        torch.library.opcheck(OPS.accumulate_gram_.default, (torch.zeros(4, 4), x, mask, backend))
        torch.library.opcheck(
            OPS.accumulate_cross_gram_.default, (torch.zeros(4, 3), x, y, mask, backend)
        )
        torch.library.opcheck(OPS.accumulate_gram_diag_.default, (torch.zeros(4), x, mask, backend))


def test_meta_tensors_pass_through() -> None:
    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    mask = torch.empty(7, dtype=torch.bool, device="meta")
    assert accumulate_gram_(meta(4, 4), meta(7, 4), token_mask=mask).shape == (4, 4)
    assert accumulate_cross_gram_(meta(4, 3), meta(7, 4), meta(7, 3)).shape == (4, 3)
    assert accumulate_gram_diag_(meta(4), meta(7, 4)).is_meta


def test_the_compiler_sees_the_mutation() -> None:
    """Functionalisation must keep the update: the schema marks it."""

    def step(x: torch.Tensor) -> torch.Tensor:
        gram = torch.zeros(x.shape[1], x.shape[1])
        accumulate_gram_(gram, x)
        return gram * 2

    x = torch.randn(6, 4)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), step(x))
