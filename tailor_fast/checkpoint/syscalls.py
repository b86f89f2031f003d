"""Linux calls that Python's ``os`` lacks, each raising ``OSError`` like the others do."""

import ctypes
import errno
import os
from collections.abc import Callable

_libc = ctypes.CDLL(None, use_errno=True)  # a call through it releases the GIL
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_SYNC_WAIT_BEFORE, _SYNC_WRITE, _SYNC_WAIT_AFTER = 1, 2, 4
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ESPIPE)


def _bind(name: str, *kinds: type) -> Callable[..., None]:
    function = getattr(_libc, name, None)

    def call(*arguments: object) -> None:
        if function is None:  # another C library
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        while function(*arguments) != 0:
            code = ctypes.get_errno()
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))

    if function is not None:
        function.argtypes = kinds
        function.restype = ctypes.c_int
    return call


_int, _bytes, _offset = ctypes.c_int, ctypes.c_char_p, ctypes.c_int64
_renameat2 = _bind("renameat2", _int, _bytes, _int, _bytes, ctypes.c_uint)
_fallocate = _bind("fallocate", _int, _int, _offset, _offset)
_sync_file_range = _bind("sync_file_range", _int, _offset, _offset, ctypes.c_uint)


ASIDE = ".old"  # ends the name of a replaced output where two names cannot be swapped in one step


def rename_new(source: str, target: str) -> None:
    """Rename; fails with ``FileExistsError`` when ``target`` exists, on every file system."""
    try:
        _renameat2(
            _AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE
        )
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        os.rename(source, target)  # noqa: PTH104  text paths, as above


def exchange(source: str, target: str) -> None:
    """Swap two names in one step; where the file system cannot, in two with a way back."""
    try:
        _renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        _exchange_by_steps(source, target)


def _exchange_by_steps(source: str, target: str) -> None:
    aside = source + ASIDE
    os.rename(target, aside)  # noqa: PTH104
    try:
        os.rename(source, target)  # noqa: PTH104
    except BaseException:
        os.rename(aside, target)  # noqa: PTH104
        raise
    os.rename(aside, source)  # noqa: PTH104


def reserve(fd: int, size: int) -> None:
    """Reserve ``size`` bytes on disk for ``fd``; does nothing where the file system cannot.

    ``os.posix_fallocate`` would write zeros there instead, that is every byte twice.
    """
    if size == 0:
        return
    try:
        _fallocate(fd, 0, 0, size)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def start_writeback(fd: int, offset: int, count: int) -> None:
    """Start writing a range to disk, without waiting."""
    _writeback(fd, offset, count, _SYNC_WRITE)


def finish_writeback(fd: int, offset: int, count: int) -> None:
    """Wait until a range is on disk; an error of the disk is raised here."""
    _writeback(fd, offset, count, _SYNC_WAIT_BEFORE | _SYNC_WRITE | _SYNC_WAIT_AFTER)


def _writeback(fd: int, offset: int, count: int, flags: int) -> None:
    try:
        _sync_file_range(fd, offset, count, flags)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        if flags != _SYNC_WRITE:
            os.fdatasync(fd)
