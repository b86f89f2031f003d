"""The Triton backend: the bytes of the other ones. Without a GPU its kernels are interpreted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailor_fast._core.backend import why_unavailable
from tailor_fast.ops.codec import EncodedPatch, apply_patch_, encode_patch
from tailor_fast.ops.codec.layout import BLOCK
from tests.ops.codec.test_codec import check_round_trip, equal_patches, raw_words, spelled_out
from tests.ops.codec.test_codec_errors import MALFORMED, good
from tests.ops.codec.words import DTYPES, random_pair, raw, special_words

WHY_NOT = why_unavailable("triton", "cpu")
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
OPS = torch.ops.tailor_fast
TILE = 2048
SHAPES = [(), (0,), (3, 0), (1,), (7,), (8,), (9,), (65,), (5, 13, 7)]
SHAPES += [(TILE - 1,), (TILE,), (TILE + 1,), (3, TILE)]


@settings(max_examples=60)
@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(DTYPES),
    density=st.sampled_from([0.0, 1e-3, 0.1, 0.5, 1.0]),
)
def test_round_trip(shape: tuple[int, ...], dtype: torch.dtype, density: float) -> None:
    check_round_trip(shape, dtype, density, "triton")


@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("size", [BLOCK, BLOCK + 1, 3 * BLOCK - 21])
def test_round_trip_across_blocks(size: int, density: float) -> None:
    check_round_trip((size,), torch.bfloat16, density, "triton")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_special_word_onto_every_other(dtype: torch.dtype) -> None:
    words = special_words(dtype)
    base = words.repeat_interleave(len(words)).view(dtype)
    tuned = words.repeat(len(words)).view(dtype)
    patch = encode_patch(base, tuned, backend="triton")
    assert patch.words.numel() == len(words) * (len(words) - 1)  # NaN equals itself, -0 is not 0
    assert torch.equal(raw(apply_patch_(base.clone(), patch, backend="triton")), raw(tuned))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (65,), (31, 101)])
def test_mask_limits_the_patch(shape: tuple[int, ...]) -> None:
    base, tuned = random_pair(shape, torch.bfloat16, 0.6)
    mask = torch.rand(shape) < 0.3
    expected = torch.where(mask, raw_words(tuned), raw_words(base))
    patch = encode_patch(base, tuned, mask, backend="triton")
    assert equal_patches(patch, spelled_out(base, expected.view(torch.bfloat16)))
    nothing = encode_patch(base, tuned, torch.zeros(shape, dtype=torch.bool), backend="triton")
    assert nothing.words.numel() == 0


@pytest.mark.parametrize("offset", [1, 3])
def test_views_into_a_larger_storage(offset: int) -> None:
    base, tuned = (x[offset:] for x in random_pair((TILE + 9,), torch.bfloat16, 0.4))
    patch = encode_patch(base, tuned, backend="triton")
    assert equal_patches(patch, spelled_out(base, tuned))
    assert torch.equal(raw(apply_patch_(base, patch, backend="triton")), raw(tuned))


def test_neighbours_of_the_target_are_not_touched() -> None:
    room = torch.arange(TILE + 40, dtype=torch.int32)
    target = room[8 : 8 + TILE + 3]
    patch = encode_patch(target, ~target, backend="reference")
    apply_patch_(target, patch, backend="triton")
    assert torch.equal(room[:8], torch.arange(8, dtype=torch.int32))
    assert room[8 + TILE + 3 :].tolist() == list(range(8 + TILE + 3, TILE + 40))
    assert torch.equal(~target, torch.arange(8, 8 + TILE + 3, dtype=torch.int32))


@pytest.mark.parametrize(
    ("spoil", "message"), MALFORMED, ids=[case[0].__name__ for case in MALFORMED]
)
def test_malformed_patch_touches_nothing(spoil, message) -> None:
    target, patch = good()
    before = target.clone()
    with pytest.raises(ValueError, match="apply_patch_") as caught:
        apply_patch_(target, spoil(patch), backend="triton")
    assert str(caught.value) == message
    assert torch.equal(target, before)


def test_the_first_of_several_faults_is_named() -> None:
    target, patch = good(3 * BLOCK)
    patch.blocks[1:] -= 1
    with pytest.raises(ValueError, match="got 32767 for block 1, which has 32768"):
        apply_patch_(target, patch, backend="triton")
    patch.blocks[1:] += 1
    patch.words[[100, 70_000]] = 0
    with pytest.raises(ValueError, match="got zero at index 100"):
        apply_patch_(target, patch, backend="triton")


@settings(max_examples=30)
@given(data=st.data(), size=st.sampled_from([1, 7, 8, 9, 100]))
def test_any_flipped_bit_of_mask_or_blocks_is_seen(data, size: int) -> None:
    base, tuned = random_pair((size,), torch.bfloat16, 0.5)
    patch = encode_patch(base, tuned)
    target = base.clone()
    memory = raw(data.draw(st.sampled_from([patch.mask, patch.blocks])))
    bit = data.draw(st.integers(0, 8 * memory.numel() - 1))
    memory[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ValueError, match="apply_patch_: patch"):
        apply_patch_(target, patch, backend="triton")
    assert torch.equal(raw(target), raw(base))


def test_empty_patch_of_an_empty_tensor() -> None:
    empty = torch.empty(0)
    patch = encode_patch(empty, empty, backend="triton")
    assert [part.numel() for part in patch] == [0, 0, 0]
    assert apply_patch_(empty, patch, backend="triton") is empty
    spare = EncodedPatch(patch.mask, torch.ones(1, dtype=torch.int32), patch.blocks)
    with pytest.raises(ValueError, match=r"patch\.words must be one word per set bit, 0; got 1"):
        apply_patch_(empty, spare, backend="triton")


def test_opcheck() -> None:
    base, tuned = random_pair((300,), torch.bfloat16, 0.3)
    mask = torch.rand(300) < 0.5
    patch = encode_patch(base, tuned)
    torch.library.opcheck(OPS.encode_patch.default, (base, tuned, None, "triton"))
    torch.library.opcheck(OPS.encode_patch.default, (base, tuned, mask, "triton"))
    torch.library.opcheck(OPS.apply_patch_.default, (base.clone(), *patch, "triton"))
