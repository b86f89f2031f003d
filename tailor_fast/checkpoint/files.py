"""Opening, reading and writing at offsets, with every failure turned into a typed error.

Python itself repeats a system call that a signal interrupted (PEP 475); short reads and short
writes are repeated here.
"""

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import torch

from tailor_fast.checkpoint.errors import (
    AnyPath,
    CheckpointError,
    DiskFullError,
    MissingFileError,
    NotDurableError,
    OutputPlaceError,
    TransferError,
    TruncatedError,
    quoted,
)

DISK_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file-size limit is reached",
}
_NOT_THERE = {
    errno.ENOENT: ("does not exist", "check the path"),
    errno.ENOTDIR: ("does not exist: a part of the path is no directory", "check the path"),
    errno.EACCES: ("is not readable", "check the permissions"),
    errno.EPERM: ("is not readable", "check the permissions"),
    errno.ELOOP: ("is a symbolic link that leads in a circle", "check the link"),
    errno.ENXIO: ("is a socket or a device, not a regular file", "check the path"),
    errno.ENAMETOOLONG: ("has too long a name", "check the path"),
}
_WRONG_PLACE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
)
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISSOCK, "a socket"),
)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What identifies the state of an open file."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, fd: int) -> "Snapshot":
        """Take the state of ``fd`` now."""
        status = os.fstat(fd)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def input_error(error: OSError, path: AnyPath) -> CheckpointError:
    """Turn the failure to open or list an input into a typed error."""
    if error.errno in _NOT_THERE:
        problem, remedy = _NOT_THERE[error.errno]
        return MissingFileError(problem, path=path, remedy=remedy)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        remedy = "raise the limit (`ulimit -n`)"
        return TransferError("too many open files", path=path, remedy=remedy)
    problem = f"cannot be opened: {error.strerror}"
    return TransferError(problem, path=path, remedy="check the disk")


def output_error(error: OSError, path: AnyPath, doing: str) -> CheckpointError:
    """Turn the failure of an output operation into a typed error; ``doing`` as in ``writing``."""
    if error.errno in DISK_FULL:
        problem = f"{DISK_FULL[error.errno]} while {doing}"
        return DiskFullError(problem, path=path, remedy="make room or choose another place")
    if error.errno in _WRONG_PLACE:
        problem = f"{doing} is not possible: {error.strerror}"
        return OutputPlaceError(problem, path=path, remedy="choose another place")
    return TransferError(f"{doing} failed: {error.strerror}", path=path)


def durable_error(error: OSError, path: AnyPath, doing: str) -> NotDurableError:
    """Turn the failure of an fsync or the like into a typed error."""
    if error.errno in DISK_FULL:
        return NotDurableError(f"{DISK_FULL[error.errno]} while {doing}", path=path)
    return NotDurableError(f"{doing} failed: {error.strerror}", path=path)


def list_names(directory: Path) -> list[str]:
    """Return the names in ``directory``, sorted.

    Raises:
        MissingFileError, TransferError: it cannot be listed.
    """
    try:
        return sorted(entry.name for entry in directory.iterdir())
    except OSError as error:
        raise input_error(error, directory) from error


def open_input(path: AnyPath) -> int:
    """Open a regular file for reading; a pipe or device is refused and cannot hang the caller.

    Raises:
        MissingFileError: not there, not readable or not a regular file.
        TransferError: the system failed to open it.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        fd = os.open(path, flags)
    except OSError as error:
        raise input_error(error, path) from error
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        raise irregular(mode, path)
    return fd


def irregular(mode: int, path: AnyPath) -> MissingFileError:
    """The error about an input that is no regular file, from its mode."""
    kind = next((text for matches, text in _KINDS if matches(mode)), "special")
    problem = f"must be a regular file; it is {kind}"
    return MissingFileError(problem, path=path, remedy="check the path")


def read_exact(
    fd: int, view: memoryview, offset: int, path: AnyPath, tensor: str | None = None
) -> None:
    """Fill ``view`` (bytes) from ``offset`` of the file; ``tensor`` is what is read, for errors.

    Raises:
        TruncatedError: the file ends before ``view`` is full.
        TransferError: the system reports an error; the message has file and offset.
    """
    done = 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            problem = f"reading at byte {offset + done} failed: {error.strerror}"
            remedy = "check the disk"
            raise TransferError(problem, path=path, tensor=tensor, remedy=remedy) from error
        if count == 0:
            problem = f"ends at byte {offset + done}, {len(view) - done} bytes were still expected"
            remedy = "do not change inputs while they are read"
            raise TruncatedError(problem, path=path, tensor=tensor, remedy=remedy)
        done += count


def write_exact(fd: int, view: memoryview, offset: int, path: AnyPath) -> None:
    """Write all of ``view`` (bytes) at ``offset`` of the file.

    Raises:
        DiskFullError: disk, quota or file-size limit reached; the message says how much is left.
        TransferError: any other error; the message has file and offset.
    """
    done = 0
    while done < len(view):
        try:
            count = os.pwrite(fd, view[done:], offset + done)
        except OSError as error:
            left = f"writing {len(view) - done} bytes at byte {offset + done}"
            raise output_error(error, path, left) from error
        if count <= 0:
            raise TransferError(f"nothing was written at byte {offset + done}", path=path)
        done += count


def byte_view(buffer: object, *, writable: bool) -> memoryview:
    """Return the bytes of ``buffer`` without a copy.

    Args:
        buffer: contiguous CPU tensor of any dtype, or an object with the buffer protocol.
        writable: whether the bytes will be changed.

    Raises:
        TypeError: neither of the two, or read-only where it must not be.
        ValueError: not contiguous, or not on the CPU.
    """
    if isinstance(buffer, torch.Tensor):
        if buffer.device.type != "cpu" or not buffer.is_contiguous():
            got = f"strides {tuple(buffer.stride())} on {buffer.device}"
            raise ValueError(f"buffer must be a contiguous CPU tensor; got {got}")
        view: memoryview = buffer.detach().reshape(-1).view(torch.uint8).numpy().data
        return view
    if not isinstance(buffer, bytes | bytearray | memoryview):
        got = type(buffer).__name__
        raise TypeError(f"buffer must be a tensor, bytes, bytearray or memoryview; got {got}")
    view = memoryview(buffer)
    if writable and view.readonly:
        raise TypeError(f"buffer must be writable; got {type(buffer).__name__}")
    if not view.c_contiguous:
        raise ValueError(f"buffer must be contiguous; got strides {view.strides}")
    return view.cast("B") if view.nbytes else memoryview(bytearray())


def window(
    name: str, nbytes: int, buffer: object, begin: int, end: int | None
) -> tuple[memoryview, int]:
    """Check the arguments of ``read_into`` for tensor ``name`` of ``nbytes`` bytes.

    Returns:
        The bytes to fill, and one past the last byte to read.

    Raises:
        TypeError, ValueError: buffer not usable or too small, range outside the tensor.
    """
    end = nbytes if end is None else end
    view = byte_view(buffer, writable=True)
    if not 0 <= begin <= end <= nbytes:
        raise ValueError(
            f"read_into: range must lie in [0, {nbytes}] of {quoted(name)}; got [{begin}, {end}]"
        )
    count = end - begin
    if len(view) < count:
        raise ValueError(f"read_into: buffer must have {count} bytes; got {len(view)}")
    return view[:count], end
