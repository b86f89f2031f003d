"""``apply`` and ``revert``: a checkpoint and a patch in, the other checkpoint out, streamed."""

from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass

from tailor_fast._core.errors import UsageError
from tailor_fast._core.progress import Progress, Silent
from tailor_fast.checkpoint import (
    Checkpoint,
    MismatchError,
    StagedCheckpoint,
    StagedFile,
    TensorHasher,
    open_checkpoint,
    plan_layout,
)
from tailor_fast.checkpoint.errors import AnyPath, listed, shown_path
from tailor_fast.checkpoint.plan import DEFAULT_SHARD_BYTES
from tailor_fast.patchfile.errors import WrongStateError
from tailor_fast.patchfile.file import Patch
from tailor_fast.patchfile.layout import PatchEntry
from tailor_fast.patchfile.parts import StoredParts
from tailor_fast.patchfile.states import APPLY, REVERT, Direction, must_change, wrong_result
from tailor_fast.patchfile.streams import DEPTH, Block, ahead, read_blocks, words_of


@dataclass(frozen=True, slots=True)
class Applied:
    """What was done.

    Attributes:
        written: whether an output was made; False when the input was at the goal already.
        tensors: how many tensors the patch changes.
        words: how many words of them.
        nbytes: bytes of all tensors.
    """

    written: bool
    tensors: int
    words: int
    nbytes: int


def apply_patch(
    base: AnyPath,
    patch: AnyPath,
    out: AnyPath,
    *,
    overwrite: bool = False,
    max_shard_bytes: int | None = None,
    progress: Progress | None = None,
) -> Applied:
    """Write the checkpoint that ``patch`` makes of ``base``, bit for bit.

    ``base`` is read once and hashed on the way, and so is what is written; ``out`` is absent, or
    its old self, until every digest has been found right. Of a model directory, the files beside
    the weights (configuration, tokenizer, processor) are copied from ``base``.

    Args:
        base: the checkpoint that the patch was made from: a directory, or one file.
        patch: the patch file.
        out: directory to make, or file where ``base`` is a file.
        overwrite: replace an existing output when the new one is complete.
        max_shard_bytes: most tensor bytes per file of a directory; None takes 5 GB.
        progress: told about each tensor.

    Returns:
        What was done. When ``base`` is the target already nothing is written, and it says so.

    Raises:
        WrongStateError: a tensor is neither the base's nor the target's, or some are one and some
            the other.
        InputError: a file is missing or damaged, or the checkpoint has other tensors than the
            patch.
        OutputError: ``out`` exists, is locked, or may not be written.
        StorageError: reading or writing failed half way.
        UsageError: ``max_shard_bytes`` is given although ``base`` is one file.
    """
    with open_checkpoint(base) as source, Patch.open(patch) as opened:
        job = _Job(source, opened, APPLY, progress)
        return job.run(out, overwrite, max_shard_bytes)


def revert_patch(
    patched: AnyPath,
    patch: AnyPath,
    out: AnyPath,
    *,
    overwrite: bool = False,
    max_shard_bytes: int | None = None,
    progress: Progress | None = None,
) -> Applied:
    """Write the checkpoint that ``patch`` was made from, out of the one that it makes.

    Args, result and errors as for ``apply_patch``, with the roles of base and target swapped.
    """
    with open_checkpoint(patched) as source, Patch.open(patch) as opened:
        job = _Job(source, opened, REVERT, progress)
        return job.run(out, overwrite, max_shard_bytes)


def check_result(source: Checkpoint, patch: Patch, progress: Progress | None = None) -> None:
    """Check, without writing, that ``patch`` turns the base ``source`` into its target.

    Raises:
        WrongStateError, InputError, StorageError: as for ``apply_patch``.
    """
    _Job(source, patch, APPLY, progress).check()


