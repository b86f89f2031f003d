"""One output file: bytes at any offset, each exactly once, hashed, counted, few at a time dirty."""

import errno
import os
import threading
from bisect import bisect_left
from collections.abc import Mapping

import torch

from tailor_fast.checkpoint.errors import IncompleteError, NoSpaceError, TransferError, quoted
from tailor_fast.checkpoint.files import DISK_FULL, output_error, read_exact, write_exact
from tailor_fast.checkpoint.hashing import HashName, TensorHasher
from tailor_fast.checkpoint.plan import Placement, ShardPlan
from tailor_fast.checkpoint.sizes import shown_size
from tailor_fast.checkpoint.staging import Staging
from tailor_fast.checkpoint.syscalls import finish_writeback, reserve, start_writeback

_WINDOW = 64 * 2**20  # at most three windows per file are dirty: filling, being written, awaited
_REREAD = 8 * 2**20
_PAGE = 4096


class Coverage:
    """Which bytes of ``[0, size)`` have been taken: sorted, disjoint, merged spans."""

    def __init__(self) -> None:
        """Start empty."""
        self.spans: list[tuple[int, int]] = []

    def take(self, begin: int, end: int) -> bool:
        """Add ``[begin, end)``; False, and nothing added, when a byte of it was taken before."""
        at = bisect_left(self.spans, (begin, end))
        before = self.spans[at - 1] if at else (-1, -1)
        after = self.spans[at] if at < len(self.spans) else (end + 1, end + 1)
        if begin < before[1] or after[0] < end:
            return False
        low, high = at, at
        if before[1] == begin:
            begin, low = before[0], at - 1
        if after[0] == end:
            end, high = after[1], at + 1
        self.spans[low:high] = [(begin, end)]
        return True

    def missing(self, size: int) -> tuple[int, int]:
        """Return the first untaken span of ``[0, size)``; empty when there is none."""
        first = [*self.spans, (size, size)]
        if first[0][0] > 0:
            return 0, first[0][0]
        return first[0][1], first[1][0] if len(first) > 1 else size


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
    ) -> None:
        """Create the file, reserve its bytes on disk and write its header."""
        self.plan = plan
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
        self._past_cache = _PastCache(staging, plan.file_name, self._path)
        self._fd = staging.create(plan.file_name)
        try:
            self._reserve()
            write_exact(self._fd, memoryview(plan.header), 0, self._path)
        finally:
            self.close()

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
                raise output_error(error, self._path, "making the file durable") from error
            self.close()
            self._finished = True

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
                self._fd = self._staging.reopen(self.plan.file_name)
            return self._fd

    def _sync_behind(self, fd: int, offset: int, count: int) -> None:
        try:
            self._behind.add(fd, offset, count)
        except OSError as error:
            raise output_error(error, self._path, f"writing at byte {offset}") from error
