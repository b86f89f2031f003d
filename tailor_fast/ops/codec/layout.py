"""Form of an encoded patch, shared by every backend: sizes, word dtypes, what is malformed."""

from typing import NoReturn

import torch

from tailor_fast._core.checks import fail

BLOCK = 65536  # elements per entry of ``EncodedPatch.blocks``
# Signed, because torch has few kernels for the wide unsigned dtypes; the bits are the same.
WORD_DTYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def mask_bytes(size: int) -> int:
    """Length of the bit mask of ``size`` elements."""
    return -(-size // 8)


def block_count(size: int) -> int:
    """Number of blocks of ``size`` elements."""
    return -(-size // BLOCK)


def as_words(tensor: torch.Tensor) -> torch.Tensor:
    """View a contiguous tensor as a flat tensor of its raw words."""
    return tensor.view(-1).view(WORD_DTYPES[tensor.element_size()])


def refuse(kind: str, index: int, expected: int, got: int) -> NoReturn:
    """Raise ``ValueError`` for a patch that contradicts itself.

    Args:
        kind: ``pad`` (mask byte ``index`` has a bit beyond the last element), ``block`` (entry
            ``index`` of the block counts), ``words`` (their number) or ``zero`` (word ``index``).
        index: of the byte, block or word.
        expected: the number that the mask implies.
        got: the number found.
    """
    op = "apply_patch_"
    if kind == "pad":
        fail(op, "patch.mask", "zero beyond the last element", f"{got:#04x} in byte {index}")
    if kind == "block":
        want = f"the number of set bits per {BLOCK} elements"
        fail(op, "patch.blocks", want, f"{got} for block {index}, which has {expected}")
    if kind == "words":
        fail(op, "patch.words", f"one word per set bit, {expected}", f"{got} words")
    fail(op, "patch.words", "free of zero words", f"zero at index {index}")
