"""What the ``codec`` op refuses: inputs that do not fit, and patches that contradict themselves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailor_fast.ops.codec import EncodedPatch, apply_patch_, encode_patch
from tailor_fast.ops.codec.layout import BLOCK
from tests.backends import NATIVE
from tests.ops.codec.words import random_pair, raw

BACKENDS = [NATIVE, "reference"]
SIZES = "a tensor with elements of 1, 2, 4 or 8 bytes"
BASE = torch.ones(4, 3)


def good(size: int = 2 * BLOCK + 5) -> tuple[torch.Tensor, EncodedPatch]:
    """A target and a patch that fits: every other word differs."""
    base = torch.arange(size, dtype=torch.int16)
    tuned = base.clone()
    tuned[::2] ^= 0x55
    return base, encode_patch(base, tuned, backend="reference")


def pad_bit(patch: EncodedPatch) -> EncodedPatch:
    patch.mask[-1] |= 0x80
    return patch


def extra_bit(patch: EncodedPatch) -> EncodedPatch:
    patch.mask[BLOCK // 8] |= 2
    return patch


def moved_bit(patch: EncodedPatch) -> EncodedPatch:
    """The total is right, two blocks are not."""
    patch.mask[0] ^= 1
    patch.mask[BLOCK // 8] ^= 2
    return patch


def block_count(patch: EncodedPatch) -> EncodedPatch:
    patch.blocks[1] -= 1
    return patch


def negative_block(patch: EncodedPatch) -> EncodedPatch:
    patch.blocks[2] = -3
    return patch


def zero_word(patch: EncodedPatch) -> EncodedPatch:
    patch.words[[BLOCK - 7, BLOCK]] = 0
    return patch


def missing_word(patch: EncodedPatch) -> EncodedPatch:
    return patch._replace(words=patch.words[:-1])


def spare_word(patch: EncodedPatch) -> EncodedPatch:
    return patch._replace(words=torch.cat([patch.words, patch.words[:1]]))


COUNTS = "apply_patch_: patch.blocks must be the number of set bits per 65536 elements; got "
MALFORMED = [
    (
        pad_bit,
        "apply_patch_: patch.mask must be zero beyond the last element; got 0x95 in byte 16384",
    ),
    (extra_bit, COUNTS + "32768 for block 1, which has 32769"),
    (moved_bit, COUNTS + "32768 for block 0, which has 32767"),
    (block_count, COUNTS + "32767 for block 1, which has 32768"),
    (negative_block, COUNTS + "-3 for block 2, which has 3"),
    (
        missing_word,
        "apply_patch_: patch.words must be one word per set bit, 65539; got 65538 words",
    ),
    (spare_word, "apply_patch_: patch.words must be one word per set bit, 65539; got 65540 words"),
    (zero_word, "apply_patch_: patch.words must be free of zero words; got zero at index 65529"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("spoil", "message"), MALFORMED, ids=[case[0].__name__ for case in MALFORMED]
)
def test_malformed_patch_touches_nothing(spoil, message, backend: str, set_num_threads) -> None:
    set_num_threads(2)
    target, patch = good()
    before = target.clone()
    with pytest.raises(ValueError, match="apply_patch_") as caught:
        apply_patch_(target, spoil(patch), backend=backend)
    assert str(caught.value) == message
    assert torch.equal(target, before)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=50)
@given(data=st.data(), size=st.sampled_from([1, 7, 8, 9, 100]))
def test_any_flipped_bit_of_mask_or_blocks_is_seen(backend: str, data, size: int) -> None:
    base, tuned = random_pair((size,), torch.bfloat16, 0.5)
    patch = encode_patch(base, tuned)
    target = base.clone()
    part = data.draw(st.sampled_from([patch.mask, patch.blocks]))
    memory = raw(part)
    bit = data.draw(st.integers(0, 8 * memory.numel() - 1))
    memory[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ValueError, match="apply_patch_: patch"):
        apply_patch_(target, patch, backend=backend)
    assert torch.equal(raw(target), raw(base))


@pytest.mark.parametrize("backend", BACKENDS)
def test_patch_of_another_size(backend: str) -> None:
    target, patch = good(16)
    for size in (0, 8, 17):
        with pytest.raises(
            ValueError, match=r"^apply_patch_: patch.mask must be uint8 \[\d\] with size"
        ):
            apply_patch_(target.new_zeros(size), patch, backend=backend)
    for size in (14, 9):  # as many bytes of mask, but it has bits beyond the end
        with pytest.raises(ValueError, match="zero beyond the last element; got 0x55 in byte 1"):
            apply_patch_(target.new_zeros(size), patch, backend=backend)


def apply(target=None, **changes):
    fitting, patch = good(16)
    return apply_patch_(fitting if target is None else target, patch._replace(**changes))


CASES = [
    (lambda: encode_patch([1], BASE), TypeError, f"encode_patch: base must be {SIZES}; got list"),
    (
        lambda: encode_patch(BASE.to(torch.complex128), BASE),
        TypeError,
        f"encode_patch: base must be {SIZES}; got [4, 3] complex128 on cpu",
    ),
    (
        lambda: encode_patch(torch.quantize_per_tensor(BASE, 0.1, 0, torch.qint8), BASE),
        TypeError,
        f"encode_patch: base must be {SIZES}; got quantized [4, 3] qint8 on cpu",
    ),
    (
        lambda: encode_patch(BASE, BASE.half()),
        TypeError,
        "encode_patch: tuned must be float32 [4, 3]; "
        "got [4, 3] float16 on cpu. Hint: tuned.to(torch.float32)",
    ),
    (
        lambda: encode_patch(BASE, BASE[:3]),
        ValueError,
        "encode_patch: tuned must be float32 [4, 3] with size 4 in dimension 0; "
        "got [3, 3] float32 on cpu",
    ),
    (
        lambda: encode_patch(BASE, BASE.view(-1)),
        ValueError,
        "encode_patch: tuned must be float32 [4, 3]; got [12] float32 on cpu",
    ),
    (
        lambda: encode_patch(BASE.T, BASE),
        ValueError,
        "encode_patch: base must be contiguous; got strides (1, 3) for shape [3, 4]. "
        "Hint: base.contiguous() makes a copy",
    ),
    (
        lambda: encode_patch(BASE, torch.nn.Parameter(BASE.clone())),
        ValueError,
        "encode_patch: tuned must be without requires_grad; "
        "got [4, 3] float32 on cpu. Hint: tuned.detach()",
    ),
    (
        lambda: encode_patch(BASE, BASE.to("meta")),
        ValueError,
        "encode_patch: tuned must be on cpu; got [4, 3] float32 on meta. Hint: tuned.to('cpu')",
    ),
    (
        lambda: encode_patch(BASE, BASE, BASE),
        TypeError,
        "encode_patch: mask must be bool [4, 3]; "
        "got [4, 3] float32 on cpu. Hint: mask.to(torch.bool)",
    ),
    (
        lambda: encode_patch(BASE, BASE, torch.ones(4, dtype=torch.bool)),
        ValueError,
        "encode_patch: mask must be bool [4, 3]; got [4] bool on cpu",
    ),
    (
        lambda: apply_patch_("file", good(16)[1]),
        TypeError,
        f"apply_patch_: target must be {SIZES}; got str",
    ),
    (
        lambda: apply_patch_(good(16)[0], tuple(good(16)[1])),
        TypeError,
        "apply_patch_: patch must be an EncodedPatch; got tuple",
    ),
    (
        lambda: apply(target=torch.zeros(16)),
        TypeError,
        "apply_patch_: patch.words must be int32 [nnz]; "
        "got [8] int16 on cpu. Hint: patch.words.to(torch.int32)",
    ),
    (
        lambda: apply(target=torch.zeros(16, 2, dtype=torch.int16)[:, 0]),
        ValueError,
        "apply_patch_: target must be contiguous; got strides (2,) for shape [16]. "
        "Hint: target.contiguous() makes a copy",
    ),
    (
        lambda: apply(mask=torch.zeros(3, dtype=torch.uint8)),
        ValueError,
        "apply_patch_: patch.mask must be uint8 [2] with size 2 in dimension 0; "
        "got [3] uint8 on cpu",
    ),
    (
        lambda: apply(mask=torch.zeros(2, dtype=torch.bool)),
        TypeError,
        "apply_patch_: patch.mask must be uint8 [2]; "
        "got [2] bool on cpu. Hint: patch.mask.to(torch.uint8)",
    ),
    (
        lambda: apply(words=torch.ones(8, 1, dtype=torch.int16)),
        ValueError,
        "apply_patch_: patch.words must be int16 [nnz]; "
        "got [8, 1] int16 on cpu. Hint: patch.words.reshape(-1)",
    ),
    (
        lambda: apply(blocks=torch.tensor([8])),
        TypeError,
        "apply_patch_: patch.blocks must be int32 [1]; "
        "got [1] int64 on cpu. Hint: patch.blocks.to(torch.int32)",
    ),
    (
        lambda: apply(blocks=torch.zeros(0, dtype=torch.int32)),
        ValueError,
        "apply_patch_: patch.blocks must be int32 [1] with size 1 in dimension 0; "
        "got [0] int32 on cpu",
    ),
]


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor.*")
@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=[case[2][:70] for case in CASES])
def test_message(call, error, message) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def test_encoding_on_meta_says_that_the_size_is_unknown() -> None:
    meta = BASE.to("meta")
    with pytest.raises(RuntimeError, match="data-dependent"):
        encode_patch(meta, meta)
