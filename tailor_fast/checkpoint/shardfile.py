"""One output file: bytes at any offset, each exactly once, hashed, counted, few at a time dirty."""

import errno
import os
import threading
from collections.abc import Mapping

import torch

from tailor_fast.checkpoint.coverage import Coverage
from tailor_fast.checkpoint.errors import IncompleteError, NoSpaceError, TransferError, quoted
from tailor_fast.checkpoint.files import (
    DISK_FULL,
    durable_error,
    output_error,
    read_exact,
    write_exact,
)
from tailor_fast.checkpoint.hashing import HashName, TensorHasher
from tailor_fast.checkpoint.plan import Placement, ShardPlan
from tailor_fast.checkpoint.sizes import shown_size
from tailor_fast.checkpoint.staging import Staging
from tailor_fast.checkpoint.syscalls import finish_writeback, reserve, start_writeback

_WINDOW = 64 * 2**20  # at most three windows per file are dirty: filling, being written, awaited
_REREAD = 8 * 2**20
_PAGE = 4096
PART = ".part"  # ends the name of a file that is not whole and durable yet


class _Tensor:
    """Progress of one tensor. Bytes that come in order are hashed on the way, others read back."""

    def __init__(self, placement: Placement, algorithm: HashName) -> None:
        self.placement = placement
        self.coverage = Coverage()
        self.lock = threading.Lock()
        self._hasher = TensorHasher(placement.dtype, placement.shape, algorithm)
        self._hashed = 0
        self._left = placement.nbytes

    def written(self, begin: int, view: memoryview) -> bool:
        """Count and, if it is next, hash a chunk that is in the file; True when it was the last."""
        with self.lock:
            if begin == self._hashed:
                self._hasher.update(view)
                self._hashed += len(view)
            self._left -= len(view)
            return self._left == 0

    def digest(self, fd: int, path: str) -> str:
        buffer = memoryview(bytearray(min(_REREAD, self.placement.nbytes - self._hashed)))
        while self._hashed < self.placement.nbytes:
            count = min(len(buffer), self.placement.nbytes - self._hashed)
            read_exact(fd, buffer[:count], self.placement.offset + self._hashed, path)
            self._hasher.update(buffer[:count])
            self._hashed += count
        return self._hasher.hexdigest()


class _WriteBehind:
    """Keeps the disk busy and the memory that waits for it bounded."""

    def __init__(self, *, drop_cache: bool) -> None:
        self._lock = threading.Lock()
        self._drop_cache = drop_cache
        self._filling: list[tuple[int, int]] = []
        self._filled = 0
        self._started: list[tuple[int, int]] = []

    def add(self, fd: int, offset: int, count: int) -> None:
        with self._lock:
            if self._filling and sum(self._filling[-1]) == offset:
                first, before = self._filling[-1]
                self._filling[-1] = (first, before + count)
            else:
                self._filling.append((offset, count))
            self._filled += count
            if self._filled < _WINDOW:
                return
            start, wait = self._filling, self._started
            self._filling, self._filled, self._started = [], 0, start
        for extent in start:
            start_writeback(fd, *extent)
        for extent in wait:
            finish_writeback(fd, *extent)
            if self._drop_cache:
                os.posix_fadvise(fd, *extent, os.POSIX_FADV_DONTNEED)


