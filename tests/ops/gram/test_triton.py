"""The Triton backend of ``gram``: under the interpreter on CPU tensors, compiled on a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailor_fast._core.backend import why_unavailable
from tailor_fast.ops.gram import (
    accumulate_cross_gram_,
    accumulate_gram_,
    accumulate_gram_diag_,
)
from tailor_fast.testing import assert_within

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    why_unavailable("triton", DEVICE) is not None, reason=str(why_unavailable("triton", DEVICE))
)
kernels = pytest.importorskip("tailor_fast.ops.gram.triton")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TILE = kernels.NARROW.tile
OPS = torch.ops.tailor_fast


@pytest.fixture(scope="module", autouse=True)
def backend() -> None:
    """Once is enough: these tests name their backend."""


def inputs(tokens: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """Correlated columns of very different sizes, as a layer's inputs have them."""
    mixing = torch.randn(cols, cols) / cols**0.5
    x = (torch.randn(tokens, cols) @ mixing + 0.3) * torch.logspace(-2, 1, cols)
    return x.to(DEVICE, dtype)


def sum_so_far(cols: int) -> torch.Tensor:
    """Symmetric where it is read; what is above the diagonal must not be."""
    rows = torch.randn(2 * cols, cols, device=DEVICE)
    return (rows.T @ rows).tril() + torch.full((cols, cols), torch.nan, device=DEVICE).triu(1)


def check_all(x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None) -> None:
    options = {"token_mask": mask, "backend": "triton"}
    used, other = (x, y) if mask is None else (x[mask], y[mask])
    before = sum_so_far(x.shape[1])
    gram = accumulate_gram_(before.clone(), x, **options)
    before = before.tril() + before.tril(-1).T
    wide, plain = used.double(), used.float()
    assert torch.equal(gram, gram.T)
    assert_within(gram, before.double() + wide.T @ wide, before + plain.T @ plain)
    before = torch.randn(x.shape[1], y.shape[1], device=DEVICE)
    cross = accumulate_cross_gram_(before.clone(), x, y, **options)
    expected = before.double() + wide.T @ other.double()
    assert_within(cross, expected, before + plain.T @ other.float())
    before = torch.rand(x.shape[1], device=DEVICE)
    diag = accumulate_gram_diag_(before.clone(), x, **options)
    assert_within(diag, before.double() + wide.square().sum(0), before + plain.square().sum(0))


