"""What the C++ backend of ``gram`` promises beyond what every backend does."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailor_fast.ops.gram import (
    accumulate_cross_gram_,
    accumulate_gram_,
    accumulate_gram_diag_,
)
from tailor_fast.testing import assert_within
from tests.backends import KERNELS, needs_native, on_kernels

pytestmark = needs_native
native = pytest.importorskip("tailor_fast.ops.gram.native")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TASK = native._C.GRAM_DIAGONAL_TOKENS


@pytest.fixture(scope="module", autouse=True, params=KERNELS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """These tests name their backend; they run once per set of kernels."""
    yield from on_kernels(request.param)


def sums(x: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    cols = x.shape[1]
    options = {"token_mask": mask, "backend": "native"}
    return (
        accumulate_gram_(torch.zeros(cols, cols), x, **options),
        accumulate_cross_gram_(torch.zeros(cols, cols), x, x, **options),
        accumulate_gram_diag_(torch.zeros(cols), x, **options),
    )


@settings(max_examples=80)
@given(
    tokens=st.sampled_from([0, 1, 7, 8, 9, 17, TASK - 1, TASK, TASK + 9]),
    cols=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    density=st.sampled_from([None, 0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(
    tokens: int, cols: int, dtype: torch.dtype, density: float | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (10 * torch.randn(tokens, cols, generator=generator)).to(dtype)
    mask = None if density is None else torch.rand(tokens, generator=generator) < density
    used = x if mask is None else x[mask]
    gram, cross, diag = sums(x, mask)
    wide, plain = used.double(), used.float()
    assert_within(gram, wide.T @ wide, plain.T @ plain)
    assert_within(cross, wide.T @ wide, plain.T @ plain)
    assert_within(diag, wide.square().sum(0), plain.square().sum(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_word_is_converted_exactly(dtype: torch.dtype) -> None:
    words = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    for cols in (64, 1):  # whole vectors, and the tail that is shorter than one
        x = words.view(-1, cols)
        out = torch.empty(x.shape)
        native._C.gram_convert(
            x.data_ptr(), native._KINDS[dtype], cols, 0, 0, len(x), out.data_ptr(), 1
        )
        numbers = ~x.isnan()
        assert torch.equal(out[numbers].view(torch.int32), x.float()[numbers].view(torch.int32))
        assert bool(out[~numbers].isnan().all())


def test_squares_do_not_overflow_or_vanish_before_they_must() -> None:
    x = torch.tensor([[3e38, 1e-30, 65504.0]])
    expected = torch.tensor([float("inf"), 0.0, 65504.0**2])
    assert torch.equal(accumulate_gram_diag_(torch.zeros(3), x, backend="native"), expected)


def test_the_diagonal_has_the_same_bits_at_any_number_of_threads(set_num_threads) -> None:
    x = torch.randn(5 * TASK + 77, 300).bfloat16()
    mask = torch.rand(len(x)) < 0.8
    results = []
    for threads in (1, 2, 3):
        set_num_threads(threads)
        results.append([sums(x, some)[2] for some in (None, mask)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_views(dtype: torch.dtype) -> None:
    x = torch.randn(130, 37).to(dtype)
    memory = torch.empty(x.numel() + 1, dtype=dtype)
    memory[1:] = x.flatten()
    moved = memory[1:].view(x.shape)
    assert moved.data_ptr() % 64 != 0
    assert all(torch.equal(a, b) for a, b in zip(sums(x), sums(moved), strict=True))


def test_conversion_uses_one_buffer(monkeypatch) -> None:
    seen = []
    convert = native._C.gram_convert

    class Spy:
        @staticmethod
        def gram_convert(*arguments: int) -> None:
            seen.append(arguments[6])
            convert(*arguments)

    monkeypatch.setattr(native, "_C", Spy)
    monkeypatch.setattr(native, "CHUNK_TOKENS", 16)
    x = torch.randn(50, 9).half()
    gram = accumulate_gram_(torch.zeros(9, 9), x, backend="native")
    assert len(seen) == 4
    assert len(set(seen)) == 1
    assert_within(gram, x.double().T @ x.double(), x.float().T @ x.float())