class _Job:
    """One checkpoint on its way through one patch."""

    def __init__(
        self, source: Checkpoint, patch: Patch, direction: Direction, progress: Progress | None
    ) -> None:
        self._source = source
        self._patch = patch
        self._direction = direction
        self._progress = progress or Silent()
        self._entries = {entry.name: entry for entry in patch.plan.entries}
        self._probed: list[tuple[PatchEntry, str]] = []
        self._check_tensors()

    def run(self, out: AnyPath, overwrite: bool, max_shard_bytes: int | None) -> Applied:
        """Write ``out`` unless the source is at the goal already."""
        if self._source.directory is None and max_shard_bytes is not None:
            problem = f"{shown_path(self._source.path)} is one file, and so will OUT be"
            raise UsageError(f"{problem}; expected no shard size")
        must_write = self._probe()
        if must_write:
            self._write(out, overwrite, max_shard_bytes or DEFAULT_SHARD_BYTES)
        else:
            with closing(self._read(in_use=DEPTH)) as blocks:
                for block in blocks:
                    self._saw(block)
        self._progress.finish()
        plan = self._patch.plan
        return Applied(must_write, len(self._patch), plan.changed, self._source.total_bytes)

    def check(self) -> None:
        """Do everything but write."""
        if not self._probe():
            problem = f"is the patch's {self._direction.goal} already"
            remedy = f"give its {self._direction.start}"
            raise WrongStateError(problem, path=self._source.path, remedy=remedy)
        hashers = {
            name: TensorHasher(entry.dtype, entry.shape, self._patch.plan.digest)
            for name, entry in self._entries.items()
        }
        self._stream(lambda name, _, view: hashers[name].update(view))
        self._check_result({name: hasher.hexdigest() for name, hasher in hashers.items()})

    def _check_tensors(self) -> None:
        source, path = self._source, self._source.path
        remedy = "give a checkpoint with the tensors of the one that the patch was made from"
        for names, lacks in (
            ([n for n in source.tensors if n not in self._entries], "that the patch does not know"),
            ([n for n in self._entries if n not in source.tensors], "of the patch less"),
        ):
            if names:
                problem = f"has {len(names)} tensors {lacks}: {listed(names)}"
                raise MismatchError(problem, path=path, remedy=remedy)
        for name, info in source.tensors.items():
            entry = self._entries[name]
            if (entry.dtype, entry.shape) != (info.dtype, info.shape):
                problem = f"must be {entry.dtype} {list(entry.shape)}, as in the patch"
                problem += f"; got {info.dtype} {list(info.shape)}"
                raise MismatchError(problem, path=path, tensor=name, remedy=remedy)

    def _probe(self) -> bool:
        """Ask the smallest tensor that changes, so that a wrong input is refused at once."""
        if not self._patch:
            return True
        entry = min(self._patch.values(), key=lambda entry: (entry.words, entry.name))
        for block in read_blocks(self._source, [entry.name], self._patch.plan.digest, in_use=0):
            if block.digest:
                self._probed = [(entry, block.digest)]
        return must_change(self._probed, self._direction, self._source.path)

    def _saw(self, block: Block) -> None:
        """Check the digest of a tensor that was read to its end, also against the probe's."""
        if block.digest:
            found = (self._entries[block.name], block.digest)
            must_change([*self._probed, found], self._direction, self._source.path)

    def _read(self, in_use: int) -> Generator[Block, None, None]:
        names = self._source.tensors
        return ahead(read_blocks(self._source, names, self._patch.plan.digest, in_use=in_use))

    def _changed(self, blocks: Generator[Block, None, None]) -> Generator[Block, None, None]:
        """XOR the patch into each block, in place."""
        with closing(blocks):
            parts: StoredParts | None = None
            for block in blocks:
                entry = self._entries[block.name]
                if block.begin == 0:
                    parts = self._patch.parts(block.name) if entry.changed else None
                if parts is not None:
                    width = entry.word_bytes
                    parts.xor_(words_of(block.view, width), block.begin // width)
                yield block

    def _stream(self, write: Callable[[str, int, memoryview], None]) -> None:
        done = done_bytes = 0
        total = len(self._entries)
        self._progress.start(total)
        # A block is alive in the reading stage, the XOR stage and here.
        with closing(ahead(self._changed(self._read(in_use=2 * DEPTH)))) as blocks:
            for block in blocks:
                write(block.name, block.begin, block.view)
                done_bytes += len(block.view)
                if block.digest:
                    self._saw(block)
                    done += 1
                    self._progress.group(block.name, done, total, done_bytes)

    def _write(self, out: AnyPath, overwrite: bool, max_shard_bytes: int) -> None:
        source, patch = self._source, self._patch
        single = source.directory is None
        specs, limit = source.tensors.values(), None if single else max_shard_bytes
        staged = (StagedFile if single else StagedCheckpoint)(
            out,
            plan_layout(specs, max_shard_bytes=limit),
            overwrite=overwrite,
            inputs=(*source.input_paths, *patch.input_paths),
            hash=patch.plan.digest,
        )
        with staged:
            self._stream(staged.write)
            self._check_result(staged.finish())
            if isinstance(staged, StagedCheckpoint):
                for path in source.side_files:
                    staged.copy_file(path)
            source.check_unchanged()
            patch.check_unchanged()
            staged.commit()

    def _check_result(self, digests: Mapping[str, str]) -> None:
        for name, digest in digests.items():
            expected = self._direction.goal_of(self._entries[name])
            if digest != expected:
                raise wrong_result(self._patch.path, name, expected, digest)
