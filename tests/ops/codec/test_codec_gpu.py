"""The ``codec`` op on CUDA tensors: the bytes of the CPU, there and back."""

import pytest
import torch

from tailor_fast._core.backend import BackendUnavailableError
from tailor_fast.ops.codec import EncodedPatch, apply_patch_, encode_patch
from tailor_fast.ops.codec.layout import BLOCK
from tests.ops.codec.words import DTYPES, random_pair, raw

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("size", [0, 65, BLOCK, 5 * BLOCK + 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bytes_as_on_the_cpu(
    dtype: torch.dtype, size: int, density: float, backend: str
) -> None:
    base, tuned = random_pair((size,), dtype, density)
    expected = encode_patch(base, tuned)
    target = base.cuda()
    patch = encode_patch(target, tuned.cuda(), backend=backend)
    for ours, theirs in zip(patch, expected, strict=True):
        assert ours.is_cuda
        assert torch.equal(ours.cpu(), theirs)
    assert torch.equal(raw(apply_patch_(target, patch, backend=backend)).cpu(), raw(tuned))
    assert torch.equal(raw(apply_patch_(target, patch, backend=backend)).cpu(), raw(base))


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_mask_limits_the_patch(backend: str) -> None:
    base, tuned = random_pair((BLOCK + 999,), torch.bfloat16, 0.6)
    mask = torch.rand(base.shape) < 0.3
    expected = encode_patch(base, tuned, mask)
    patch = encode_patch(base.cuda(), tuned.cuda(), mask.cuda(), backend=backend)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(patch, expected, strict=True))


def test_more_elements_than_32_bits_count() -> None:
    size = 2**32 + 77
    if torch.cuda.mem_get_info()[0] < 3 * size:
        pytest.skip("needs 12 GiB of free GPU memory")
    whole = torch.zeros(size + 1, dtype=torch.int8, device="cuda")
    whole[[BLOCK, 2**32, size]] = 5
    base, tuned = whole[:-1], whole[1:]
    patch = encode_patch(base, tuned, backend="triton")
    assert patch.words.tolist() == [5] * 5
    apply_patch_(base, patch, backend="triton")
    where = [BLOCK - 1, BLOCK, 2**32 - 1, 2**32, size - 1]
    assert base[where].tolist() == [5, 0, 5, 0, 5]


def test_patch_on_another_device_is_refused() -> None:
    base, tuned = random_pair((100,), torch.bfloat16, 0.5)
    with pytest.raises(ValueError, match=r"apply_patch_: patch\.mask must be on cuda:0; got"):
        apply_patch_(base.cuda(), encode_patch(base, tuned))


def test_malformed_patch_touches_nothing() -> None:
    base, tuned = (tensor.cuda() for tensor in random_pair((100,), torch.bfloat16, 0.5))
    patch = encode_patch(base, tuned)
    before = base.clone()
    with pytest.raises(
        ValueError, match=r"apply_patch_: patch\.words must be one word per set bit"
    ):
        apply_patch_(base, EncodedPatch(patch.mask, patch.words[1:], patch.blocks))
    assert torch.equal(raw(base), raw(before))


def test_native_is_for_the_cpu() -> None:
    base = torch.zeros(8, device="cuda")
    with pytest.raises(BackendUnavailableError, match="'native' is not implemented on cuda"):
        encode_patch(base, base, backend="native")