class _PastCache:
    """Writes whole pages from aligned memory straight to the disk, where the file system can.

    The page cache would cost a copy and memory of its own, which on a virtual machine take longer
    than the disk does. No page is written in both ways.
    """

    def __init__(self, staging: Staging, name: str, path: str) -> None:
        self._staging = staging
        self._name = name
        self._path = path
        self._lock = threading.Lock()
        self._fd = -1
        self._refused = False

    def write(self, view: memoryview, offset: int) -> int:
        """Write as many bytes from the start of ``view`` as can be; returns their number."""
        count = len(view) // _PAGE * _PAGE
        if offset % _PAGE or not count or view.readonly or _address(view) % _PAGE:
            return 0
        fd = self._opened()
        if fd < 0:
            return 0
        try:
            write_exact(fd, view[:count], offset, self._path)
        except TransferError as error:
            if getattr(error.__cause__, "errno", None) != errno.EINVAL:
                raise
            self._refused = True  # pages of this file system are larger
            return 0
        return count

    def _opened(self) -> int:
        with self._lock:
            if self._fd < 0 and not self._refused:
                try:
                    self._fd = self._staging.reopen(self._name, os.O_DIRECT)
                except TransferError as error:
                    if getattr(error.__cause__, "errno", None) != errno.EINVAL:
                        raise
                    self._refused = True
            return -1 if self._refused else self._fd

    def close(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


def _address(view: memoryview) -> int:
    return torch.frombuffer(view, dtype=torch.uint8).data_ptr()


class ShardFile:
    """One file of an output, from reservation to fsync. Writes may come from several threads."""

    def __init__(
        self,
        staging: Staging,
        plan: ShardPlan,
        placements: Mapping[str, Placement],
        algorithm: HashName,
        *,
        drop_cache: bool,
        past: Mapping[str, str] | None = None,
    ) -> None:
        """Create the file, reserve its bytes on disk and write its header.

        Args:
            staging: where.
            plan: the file.
            placements: of its tensors.
            algorithm: of the tensor digests.
            drop_cache: do not keep it in the page cache.
            past: digests of the tensors that an earlier run says it has finished; those that are on
                disk are finished from the start.
        """
        self.plan = plan
        self._name = plan.file_name + PART
        self.digests: dict[str, str] = {}
        self._finished = False
        self._finishing = threading.Lock()
        self._staging = staging
        self._placements = placements
        self._algorithm = algorithm
        self._path = str(staging.final_path(plan.file_name))
        self._behind = _WriteBehind(drop_cache=drop_cache)
        self._lock = threading.Lock()
        self._tensors: dict[str, _Tensor] = {}
        self._left = plan.size - len(plan.header)
        self._past_cache = _PastCache(staging, self._name, self._path)
        self._fd = self._take_over() if past is not None else staging.create(self._name)
        try:
            self._reserve()
            write_exact(self._fd, memoryview(plan.header), 0, self._path)
            self._believe(past or {})
        finally:
            self.close()

    def _take_over(self) -> int:
        """Open what an earlier run has of the file."""
        names = self._staging.names()
        if self.plan.file_name in names:  # whole then; it may have been damaged since
            self._staging.rename(self.plan.file_name, self._name)
        elif self._name not in names:
            return self._staging.create(self._name)
        return self._staging.reopen(self._name)

    def _believe(self, past: Mapping[str, str]) -> None:
        """Take tensors as finished whose words on disk have the digest that is claimed."""
        size = os.fstat(self._fd).st_size
        for name in self.plan.tensors:
            placement = self._placements[name]
            if name not in past or placement.offset + placement.nbytes > size:
                continue
            digest = _Tensor(placement, self._algorithm).digest(self._fd, self._path)
            if digest == past[name]:
                self.digests[name] = digest
                self._left -= placement.nbytes

    def _reserve(self) -> None:
        try:
            reserve(self._fd, self.plan.size)
        except OSError as error:
            doing = f"reserving {shown_size(self.plan.size)}"
            if error.errno in DISK_FULL:
                problem = f"{DISK_FULL[error.errno]}: {doing} failed"
                remedy = "make room or choose another place"
                raise NoSpaceError(problem, path=self._path, remedy=remedy) from error
            raise output_error(error, self._path, doing) from error

    def begin_write(self, name: str, begin: int, count: int) -> None:
        """Claim bytes of a tensor; raises ``ValueError`` when out of range or claimed before."""
        placement = self._placements[name]
        if begin < 0 or begin + count > placement.nbytes:
            raise ValueError(
                f"write: range must lie in [0, {placement.nbytes}] of {quoted(name)};"
                f" got [{begin}, {begin + count}]"
            )
        if count and not self._claim(name, begin, begin + count):
            raise ValueError(
                f"write: bytes [{begin}, {begin + count}] of {quoted(name)} must be written once;"
                " a part of them was written before"
            )

    def _claim(self, name: str, begin: int, end: int) -> bool:
        with self._lock:
            if name in self.digests:
                return False
            if name not in self._tensors:
                self._tensors[name] = _Tensor(self._placements[name], self._algorithm)
            return self._tensors[name].coverage.take(begin, end)

    def write(self, name: str, begin: int, view: memoryview) -> None:
        """Write claimed bytes; the last bytes of the file also make it durable and close it."""
        if not len(view):
            return
        tensor = self._tensors[name]
        fd = self._opened()
        offset = tensor.placement.offset + begin
        direct = self._past_cache.write(view, offset)
        if direct < len(view):
            write_exact(fd, view[direct:], offset + direct, self._path)
            self._sync_behind(fd, offset + direct, len(view) - direct)
        if tensor.written(begin, view):
            digest = tensor.digest(fd, self._path)
            with self._lock:
                self.digests[name] = digest
                del self._tensors[name]
        with self._lock:
            self._left -= len(view)
            last = self._left == 0
        if last:
            self.finish()

    @property
    def whole(self) -> bool:
        """Whether every byte was written."""
        return self._left == 0

    def check_complete(self) -> None:
        """Raise ``IncompleteError`` when bytes are missing."""
        if self._left == 0:
            return
        for name in self.plan.tensors:
            coverage = self._tensors[name].coverage if name in self._tensors else Coverage()
            size = self._placements[name].nbytes
            begin, end = coverage.missing(size)
            if name not in self.digests and begin < end:
                problem = f"bytes [{begin}, {end}] of {size} were never written"
                raise IncompleteError(problem, path=self._path, tensor=name)
        raise IncompleteError("a write is still going on", path=self._path)

    def finish(self) -> None:
        """Make a complete file durable; does nothing when that was done before."""
        with self._finishing:  # the thread of the last bytes and a caller may both come here
            if self._finished:
                return
            for name in self.plan.tensors:
                if self._placements[name].nbytes == 0:
                    empty = _Tensor(self._placements[name], self._algorithm)
                    self.digests[name] = empty.digest(-1, self._path)
            try:
                os.fsync(self._opened())
            except OSError as error:
                raise durable_error(error, self._path, "making the file durable") from error
            self.close()
            self._staging.rename(self._name, self.plan.file_name)
            self._finished = True

    def sync(self) -> None:
        """Make what was written so far durable."""
        with self._finishing:
            if self._finished or self._fd < 0:
                return
            try:
                os.fdatasync(self._fd)
            except OSError as error:
                raise durable_error(error, self._path, "making the file durable") from error

    def read(self, name: str, view: memoryview) -> None:
        """Read back a finished tensor."""
        with self._finishing:
            written = self.plan.file_name if self._finished else self._name
            fd = self._staging.reopen(written)
        try:
            read_exact(fd, view, self._placements[name].offset, self._path, name)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Close the file, finished or not."""
        self._past_cache.close()
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _opened(self) -> int:
        with self._lock:
            if self._fd < 0:
                self._fd = self._staging.reopen(self._name)
            return self._fd

    def _sync_behind(self, fd: int, offset: int, count: int) -> None:
        try:
            self._behind.add(fd, offset, count)
        except OSError as error:
            raise durable_error(error, self._path, f"writing at byte {offset}") from error
