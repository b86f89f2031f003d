"""Writing an output that is complete or not there.

Everything is written into a directory beside OUT and made durable file by file; the index comes
last, then OUT gets its name in one step. Leaving the ``with`` block without ``commit`` - by an
error, Ctrl-C, or any exception that a signal handler raises - removes all of it, unless a later run
may go on from what is finished.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from tailor_fast.checkpoint.errors import AnyPath, quoted
from tailor_fast.checkpoint.files import durable_error, open_input, read_exact, write_exact
from tailor_fast.checkpoint.hashing import HashName
from tailor_fast.checkpoint.index import INDEX_NAME
from tailor_fast.checkpoint.journal import Resume
from tailor_fast.checkpoint.plan import Layout
from tailor_fast.checkpoint.records import FileRecord
from tailor_fast.checkpoint.staged import Staged, check_space
from tailor_fast.checkpoint.staging import Staging

_COPY_BYTES = 4 * 2**20


class StagedCheckpoint(Staged):
    """An output directory in the making.

    Attributes:
        out: absolute path of the output.
        layout: its weight files.
        finished: what ``note`` was told about each finished tensor, by an earlier run too, whose
            tensors are on disk and must not be written again.
        kept: whether the ``with`` block was left with finished tensors for a later run.
    """

    def __init__(
        self,
        out: AnyPath,
        layout: Layout,
        *,
        overwrite: bool = False,
        inputs: Iterable[AnyPath] = (),
        hash: HashName = "xxh3-128",  # noqa: A002  as hashlib's own argument is named
        drop_cache: bool = False,
        resume: Resume | None = None,
    ) -> None:
        """Check the place, lock it, reserve the space and write all headers.

        Args:
            out: directory to make; its parent must exist.
            layout: from ``plan_layout``.
            overwrite: allow OUT to exist, if it is a checkpoint; it is replaced at the end.
            inputs: ``Checkpoint.input_paths`` of all inputs.
            hash: algorithm of the tensor digests.
            drop_cache: do not keep the output in the page cache.
            resume: whether to go on from what an earlier run finished, and to leave what this one
                finishes to a later run; None does neither.

        Raises:
            OutputExistsError, OutputLockedError, OutputPlaceError: see ``staging``.
            ResumeError: what an earlier run left does not fit, or is required and not there.
            NoSpaceError: not enough room; nothing was written.
            DiskFullError, TransferError: the system failed to write.
        """
        staging = Staging(out, directory=True, overwrite=overwrite, inputs=inputs, resume=resume)
        super().__init__(staging, layout, hash, drop_cache=drop_cache)

    @staticmethod
    def check(
        out: AnyPath, layout: Layout, *, overwrite: bool = False, inputs: Iterable[AnyPath] = ()
    ) -> None:
        """Check that the output could be made, and leave everything as it is.

        Args and errors as for the constructor; for plans and dry runs.
        """
        staging = Staging(out, directory=True, overwrite=overwrite, inputs=inputs, probe=True)
        try:
            check_space(staging, layout)
        finally:
            staging.discard()

    def add_file(self, name: str, data: bytes | str, *, recorded: bool = True) -> None:
        """Add a small file; text is written as UTF-8.

        Args:
            name: bare.
            data: what it holds.
            recorded: whether ``record`` speaks of it; False for one that holds times, so that two
                runs have one manifest.

        Raises:
            ValueError: the name is not bare, or taken.
            DiskFullError, TransferError: the system failed to write.
        """
        self._check_name(name)
        self._write_file(name, [data.encode() if isinstance(data, str) else data])
        if not recorded:
            self._unrecorded.add(name)

    def copy_file(self, path: AnyPath, name: str | None = None) -> None:
        """Add a copy of a file, byte for byte.

        Args:
            path: regular file or link to one.
            name: its name in OUT; None keeps it.

        Raises:
            ValueError: the name is taken.
            MissingFileError, TruncatedError: the file cannot be read.
            DiskFullError, TransferError: the system failed to write.
        """
        name = Path(path).name if name is None else name
        self._check_name(name)
        fd = open_input(path)
        try:
            self._write_file(name, _chunks(fd, path))
        finally:
            os.close(fd)

    def commit(self) -> None:
        """Finish all files, write the index last and give OUT its name in one step.

        Raises:
            IncompleteError: bytes of a tensor are missing or a write had failed.
            OutputExistsError: OUT has come into being meanwhile.
            DiskFullError, OutputPlaceError, TransferError: the system failed to write or rename.
        """
        self.finish()
        if self.layout.index is not None:
            self._write_file(INDEX_NAME, [self.layout.index])
        self._publish(None)

    def _check_name(self, name: str) -> None:
        taken = {INDEX_NAME, *self._files, *(plan.file_name for plan in self.layout.shards)}
        if not name or name in (".", "..") or "/" in name or "\0" in name:
            raise ValueError(f"file name must be bare; got {quoted(name)}")
        if name in taken:
            raise ValueError(f"file name must be new; {quoted(name)} is taken")

    def _write_file(self, name: str, chunks: Iterable[bytes | bytearray]) -> None:
        path = self.out / name
        digest = hashlib.sha256()
        offset = 0
        with self._gate:
            self._check_sound()
            with self._poisoned_by_failure():
                fd = self._staging.create(name)
                try:
                    for chunk in chunks:
                        write_exact(fd, memoryview(chunk), offset, path)
                        digest.update(chunk)
                        offset += len(chunk)
                    os.fsync(fd)
                except OSError as error:
                    raise durable_error(error, path, "making the file durable") from error
                finally:
                    os.close(fd)
        self._files[name] = FileRecord(offset, sha256=digest.hexdigest())


class StagedFile(Staged):
    """One safetensors file in the making, with the same promises; ``layout`` has one file.

    Attributes:
        out: absolute path of the output.
        layout: the file.
    """

    def __init__(
        self,
        out: AnyPath,
        layout: Layout,
        *,
        overwrite: bool = False,
        inputs: Iterable[AnyPath] = (),
        hash: HashName = "xxh3-128",  # noqa: A002
        drop_cache: bool = False,
    ) -> None:
        """Check the place, lock it, reserve the space and write the header.

        Args and errors as for ``StagedCheckpoint``; ``layout`` comes from ``plan_layout`` with
        ``max_shard_bytes=None``.

        Raises:
            ValueError: ``layout`` has several files.
        """
        if len(layout.shards) != 1:
            raise ValueError(f"StagedFile: layout must be one file; got {len(layout.shards)}")
        staging = Staging(out, directory=False, overwrite=overwrite, inputs=inputs)
        super().__init__(staging, layout, hash, drop_cache=drop_cache)

    @staticmethod
    def check(out: AnyPath, *, overwrite: bool = False, inputs: Iterable[AnyPath] = ()) -> None:
        """Check that a file could be made there, and leave everything as it is.

        For long work at whose end its layout is known. Args and errors as for the constructor.
        """
        Staging(out, directory=False, overwrite=overwrite, inputs=inputs, probe=True).discard()

    def commit(self) -> None:
        """Finish the file and give it its name in one step; errors as ``StagedCheckpoint``."""
        self.finish()
        self._publish(self.layout.shards[0].file_name)


def _chunks(fd: int, path: AnyPath) -> Iterator[bytearray]:
    left, offset = os.fstat(fd).st_size, 0
    while left:
        chunk = bytearray(min(left, _COPY_BYTES))
        read_exact(fd, memoryview(chunk), offset, path)
        yield chunk
        offset += len(chunk)
        left -= len(chunk)
