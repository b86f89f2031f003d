"""Public functions of the ``codec`` op: checks, then one dispatch line each."""

from typing import Any, NamedTuple

import torch

from tailor_fast._core.backend import Backend
from tailor_fast._core.checks import BOOL, check_tensor, describe, fail
from tailor_fast.ops.codec import schema as _schema  # noqa: F401  registers the ops
from tailor_fast.ops.codec.layout import WORD_DTYPES, block_count, mask_bytes

_OPS = torch.ops.tailor_fast


class EncodedPatch(NamedTuple):
    """Where two tensors of ``n`` elements differ, and by which bits.

    The form is canonical: one pair of tensors has one patch, whatever backend or thread count.

    Attributes:
        mask: uint8 ``[ceil(n / 8)]``, one bit per element, lowest bit first; pad bits are 0.
        words: XOR of the raw words that differ, in order of the elements, none of them 0;
            int8, int16, int32 or int64 ``[nnz]``, as wide as one element.
        blocks: int32 ``[ceil(n / 65536)]``, the number of set bits per 65536 elements.
    """

    mask: torch.Tensor
    words: torch.Tensor
    blocks: torch.Tensor


def _check_words(op: str, name: str, value: Any) -> None:
    """Check that a tensor is contiguous memory of elements of 1, 2, 4 or 8 bytes."""
    expected = "a tensor with elements of 1, 2, 4 or 8 bytes"
    if not isinstance(value, torch.Tensor) or value.element_size() not in WORD_DTYPES:
        fail(op, name, expected, describe(value), error=TypeError)
    if value.is_quantized:
        fail(op, name, expected, f"quantized {describe(value)}", error=TypeError)
    check_tensor(op, name, value, None, (value.dtype,))


def encode_patch(
    base: torch.Tensor,
    tuned: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> EncodedPatch:
    """Encode what turns ``base`` into ``tuned``: a bit mask, and the XOR of the words that differ.

    Elements are raw words: NaN payloads, -0 and subnormals count as the bits that they are.

    Args:
        base: contiguous tensor of any shape and any dtype of 1, 2, 4 or 8 bytes.
        tuned: same shape, dtype and device.
        mask: bool, same shape; only elements where it is True are encoded. None encodes all.
        backend: see ``tailor_fast.backends()``.

    Returns:
        The patch, on the device of ``base``.

    Raises:
        TypeError: not a tensor, two dtypes, or elements of another size.
        ValueError: wrong shape, device or stride, or an input that requires grad.
        RuntimeError: meta tensors; how many words differ is not known without the data.
        BackendUnavailableError: the backend asked for cannot run here.
    """
    op = "encode_patch"
    _check_words(op, "base", base)
    _check_words(op, "tuned", tuned)
    check_tensor(op, "tuned", tuned, base.shape, (base.dtype,), like=base)
    if mask is not None:
        check_tensor(op, "mask", mask, base.shape, BOOL, like=base)
    return EncodedPatch(*_OPS.encode_patch(base, tuned, mask, backend))


def apply_patch_(
    target: torch.Tensor, patch: EncodedPatch, *, backend: Backend = "auto"
) -> torch.Tensor:
    """XOR a patch into ``target``, in place: base becomes tuned, and tuned becomes base again.

    Whether ``target`` is one of the two is for the caller to know (by a digest): applied twice, a
    patch takes itself back. A malformed patch is refused before anything is touched.

    Args:
        target: contiguous tensor of the shape and dtype that were encoded; changed in place.
        patch: from ``encode_patch``, on the same device.
        backend: see ``tailor_fast.backends()``.

    Returns:
        ``target``.

    Raises:
        TypeError: not a tensor, not a patch, or a wrong dtype in it.
        ValueError: sizes that do not fit, another device or stride, a target that requires grad,
            or a patch that contradicts itself: pad bits that are set, block counts or a number of
            words other than the mask implies, zero words.
        BackendUnavailableError: the backend asked for cannot run here.
    """
    op = "apply_patch_"
    _check_words(op, "target", target)
    if not isinstance(patch, EncodedPatch):
        fail(op, "patch", "an EncodedPatch", describe(patch), error=TypeError)
    size, word = target.numel(), WORD_DTYPES[target.element_size()]
    check_tensor(op, "patch.mask", patch.mask, (mask_bytes(size),), (torch.uint8,), like=target)
    check_tensor(op, "patch.words", patch.words, ("nnz",), (word,), like=target)
    check_tensor(
        op, "patch.blocks", patch.blocks, (block_count(size),), (torch.int32,), like=target
    )
    _OPS.apply_patch_(target, patch.mask, patch.words, patch.blocks, backend)
    return target
