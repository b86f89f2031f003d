"""Whether an output may stand where it is to: its parent, its lock, the inputs out of its reach."""

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from tailor_fast.checkpoint.errors import (
    AnyPath,
    OutputLockedError,
    OutputPlaceError,
    shown_path,
)
from tailor_fast.checkpoint.files import output_error

ELSEWHERE = "choose another OUT"
OVERWRITE = "or overwrite it (--overwrite, overwrite=True)"


def take_lock(path: Path, out: Path) -> int:
    """Make and lock the file ``path``; returns it open.

    Raises:
        OutputLockedError: another writer holds OUT.
        OutputPlaceError, TransferError: the file cannot be made or locked.
    """
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise output_error(error, out, "making the lock file") from error
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, fd)
            _lock_or_refuse(fd, out)
            if _same_file(fd, path):
                undo.callback(path.unlink)
                _write_pid(fd, out)
                undo.pop_all()
                return fd


def _lock_or_refuse(fd: int, out: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
        who = f"process {pid}" if pid.isdecimal() else "another process"
        remedy = f"wait for it or {ELSEWHERE}"
        raise OutputLockedError(f"is being written by {who}", path=out, remedy=remedy) from None
    except OSError as error:
        problem = f"cannot be locked: {error.strerror}"
        remedy = f"{ELSEWHERE}, on a file system that can lock"
        raise OutputPlaceError(problem, path=out, remedy=remedy) from error


def _write_pid(fd: int, out: Path) -> None:
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        raise output_error(error, out, "writing the lock file") from error


def _same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def check_parent(parent: Path, out: Path) -> None:
    """Raise ``OutputPlaceError`` unless OUT's parent is a directory."""
    try:
        reason = None if stat.S_ISDIR(parent.stat().st_mode) else os.strerror(errno.ENOTDIR)
    except OSError as error:
        reason = error.strerror
    if reason is not None:
        problem = f"directory {shown_path(parent)} cannot be used: {reason}"
        raise OutputPlaceError(problem, path=out, remedy="make it first")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _identities(path: Path) -> set[tuple[int, int]]:
    """Identities of a path and of all directories above it, as far as they exist."""
    found = (_identity(place) for place in (path, *path.parents))
    return {identity for identity in found if identity is not None}


def check_apart(out: Path, inputs: Iterable[AnyPath]) -> None:
    """Raise ``OutputPlaceError`` when OUT is, holds or lies in an input."""
    above_out = _identities(out)
    for given in inputs:
        place = Path(os.path.realpath(given))
        if _identity(place) in above_out:
            relation = "is, or lies in, the input"
        elif _identity(out) in _identities(place):
            relation = "holds the input"
        else:
            continue
        problem = f"{relation} {shown_path(given)}"
        raise OutputPlaceError(problem, path=out, remedy=ELSEWHERE)
