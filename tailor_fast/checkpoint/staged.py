"""An output in the making: weight files in a staging directory, and what of them is finished."""

import hashlib
import shutil
import time
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

from tailor_fast._core.errors import InputError
from tailor_fast.checkpoint.errors import (
    DiskFullError,
    IncompleteError,
    NoSpaceError,
    TransferError,
)
from tailor_fast.checkpoint.files import byte_view, output_error
from tailor_fast.checkpoint.gate import Gate
from tailor_fast.checkpoint.hashing import HashName, checkpoint_root
from tailor_fast.checkpoint.index import INDEX_NAME
from tailor_fast.checkpoint.plan import Layout
from tailor_fast.checkpoint.records import CheckpointRecord, FileRecord
from tailor_fast.checkpoint.shardfile import PART, ShardFile
from tailor_fast.checkpoint.sizes import shown_size
from tailor_fast.checkpoint.staging import Staging

_SYNC_SECONDS = 5.0  # of finished work that a power cut may take, at most
_SPARE_BYTES = 2**20  # for the small files: configuration, index, report


class Staged:
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
        self._doubtful = False  # whether the disk may lack what the system took
        self._files: dict[str, FileRecord] = {}
        self._unrecorded: set[str] = set()
        self._shards: list[ShardFile] = []
        self._synced = time.monotonic()
        self.kept = False
        self.finished: dict[str, Mapping[str, Any]] = {}
        past = staging.past
        try:
            check_space(staging, layout)
            records = {} if past is None else past.records
            claims = {name: record["digest"] for name, record in records.items()}
            if past is not None:
                self._remove_others()
            for plan in layout.shards:
                shard = ShardFile(
                    staging,
                    plan,
                    layout.tensors,
                    hash,
                    drop_cache=drop_cache,
                    past=None if past is None else claims,
                )
                self._shards.append(shard)
                found = (name for name in plan.tensors if name in shard.digests)
                self.finished.update((name, records[name]["facts"]) for name in found)
        except BaseException:
            self._leave(keep=past is not None)
            raise

    def _remove_others(self) -> None:
        """Remove what an earlier run wrote beside the weights; it is written again."""
        weights = {plan.file_name for plan in self.layout.shards}
        for name in self._staging.names():
            if name.removesuffix(PART) not in weights:
                self._staging.remove(name)

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

    def is_written(self, name: str) -> bool:
        """Whether every byte of tensor ``name`` was written."""
        return name in self._shards[self.layout.tensors[name].shard].digests

    def note(self, name: str, facts: Mapping[str, Any]) -> None:
        """Tell a later run that tensor ``name`` is written; nothing without ``resume``.

        Args:
            name: tensor, written whole.
            facts: plain JSON that comes back in ``finished``.

        Raises:
            DiskFullError, TransferError: the system failed to write.
        """
        journal = self._staging.journal
        if journal is None:
            return
        shard = self._shards[self.layout.tensors[name].shard]
        record = {"tensor": name, "digest": shard.digests[name], "facts": facts}
        with self._gate:
            self._check_sound()
            with self._poisoned_by_failure():
                journal.add(record)
                self.finished[name] = facts
                if shard.whole or time.monotonic() - self._synced >= _SYNC_SECONDS:
                    self._sync()

    def _sync(self) -> None:
        """Make durable what is finished so far, for the case of a power cut."""
        for shard in self._shards:
            shard.sync()
        self._staging.sync_journal()
        self._synced = time.monotonic()

    def read_into(self, name: str, buffer: object) -> None:
        """Read a finished tensor back into ``buffer``, which has its size.

        Raises:
            TruncatedError, TransferError: it cannot be read.
        """
        view = byte_view(buffer, writable=True)
        with self._gate:
            self._shards[self.layout.tensors[name].shard].read(name, view)

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
        files = {name: file for name, file in self._files.items() if name not in self._unrecorded}
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

    def _leave(self, *, keep: bool) -> None:
        if self._gate.shut():
            self.kept = keep
        for shard in self._shards:
            shard.close()
        self._staging.discard(keep=keep)

    def _worth_keeping(self, error: BaseException | None) -> bool:
        """Whether a later run can go on: something is finished, on disk, and fits it still."""
        resumable = self._staging.journal is not None and not self._staging.published
        futile = error is None or isinstance(error, InputError | ValueError | TypeError)
        return resumable and bool(self.finished) and not futile and not self._doubtful

    def abort(self) -> None:
        """Remove everything written; does nothing after a commit. Safe to repeat.

        Waits for writes of other threads that have begun; later ones raise ``ValueError``.
        """
        self._leave(keep=False)

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        """Abort unless committed, or, where a later run can go on, keep what is finished."""
        self._leave(keep=self._worth_keeping(error))

    def _check_sound(self) -> None:
        if self._failed:
            raise IncompleteError("a write failed, nothing more is written", path=self.out)

    @contextmanager
    def _poisoned_by_failure(self) -> Iterator[None]:
        # after a failed write or fsync nobody knows what the disk holds: never try again
        try:
            yield
        except BaseException as error:
            self._failed = True
            full = isinstance(error, DiskFullError)  # what did not fit was not taken
            self._doubtful |= isinstance(error, TransferError) and not full
            raise


def check_space(staging: Staging, layout: Layout) -> None:
    """Raise ``NoSpaceError`` unless the disk has room for the output."""
    needed = layout.file_bytes + layout.file_bytes // 100 + _SPARE_BYTES - staging.reusable_bytes
    try:
        disk = shutil.disk_usage(staging.parent)
    except OSError as error:
        raise output_error(error, staging.out, "asking for the free space") from error
    if disk.total and disk.free < needed:  # some network file systems report zero for unknown
        problem = f"needs {shown_size(needed)} of disk, {shown_size(disk.free)} are free"
        remedy = "make room or choose another place"
        raise NoSpaceError(problem, path=staging.out, remedy=remedy)
