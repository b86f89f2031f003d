"""The ``codec`` op: exact both ways, one canonical form, the same bytes from every backend."""

import mmap
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tailor_fast.ops.codec import EncodedPatch, apply_patch_, encode_patch
from tailor_fast.ops.codec.layout import BLOCK, WORD_DTYPES
from tests.backends import NATIVE, needs_native
from tests.ops.codec.words import DTYPES, random_pair, raw, special_words

BACKENDS = [NATIVE, "reference"]
SHAPES = [(), (0,), (3, 0), (1,), (7,), (8,), (9,), (63,), (8, 8), (65,), (5, 13, 7)]
LONG = [(BLOCK - 1,), (256, 256), (BLOCK + 1,), (3, BLOCK - 21)]
DENSITIES = [0.0, 1e-4, 0.1, 0.5, 1.0]
OPS = torch.ops.tailor_fast


def equal_patches(a: EncodedPatch, b: EncodedPatch) -> bool:
    return all(
        x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y)
        for x, y in zip(a, b, strict=True)
    )


def spelled_out(base: torch.Tensor, tuned: torch.Tensor) -> EncodedPatch:
    """The form in numpy, from its description."""
    word = WORD_DTYPES[base.element_size()]
    xor = (base.view(-1).view(word) ^ tuned.view(-1).view(word)).numpy()
    starts = np.arange(0, xor.size, BLOCK)
    blocks = [np.count_nonzero(xor[start : start + BLOCK]) for start in starts]
    return EncodedPatch(
        torch.from_numpy(np.packbits(xor != 0, bitorder="little")),
        torch.from_numpy(xor[xor != 0]),
        torch.tensor(blocks, dtype=torch.int32),
    )


def check_round_trip(
    shape: tuple[int, ...], dtype: torch.dtype, density: float, backend: str
) -> None:
    base, tuned = random_pair(shape, dtype, density)
    before = raw(base).clone(), raw(tuned).clone()
    expected = spelled_out(base, tuned)
    patch = encode_patch(base, tuned, backend=backend)
    assert equal_patches(patch, expected)
    target = base.clone()
    assert apply_patch_(target, patch, backend=backend) is target
    assert torch.equal(raw(target), before[1])
    apply_patch_(target, patch, backend=backend)
    assert torch.equal(raw(target), before[0])
    assert torch.equal(raw(base), before[0])
    assert torch.equal(raw(tuned), before[1])


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=150)
@given(
    shape=st.sampled_from(SHAPES), dtype=st.sampled_from(DTYPES), density=st.sampled_from(DENSITIES)
)
@example(shape=(), dtype=torch.bool, density=1.0)
@example(shape=(0,), dtype=torch.complex64, density=1.0)
def test_round_trip(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype, density: float
) -> None:
    check_round_trip(shape, dtype, density, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", LONG)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.complex64])
def test_round_trip_across_blocks(
    shape: tuple[int, ...], dtype: torch.dtype, density: float, backend: str
) -> None:
    check_round_trip(shape, dtype, density, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_special_word_onto_every_other(dtype: torch.dtype, backend: str) -> None:
    words = special_words(dtype)
    base = words.repeat_interleave(len(words)).view(dtype)
    tuned = words.repeat(len(words)).view(dtype)
    patch = encode_patch(base, tuned, backend=backend)
    assert patch.words.numel() == len(words) * (len(words) - 1)  # NaN equals itself, -0 is not 0
    assert torch.equal(raw(apply_patch_(base.clone(), patch, backend=backend)), raw(tuned))


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32, torch.float64])
def test_same_bytes_at_every_thread_count(
    dtype: torch.dtype, masked: bool, threads: int, set_num_threads
) -> None:
    base, tuned = random_pair((7 * BLOCK + 77,), dtype, 0.3)
    tuned[BLOCK : 2 * BLOCK] = base[BLOCK : 2 * BLOCK]  # an empty block between others
    mask = torch.rand(base.shape) < 0.4 if masked else None
    expected = encode_patch(base, tuned, mask, backend="reference")
    set_num_threads(threads)
    patch = encode_patch(base, tuned, mask, backend="native")
    assert equal_patches(patch, expected)
    wanted = tuned if mask is None else torch.where(mask, raw_words(tuned), raw_words(base))
    assert torch.equal(raw(apply_patch_(base, patch, backend="native")), raw(wanted))


