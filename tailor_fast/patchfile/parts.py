"""The stored parts of one tensor, read range by range: the block counts say where words begin."""

import torch

from tailor_fast.checkpoint import Checkpoint, MalformedError
from tailor_fast.ops.codec import EncodedPatch, apply_patch_
from tailor_fast.ops.codec.layout import BLOCK, WORD_DTYPES, mask_bytes
from tailor_fast.patchfile.layout import PARTS, PatchEntry, part_name


class StoredParts:
    """Mask, words and block counts of one tensor in an open patch file."""

    def __init__(self, file: Checkpoint, index: int, entry: PatchEntry) -> None:
        """Read the block counts.

        Raises:
            MalformedError: they are no counts, or do not add up to the number of words.
            TruncatedError, TransferError: see ``Checkpoint.read_into``.
        """
        self._file = file
        self._entry = entry
        self._mask, self._words, blocks = (part_name(index, part) for part in PARTS)
        self._counts = torch.empty(file.tensors[blocks].numel, dtype=torch.int32)
        file.read_into(blocks, self._counts)
        self._begins = torch.nn.functional.pad(self._counts.cumsum(0), (1, 0))  # int64
        fits = bool(((self._counts >= 0) & (self._counts <= BLOCK)).all())
        if not fits or int(self._begins[-1]) != entry.changed:
            problem = f"block counts must lie in [0, {BLOCK}] and add up to {entry.changed} words"
            raise self._damaged(f"{problem}; got a sum of {int(self._begins[-1])}")

    def encoded(self, begin: int, end: int) -> EncodedPatch:
        """Read the patch of the words ``[begin, end)``; ``begin`` is a multiple of 65536."""
        first, last = begin // BLOCK, -(-end // BLOCK)
        mask = torch.empty(mask_bytes(end - begin), dtype=torch.uint8)
        self._file.read_into(self._mask, mask, begin // 8, begin // 8 + mask.numel())
        width = self._entry.word_bytes
        at, stop = (int(self._begins[block]) for block in (first, last))
        words = torch.empty(stop - at, dtype=WORD_DTYPES[width])
        self._file.read_into(self._words, words, at * width, stop * width)
        return EncodedPatch(mask, words, self._counts[first:last])

    def xor_(self, words: torch.Tensor, begin: int) -> EncodedPatch:
        """Apply the patch to the flat ``words``, the tensor's from ``begin`` on, in place.

        Returns:
            What was read of the file.

        Raises:
            MalformedError: mask, words and counts contradict each other; ``words`` are as before.
        """
        patch = self.encoded(begin, begin + words.numel())
        on_device = EncodedPatch(*(part.to(words.device) for part in patch))
        try:
            apply_patch_(words, on_device)
        except ValueError as error:
            raise self._damaged(str(error)) from None
        return patch

    def _damaged(self, problem: str) -> MalformedError:
        remedy = "fetch the patch again, or make it again with `tailor-fast diff`"
        return MalformedError(problem, path=self._file.path, tensor=self._entry.name, remedy=remedy)
