"""The ``codec`` op in C++, on CPU tensors: two passes over the pair, one over the patch.

Blocks are independent, so the bytes do not depend on the number of threads.
"""

import torch

from tailor_fast import _C
from tailor_fast.ops.codec.layout import WORD_DTYPES, block_count, mask_bytes, refuse


def encode_patch(
    base: torch.Tensor, tuned: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bit mask of the words that differ, their XOR, and their number per block."""
    size, width, threads = base.numel(), base.element_size(), torch.get_num_threads()
    bits = torch.empty(mask_bytes(size), dtype=torch.uint8)
    blocks = torch.empty(block_count(size), dtype=torch.int32)
    found = _C.codec_mark(
        base.data_ptr(),
        tuned.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        size,
        width,
        bits.data_ptr(),
        blocks.data_ptr(),
        threads,
    )
    words = torch.empty(found, dtype=WORD_DTYPES[width])
    _C.codec_gather(
        base.data_ptr(),
        tuned.data_ptr(),
        size,
        width,
        bits.data_ptr(),
        blocks.data_ptr(),
        words.data_ptr(),
        threads,
    )
    return bits, words, blocks


def apply_patch_(
    target: torch.Tensor, mask: torch.Tensor, words: torch.Tensor, blocks: torch.Tensor
) -> None:
    """XOR ``words`` into the elements of ``target`` that ``mask`` has set."""
    fault = _C.codec_apply(
        target.data_ptr(),
        target.numel(),
        target.element_size(),
        mask.data_ptr(),
        blocks.data_ptr(),
        words.data_ptr(),
        words.numel(),
        torch.get_num_threads(),
    )
    if fault is not None:
        refuse(*fault)