def raw_words(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(WORD_DTYPES[tensor.element_size()])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (65,), (300, 1001)])
def test_mask_limits_the_patch(shape: tuple[int, ...], backend: str) -> None:
    base, tuned = random_pair(shape, torch.bfloat16, 0.6)
    mask = torch.rand(shape) < 0.3
    expected = torch.where(mask, raw_words(tuned), raw_words(base))
    patch = encode_patch(base, tuned, mask, backend=backend)
    assert equal_patches(patch, spelled_out(base, expected.view(torch.bfloat16)))
    everything = encode_patch(base, tuned, torch.ones(shape, dtype=torch.bool), backend=backend)
    assert equal_patches(everything, encode_patch(base, tuned, backend=backend))
    nothing = encode_patch(base, tuned, torch.zeros(shape, dtype=torch.bool), backend=backend)
    assert nothing.words.numel() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_tensors_give_an_empty_patch(backend: str) -> None:
    base = torch.full((BLOCK + 9,), float("nan"))
    patch = encode_patch(base, base.clone(), backend=backend)
    assert not bool(patch.mask.any())
    assert patch.words.shape == (0,)
    assert patch.blocks.tolist() == [0, 0]


def test_the_form_by_hand() -> None:
    base = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0])
    tuned = base.clone()
    tuned[0], tuned[9] = -0.0, 9.5
    patch = encode_patch(base, tuned)
    assert patch.mask.tolist() == [0b1, 0b10]
    assert patch.words.tolist() == [torch.iinfo(torch.int32).min, 0x41100000 ^ 0x41180000]
    assert patch.blocks.tolist() == [2]


@needs_native
def test_words_at_odd_addresses() -> None:
    """A tensor that maps a file need not start at a multiple of its word."""
    memory = bytearray(2 * 4096 + 1)
    base = torch.frombuffer(memory, dtype=torch.int16, offset=1)
    assert base.data_ptr() % 2 == 1
    base.random_()
    tuned = base.clone()
    tuned[::3] += 1
    patch = encode_patch(base, tuned, backend="native")
    assert equal_patches(patch, encode_patch(base.clone(), tuned, backend="reference"))
    assert torch.equal(apply_patch_(base, patch, backend="native"), tuned)


@needs_native
def test_more_elements_than_32_bits_count(set_num_threads) -> None:
    """Two views of one array of zeros, one element apart; unwritten pages cost no memory."""
    set_num_threads(2)
    size = 2**31 + 77
    memory = mmap.mmap(-1, size + 1, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages: the same, with more page faults
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.int8)
    whole[[BLOCK, 2**31, size]] = 5
    base, tuned = whole[:-1], whole[1:]
    patch = encode_patch(base, tuned, backend="native")
    where = [BLOCK - 1, BLOCK, 2**31 - 1, 2**31, size - 1]
    assert patch.words.tolist() == [5] * 5
    assert patch.blocks.nonzero().flatten().tolist() == [0, 1, 2**15 - 1, 2**15]
    assert [int(patch.mask[i // 8]) >> i % 8 & 1 for i in where] == [1] * 5
    apply_patch_(base, patch, backend="native")
    assert base[where].tolist() == [5, 0, 5, 0, 5]


@pytest.mark.parametrize("backend", BACKENDS)
def test_lazy_views_are_what_they_show(backend: str) -> None:
    """A conjugate or negative view has a flag for its sign; the patch is of the resolved words."""
    values = torch.randn(70, dtype=torch.complex64)
    for view in (values.conj(), torch._neg_view(values)):
        shown = view.resolve_conj().resolve_neg()
        patch = encode_patch(values, view, backend=backend)
        assert equal_patches(patch, encode_patch(values, shown))
        assert torch.equal(apply_patch_(view.clone(), patch, backend=backend), values)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_opcheck(backend: str) -> None:
    base, tuned = random_pair((300,), torch.bfloat16, 0.3)
    mask = torch.rand(300) < 0.5
    patch = encode_patch(base, tuned)
    torch.library.opcheck(OPS.encode_patch.default, (base, tuned, None, backend))
    torch.library.opcheck(OPS.encode_patch.default, (base, tuned, mask, backend))
    torch.library.opcheck(OPS.apply_patch_.default, (base.clone(), *patch, backend))


def test_meta_and_compiled_apply() -> None:
    base, tuned = random_pair((300,), torch.float32, 0.3)
    patch = encode_patch(base, tuned)
    on_meta = EncodedPatch(*(tensor.to("meta") for tensor in patch))
    assert apply_patch_(base.to("meta"), on_meta).is_meta

    def step(target: torch.Tensor, patch: EncodedPatch) -> torch.Tensor:
        target = target.clone()
        apply_patch_(target, patch)
        return target

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(raw(compiled(base, patch)), raw(tuned))
