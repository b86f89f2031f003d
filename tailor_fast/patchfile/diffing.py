"""``diff``: what turns BASE into TARGET, every word of it, to a patch file; both are read once."""

import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import torch

from tailor_fast._core.errors import UsageError
from tailor_fast._core.progress import Progress, Silent
from tailor_fast.checkpoint import (
    HashName,
    TensorInfo,
    TensorSource,
    match_pair,
    open_checkpoint,
    open_tuned,
)
from tailor_fast.checkpoint.errors import AnyPath, shown_path
from tailor_fast.checkpoint.files import byte_view
from tailor_fast.checkpoint.hashing import HASHES, new_hash
from tailor_fast.checkpoint.index import SUFFIX
from tailor_fast.models import names_as_stored
from tailor_fast.ops.codec import EncodedPatch, encode_patch
from tailor_fast.ops.codec.layout import mask_bytes
from tailor_fast.patchfile.layout import PARTS, PatchEntry, PatchPlan, header, reserved_bytes
from tailor_fast.patchfile.streams import DEPTH, Block, ahead, read_blocks, words_of
from tailor_fast.patchfile.writer import GrowingFile


def diff_checkpoints(
    base: AnyPath,
    target: AnyPath,
    out: AnyPath,
    *,
    overwrite: bool = False,
    digest: HashName = "xxh3-128",
    progress: Progress | None = None,
) -> PatchPlan:
    """Write the patch that turns ``base`` into ``target`` and back, bit for bit.

    The bytes of the patch depend on the tensors and on the names of the two alone, not on how the
    tensors are distributed over files, on threads or on the time.

    Args:
        base: checkpoint: a model directory or one ``.safetensors`` file.
        target: the same tensors with other values, any number of them, of any dtype; or a LoRA
            adapter of ``base``, which is merged while it is read.
        out: patch file to write, by convention ``*.tailor.safetensors``.
        overwrite: replace an existing file when the new one is complete.
        digest: algorithm of the digests; ``sha256`` is slower and withstands forgery.
        progress: told about each tensor.

    Returns:
        What the file says of itself.

    Raises:
        InputError: a file is missing or malformed, or the two do not hold the same tensors.
        OutputError: ``out`` exists, is locked, or may not be written.
        StorageError: reading or writing failed half way.
        UsageError: ``out`` does not end in ``.safetensors``, or no such ``digest``.
    """
    check_name(out)
    if digest not in HASHES:
        raise UsageError(f"digest must be one of {', '.join(HASHES)}; got {digest!r}")
    with ExitStack() as stack:
        ours = stack.enter_context(open_checkpoint(base))
        theirs = stack.enter_context(open_tuned(target, ours, names_as_stored))
        match_pair(ours, theirs)
        inputs = (*ours.input_paths, *theirs.input_paths)
        file = stack.enter_context(GrowingFile(out, overwrite=overwrite, inputs=inputs))
        return write_patch(ours, theirs, file, (base, target), digest, progress or Silent())


def check_name(out: AnyPath) -> None:
    """Raise ``UsageError`` unless ``out`` has the suffix by which loaders know the format."""
    if not os.fspath(out).endswith(SUFFIX):
        raise UsageError(f"{shown_path(out)}: a patch file's name must end in {SUFFIX}")


def write_patch(
    base: TensorSource,
    target: TensorSource,
    file: GrowingFile,
    called: tuple[AnyPath, AnyPath],
    digest: HashName,
    progress: Progress,
) -> PatchPlan:
    """Encode two open checkpoints that match into ``file`` and commit it."""
    blanks = [_blank(target.tensors[name]) for name in sorted(target.tensors)]
    plan = PatchPlan(_bare_name(called[0]), _bare_name(called[1]), digest, tuple(blanks))
    cursor = reserved_bytes(plan)
    entries: list[PatchEntry] = []
    done_bytes = 0
    progress.start(len(blanks))
    with closing(ahead(_encoded(base, target, blanks, digest))) as pieces:
        for blank in blanks:
            stored = _StoredTensor(file, cursor, blank, digest)
            entries.append(stored.take(pieces))
            cursor += entries[-1].stored_bytes
            file.write_behind(cursor)
            done_bytes += target.tensors[blank.name].nbytes
            progress.group(blank.name, len(entries), len(blanks), done_bytes)
    plan = replace(plan, entries=tuple(entries))
    file.write(0, header(plan))
    base.check_unchanged()
    target.check_unchanged()
    file.commit(cursor)
    progress.finish()
    return plan


def _blank(info: TensorInfo) -> PatchEntry:
    return PatchEntry(info.name, info.dtype, info.shape, 0, "", "")


def _bare_name(path: AnyPath) -> str:
    """What a checkpoint is called, without its place, as text that any file can hold."""
    name = Path(os.path.abspath(path)).name  # noqa: PTH100  the name of a link is its own
    return os.fsencode(name).decode("utf-8", "replace")


_Piece = tuple[Block, Block, EncodedPatch]


def _encoded(
    base: TensorSource, target: TensorSource, blanks: Iterable[PatchEntry], digest: HashName
) -> Generator[_Piece, None, None]:
    """Read both side by side and encode them, block by block."""
    widths = {blank.name: blank.word_bytes for blank in blanks}
    ours, theirs = (
        ahead(read_blocks(source, widths, digest, in_use=DEPTH)) for source in (base, target)
    )
    with closing(ours), closing(theirs):
        for left, right in zip(ours, theirs, strict=True):
            width = widths[left.name]
            patch = encode_patch(words_of(left.view, width), words_of(right.view, width))
            yield left, right, patch


class _StoredTensor:
    """One tensor on its way into the file: mask at its place, words behind it, then the counts.

    A tensor without a change leaves nothing that counts; the next one begins at the same place.
    """

    def __init__(
        self, file: GrowingFile, begin: int, blank: PatchEntry, algorithm: HashName
    ) -> None:
        self._file = file
        self._blank = blank
        self._mask = begin
        self._words = begin + mask_bytes(blank.words)
        self._hashes = [new_hash(algorithm) for _ in PARTS]
        self._counts: list[torch.Tensor] = []

    def take(self, pieces: Iterator[_Piece]) -> PatchEntry:
        """Take the pieces of this tensor and return its entry."""
        entry, width = self._blank, self._blank.word_bytes
        changed = 0
        for ours, theirs, patch in pieces:
            at_mask = self._mask + theirs.begin // width // 8
            self._put(0, at_mask, patch.mask)
            self._put(1, self._words + changed * width, patch.words)
            self._counts.append(patch.blocks)
            changed += patch.words.numel()
            if theirs.digest:
                entry = replace(entry, base=ours.digest, target=theirs.digest)
                break
        if not changed:
            return entry
        self._put(2, self._words + changed * width, torch.cat(self._counts))
        return replace(
            entry, changed=changed, parts=tuple(part.hexdigest() for part in self._hashes)
        )

    def _put(self, part: int, offset: int, tensor: torch.Tensor) -> None:
        view = byte_view(tensor, writable=False)
        self._file.write(offset, view)
        self._hashes[part].update(view)
