"""Proof, from the file alone, that a patch is whole; with its base, that it leads where it says."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from tailor_fast._core.errors import InputError
from tailor_fast._core.progress import Progress, Silent
from tailor_fast.checkpoint import (
    CheckpointError,
    MalformedError,
    MissingFileError,
    NotSafetensorsError,
    TruncatedError,
    open_checkpoint,
)
from tailor_fast.checkpoint.errors import AnyPath
from tailor_fast.checkpoint.files import byte_view
from tailor_fast.checkpoint.hashing import new_hash
from tailor_fast.ops.codec.layout import WORD_DTYPES
from tailor_fast.patchfile.applying import check_result
from tailor_fast.patchfile.errors import NotPatchError
from tailor_fast.patchfile.file import Patch
from tailor_fast.patchfile.layout import FORMAT, LIMITS, PARTS, PatchEntry
from tailor_fast.patchfile.streams import BLOCK_BYTES


@dataclass
class PatchVerification:
    """What was found.

    Attributes:
        violations: one sentence each; empty when everything holds.
        tensors: how many stored tensors were checked.
        words: how many stored words.
        nbytes: bytes of the file that were read.
        reached: whether a base was given and the patch turns it into its target.
    """

    violations: list[str] = field(default_factory=list)
    tensors: int = 0
    words: int = 0
    nbytes: int = 0
    reached: bool = False

    @property
    def ok(self) -> bool:
        """Whether nothing was violated."""
        return not self.violations


def is_patch(path: AnyPath) -> bool:
    """Whether ``path`` is a safetensors file that calls itself a patch, of any version."""
    if not Path(path).is_file():
        return False
    try:
        with open_checkpoint(path, limits=LIMITS) as file:
            found = file.shards[0].metadata.get("tailor_format", "")
    except CheckpointError:
        return False
    return found.partition("/")[0] == FORMAT.partition("/")[0]


def verify_patch(
    path: AnyPath,
    *,
    base: AnyPath | None = None,
    deep: bool = True,
    progress: Progress | None = None,
) -> PatchVerification:
    """Check a patch file: structure, counts, words and every digest.

    Args:
        path: patch file.
        base: the checkpoint that it was made from; then also that it turns it into its target.
        deep: read the words; False looks at structure and plan only, and at no base.
        progress: told about each tensor.

    Returns:
        What was checked, and every violation.

    Raises:
        NotPatchError, NotSafetensorsError, MissingFileError: there is no patch file of this
            version.
        WrongStateError, MismatchError: ``base`` is not what the patch was made from.
        StorageError: reading failed.
    """
    result = PatchVerification()
    try:
        opened = Patch.open(path)
    except (NotPatchError, NotSafetensorsError, MissingFileError):
        raise
    except InputError as error:
        result.violations.append(str(error))
        return result
    with opened as patch:
        if not deep:
            return result
        _check_tensors(patch, result, progress or Silent())
        if base is not None and result.ok:
            with open_checkpoint(base) as source:
                try:
                    check_result(source, patch, progress)
                except MalformedError as error:
                    result.violations.append(str(error))
            result.reached = result.ok
        result.nbytes = patch.nbytes
    return result


def _check_tensors(patch: Patch, result: PatchVerification, progress: Progress) -> None:
    progress.start(len(patch))
    done_bytes = 0
    for done, (name, entry) in enumerate(patch.items(), 1):
        result.tensors += 1
        result.words += entry.changed
        try:
            _check_tensor(patch, entry)
        except (MalformedError, TruncatedError) as error:
            result.violations.append(str(error))
        done_bytes += entry.stored_bytes
        progress.group(name, done, len(patch), done_bytes)
    progress.finish()


def _check_tensor(patch: Patch, entry: PatchEntry) -> None:
    """Apply the parts to memory that nobody reads, which checks them, and hash them."""
    parts = patch.parts(entry.name)
    hashes = [new_hash(patch.plan.digest) for _ in PARTS]
    step = BLOCK_BYTES // entry.word_bytes
    scratch = torch.zeros(min(step, entry.words), dtype=WORD_DTYPES[entry.word_bytes])
    for begin in range(0, entry.words, step):
        for hasher, part in zip(
            hashes, parts.xor_(scratch[: entry.words - begin], begin), strict=True
        ):
            hasher.update(byte_view(part, writable=False))
    for part_name, expected, hasher in zip(PARTS, entry.parts, hashes, strict=True):
        if hasher.hexdigest() != expected:
            problem = f"digest of its {part_name} must be {expected}; got {hasher.hexdigest()}"
            raise MalformedError(
                problem, path=patch.path, tensor=entry.name, remedy="fetch the patch again"
            )
