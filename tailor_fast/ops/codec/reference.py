"""The ``codec`` op in plain torch: the oracle, and a backend on any device.

Works by chunks of whole blocks, so that the temporaries do not grow with the tensor.
"""

from collections.abc import Iterator

import torch
from torch.nn.functional import pad

from tailor_fast.ops.codec.layout import BLOCK, as_words, mask_bytes, refuse

CHUNK = 16 * BLOCK


def _pack(keep: torch.Tensor) -> torch.Tensor:
    """Bool ``[size]`` to uint8 ``[ceil(size / 8)]``, lowest bit first."""
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=keep.device)
    return (pad(keep, (0, -keep.numel() % 8)).view(-1, 8) * weights).sum(1, dtype=torch.uint8)


def _unpack(bits: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 ``[ceil(size / 8)]`` to bool ``[size]``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> shifts) & 1).view(-1)[:size].bool()


def _count(keep: torch.Tensor) -> torch.Tensor:
    """Set elements per block, int32 ``[ceil(size / BLOCK)]``."""
    blocks = pad(keep, (0, -keep.numel() % BLOCK)).view(-1, BLOCK)
    return blocks.sum(1, dtype=torch.int32)


def _chunks(mask: torch.Tensor, size: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Each chunk's elements and which of them ``mask`` has set."""
    for start in range(0, size, CHUNK):
        stop = min(start + CHUNK, size)
        yield slice(start, stop), _unpack(mask[start // 8 : mask_bytes(stop)], stop - start)


def encode_patch(
    base: torch.Tensor, tuned: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bit mask of the words that differ, their XOR, and their number per block."""
    left, right = as_words(base), as_words(tuned)
    bits, words, blocks = [_pack(left[:0] != 0)], [left[:0]], [_count(left[:0] != 0)]
    for start in range(0, left.numel(), CHUNK):
        part = slice(start, start + CHUNK)
        xor = left[part] ^ right[part]
        keep = xor != 0
        if mask is not None:
            keep &= mask.view(-1)[part]
        bits.append(_pack(keep))
        words.append(xor[keep])
        blocks.append(_count(keep))
    return torch.cat(bits), torch.cat(words), torch.cat(blocks)


def _check(size: int, mask: torch.Tensor, words: torch.Tensor, blocks: torch.Tensor) -> None:
    if size % 8 and int(mask[-1]) >> size % 8:
        refuse("pad", size // 8, 0, int(mask[-1]))
    counts = [_count(keep) for _, keep in _chunks(mask, size)]
    found = torch.cat([blocks[:0], *counts])
    if not torch.equal(found, blocks):
        block = int((found != blocks).int().argmax())
        refuse("block", block, int(found[block]), int(blocks[block]))
    if int(found.sum()) != words.numel():
        refuse("words", 0, int(found.sum()), words.numel())
    if not bool(words.all()):
        refuse("zero", int((words == 0).int().argmax()), 0, 0)


def apply_patch_(
    target: torch.Tensor, mask: torch.Tensor, words: torch.Tensor, blocks: torch.Tensor
) -> None:
    """XOR ``words`` into the elements of ``target`` that ``mask`` has set."""
    raw = as_words(target)
    _check(raw.numel(), mask, words, blocks)
    rest = words
    for part, keep in _chunks(mask, raw.numel()):
        count = int(keep.sum())
        raw[part][keep] ^= rest[:count]
        rest = rest[count:]
