"""Writing an output that is complete or not there.

Everything is written into a directory beside OUT and made durable file by file; the index comes
last, then OUT gets its name in one step. Leaving the ``with`` block without ``commit`` - by an
error, Ctrl-C, or any exception that a signal handler raises - removes all of it.
"""

import hashlib
import os
import shutil
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from tailor_fast.checkpoint.errors import AnyPath, IncompleteError, NoSpaceError, quoted
from tailor_fast.checkpoint.files import (
    byte_view,
    open_input,
    output_error,
    read_exact,
    write_exact,
)
from tailor_fast.checkpoint.gate import Gate
from tailor_fast.checkpoint.hashing import HashName, checkpoint_root
from tailor_fast.checkpoint.index import INDEX_NAME
from tailor_fast.checkpoint.plan import Layout
from tailor_fast.checkpoint.records import CheckpointRecord, FileRecord
from tailor_fast.checkpoint.shardfile import ShardFile
from tailor_fast.checkpoint.sizes import shown_size
from tailor_fast.checkpoint.staging import Staging

_COPY_BYTES = 4 * 2**20
_SPARE_BYTES = 2**20  # for the small files: configuration, index, report


class _Staged:
    """What a directory and a single file have in common: weight files in a staging directory."""

    def __init__(
        self,
        staging: Staging,
        layout: Layout,
        hash: HashName,  # noqa: A002  as hashlib's own argument is named
        *,
        drop_cache: bool,
    ) -> None:
        self.layout = layout
        self.out = staging.out
        self._staging = staging
        self._hash: HashName = hash
        self._gate = Gate(staging.out)
        self._failed = False
        self._files: dict[str, FileRecord] = {}
        self._shards: list[ShardFile] = []
        try:
            _check_space(staging, layout)
            for plan in layout.shards:
                shard = ShardFile(staging, plan, layout.tensors, hash, drop_cache=drop_cache)
                self._shards.append(shard)
        except BaseException:
            self.abort()
            raise

    def write(self, name: str, begin: int, buffer: object) -> None:
        """Write bytes of a tensor, in any order and from any thread.

        The last bytes of a file make it durable, which takes as long as the disk does. Bytes that
        arrive in order are hashed on the way; a tensor whose bytes do not is read back for it.

        Args:
            name: tensor of the layout.
            begin: byte of the tensor at which ``buffer`` starts.
            buffer: contiguous CPU tensor of any dtype, bytes, bytearray or memoryview.

        Raises:
            KeyError: no such tensor.
            TypeError, ValueError: buffer not usable, range outside the tensor or written before.
            DiskFullError: disk, quota or file-size limit reached.
            TransferError: the system reports an error; the message has file and offset.
        """
        view = byte_view(buffer, writable=False)
        shard = self._shards[self.layout.tensors[name].shard]
        with self._gate:
            self._check_sound()
            shard.begin_write(name, begin, len(view))
            with self._poisoned_by_failure():
                shard.write(name, begin, view)

    def finish(self) -> dict[str, str]:
        """Make all weight files durable and return the digest of each tensor.

        Raises:
            IncompleteError: bytes of a tensor are missing; it may be called again.
            DiskFullError, TransferError: the system failed to write.
        """
        with self._gate:
            self._check_sound()
            for shard in self._shards:
                shard.check_complete()
            with self._poisoned_by_failure():
                for shard in self._shards:
                    shard.finish()
        found = {name: digest for shard in self._shards for name, digest in shard.digests.items()}
        return {name: found[name] for name in self.layout.tensors}

    def record(self) -> CheckpointRecord:
        """Record what the output consists of so far, for the manifest; calls ``finish``."""
        digests = self.finish()
        files = dict(self._files)
        for plan in self.layout.shards:
            digest = hashlib.sha256(plan.header).hexdigest()
            name = self._staging.final_path(plan.file_name).name
            files[name] = FileRecord(plan.size, header_sha256=digest)
        if self.layout.index is not None:
            digest = hashlib.sha256(self.layout.index).hexdigest()
            files[INDEX_NAME] = FileRecord(len(self.layout.index), sha256=digest)
        return CheckpointRecord(files, digests, checkpoint_root(digests, self._hash))

    def _publish(self, name: str | None) -> None:
        with self._poisoned_by_failure():
            self._staging.publish(name)
        self._gate.shut()

    def abort(self) -> None:
        """Remove everything written; does nothing after a commit. Safe to repeat.

        Waits for writes of other threads that have begun; later ones raise ``ValueError``.
        """
        self._gate.shut()
        for shard in self._shards:
            shard.close()
        self._staging.discard()

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        """Abort unless committed."""
        self.abort()

    def _check_sound(self) -> None:
        if self._failed:
            raise IncompleteError("a write failed, nothing more is written", path=self.out)

    @contextmanager
    def _poisoned_by_failure(self) -> Iterator[None]:
        # after a failed write or fsync nobody knows what the disk holds: never try again
        try:
            yield
        except BaseException:
            self._failed = True
            raise


class StagedCheckpoint(_Staged):
    """An output directory in the making.

    Attributes:
        out: absolute path of the output.
        layout: its weight files.
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
        """Check the place, lock it, reserve the space and write all headers.

        Args:
            out: directory to make; its parent must exist.
            layout: from ``plan_layout``.
            overwrite: allow OUT to exist, if it is a checkpoint; it is replaced at the end.
            inputs: ``Checkpoint.input_paths`` of all inputs.
            hash: algorithm of the tensor digests.
            drop_cache: do not keep the output in the page cache.

        Raises:
            OutputExistsError, OutputLockedError, OutputPlaceError: see ``staging``.
            NoSpaceError: not enough room; nothing was written.
            DiskFullError, TransferError: the system failed to write.
        """
        staging = Staging(out, directory=True, overwrite=overwrite, inputs=inputs)
        super().__init__(staging, layout, hash, drop_cache=drop_cache)

    @staticmethod
    def check(
        out: AnyPath, layout: Layout, *, overwrite: bool = False, inputs: Iterable[AnyPath] = ()
    ) -> None:
        """Check that the output could be made, and leave nothing behind.

        Args and errors as for the constructor; for plans and dry runs.
        """
        staging = Staging(out, directory=True, overwrite=overwrite, inputs=inputs)
        try:
            _check_space(staging, layout)
        finally:
            staging.discard()

    def add_file(self, name: str, data: bytes | str) -> None:
        """Add a small file; text is written as UTF-8.

        Raises:
            ValueError: the name is not bare, or taken.
            DiskFullError, TransferError: the system failed to write.
        """
        self._check_name(name)
        self._write_file(name, [data.encode() if isinstance(data, str) else data])

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
                    raise output_error(error, path, "making the file durable") from error
                finally:
                    os.close(fd)
        self._files[name] = FileRecord(offset, sha256=digest.hexdigest())


class StagedFile(_Staged):
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


def _check_space(staging: Staging, layout: Layout) -> None:
    needed = layout.file_bytes + layout.file_bytes // 100 + _SPARE_BYTES
    try:
        disk = shutil.disk_usage(staging.parent)
    except OSError as error:
        raise output_error(error, staging.out, "asking for the free space") from error
    if disk.total and disk.free < needed:  # some network file systems report zero for unknown
        problem = f"needs {shown_size(needed)} of disk, {shown_size(disk.free)} are free"
        remedy = "make room or choose another place"
        raise NoSpaceError(problem, path=staging.out, remedy=remedy)