@settings(max_examples=25)
@given(
    tokens=st.sampled_from([0, 1, 15, 16, 17, 63, 65, 130, 257]),
    cols=st.sampled_from([1, 2, TILE - 1, TILE, TILE + 1, 2 * TILE + 5]),
    other=st.sampled_from([1, TILE + 3]),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    density=st.sampled_from([None, 0.0, 0.5, 1.0]),
)
def test_any_shape(
    tokens: int,
    cols: int,
    other: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    density: float | None,
) -> None:
    mask = None if density is None else torch.rand(tokens, device=DEVICE) < density
    check_all(inputs(tokens, cols, dtypes[0]), inputs(tokens, other, dtypes[1]), mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_segments_and_bands(monkeypatch, dtype: torch.dtype, masked: bool) -> None:
    """More tokens than one accumulator takes, more rows of tiles than one band has."""
    monkeypatch.setattr(kernels, "SEGMENT_TOKENS", 128)
    monkeypatch.setattr(kernels, "BAND_TILES", 2)
    mask = torch.rand(300, device=DEVICE) < 0.6 if masked else None
    check_all(inputs(300, 5 * TILE - 7, dtype), inputs(300, 3 * TILE + 1, dtype), mask)


@pytest.mark.parametrize("shared", [kernels.WIDE_SHARED, kernels.WIDE_SHARED - 1])
def test_wide_tiles(monkeypatch, shared: int) -> None:
    monkeypatch.setattr(kernels, "WIDE_FROM", 130)
    monkeypatch.setattr(kernels, "_shared_memory", lambda _device: shared)
    x, y = inputs(140, 270, torch.bfloat16), inputs(140, 131, torch.bfloat16)
    wide = shared == kernels.WIDE_SHARED
    assert kernels._tiling(x, y) is (kernels.WIDE if wide else kernels.NARROW)
    assert kernels._tiling(x[:, :129], y) is kernels.NARROW
    check_all(x, y, None)


def order_of(count: int, band: int) -> list[tuple[int, int]]:
    """Lower tiles in the order that the schedule promises, built without its arithmetic."""
    order = []
    for first in range(0, count, band):
        rows = range(first, min(first + band, count))
        order += [(row, col) for col in range(first) for row in rows]
        order += [(row, col) for row in rows for col in range(first, row + 1)]
    return order


@pytest.mark.skipif(DEVICE == "cuda", reason="calls a device function as the interpreter does")
@pytest.mark.parametrize("band", [1, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 9, 19])
def test_every_lower_tile_once_and_in_order(count: int, band: int) -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def places_kernel(out_ptr, tiles, BAND: tl.constexpr) -> None:  # noqa: N803  as triton spells it
        row, col = kernels._lower_tile(tl.program_id(0), tiles, BAND)
        tl.store(out_ptr + 2 * tl.program_id(0), row)
        tl.store(out_ptr + 2 * tl.program_id(0) + 1, col)

    places = torch.empty(count * (count + 1) // 2, 2, dtype=torch.int32)
    places_kernel[(len(places),)](places, count, BAND=band)
    assert [tuple(place) for place in places.tolist()] == order_of(count, band)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_that_do_not_count_leave_no_trace(dtype: torch.dtype) -> None:
    x, mask = inputs(90, 70, dtype), torch.rand(90, device=DEVICE) < 0.5
    spoiled = torch.where(mask[:, None], x, torch.nan)
    options = {"token_mask": mask, "backend": "triton"}
    for clean, other in zip(_sums(x, options), _sums(spoiled, options), strict=True):
        assert torch.equal(clean, other)
        assert bool(clean.isfinite().all())


def _sums(x: torch.Tensor, options: dict[str, object]) -> tuple[torch.Tensor, ...]:
    cols = x.shape[1]
    return (
        accumulate_gram_(torch.zeros(cols, cols, device=DEVICE), x, **options),
        accumulate_cross_gram_(torch.zeros(cols, cols, device=DEVICE), x, x, **options),
        accumulate_gram_diag_(torch.zeros(cols, device=DEVICE), x, **options),
    )


def test_same_bits_from_run_to_run() -> None:
    x, options = inputs(700, 90, torch.bfloat16), {"backend": "triton"}
    first = _sums(x, options)
    assert all(torch.equal(a, b) for a, b in zip(first, _sums(x, options), strict=True))


def test_half_precision_does_not_overflow() -> None:
    x = torch.full((4, 3), 60000.0, dtype=torch.float16, device=DEVICE)
    for total in _sums(x, {"backend": "triton"}):
        assert torch.equal(total, torch.full_like(total, 4 * 60000.0**2))


def test_diagonal_of_many_columns() -> None:
    x = torch.randn(kernels.DIAG_TOKENS + 9, 2 * kernels.DIAG_COLS + 5, device=DEVICE)
    diag = accumulate_gram_diag_(torch.zeros(x.shape[1], device=DEVICE), x, backend="triton")
    assert_within(diag, x.double().square().sum(0), x.square().sum(0))


@pytest.mark.parametrize("shape", [(5, 0), (0, 5), (0, 0)])
def test_nothing_to_add(shape: tuple[int, int]) -> None:
    for total in _sums(torch.empty(shape, device=DEVICE), {"backend": "triton"}):
        assert not bool(total.any())


def test_opcheck() -> None:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=DEVICE)

    x, y = torch.randn(5, 4, device=DEVICE), torch.randn(5, 3, device=DEVICE)
    for mask in (None, torch.tensor([True, False, True, True, False], device=DEVICE)):
        for op, tensors in [
            (OPS.accumulate_gram_, (zeros(4, 4), x)),
            (OPS.accumulate_cross_gram_, (zeros(4, 3), x, y)),
            (OPS.accumulate_gram_diag_, (zeros(4), x)),
        ]:
            torch.library.opcheck(op.default, (*tensors, mask, "triton"))
