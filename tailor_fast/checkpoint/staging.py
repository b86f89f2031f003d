"""The place where an output grows: a locked directory beside OUT, renamed whole at the end.

OUT is absent (or its old self) until the rename and complete from then on, whatever happens.
While the lock is held nobody else writes OUT, so that a directory left by a killed run may go.
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import stat
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tailor_fast.checkpoint.errors import (
    AnyPath,
    OutputExistsError,
    OutputLockedError,
    OutputPlaceError,
    shown_path,
)
from tailor_fast.checkpoint.files import list_names, output_error
from tailor_fast.checkpoint.index import INDEX_SUFFIX, SUFFIX
from tailor_fast.checkpoint.signals import signals_held
from tailor_fast.checkpoint.syscalls import ASIDE, exchange, rename_new

_log = logging.getLogger("tailor_fast")
_ID_BYTES = 6
_ELSEWHERE = "choose another OUT"


@dataclass
class _Held:
    """What a ``Staging`` has made and must take away again.

    Attributes:
        path: the directory.
        lock_path: the lock file.
        fd: the directory, open; -1 while it is not.
        lock_fd: the lock file, open and locked; -1 while it is not.
        owner: the process that made them; one forked from it takes nothing away.
    """

    path: Path
    lock_path: Path
    fd: int = -1
    lock_fd: int = -1
    owner: int = field(default_factory=os.getpid)

    def discard(self) -> None:
        """Remove both; safe to repeat."""
        if os.getpid() != self.owner:
            return
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self.lock_fd < 0:
            return
        _remove_tree(self.path)
        # the name goes before the lock does: who locks an unlinked file sees that and tries again
        with contextlib.suppress(OSError):
            self.lock_path.unlink()
        os.close(self.lock_fd)
        self.lock_fd = -1


class Staging:
    """A staging directory for one output, locked against a second writer.

    Attributes:
        out: absolute path of the output.
        path: the staging directory.
    """

    def __init__(
        self, out: AnyPath, *, directory: bool, overwrite: bool, inputs: Iterable[AnyPath]
    ) -> None:
        """Lock OUT, check that it may be written and make the directory.

        Args:
            out: the output.
            directory: whether OUT becomes a directory or one file.
            overwrite: whether OUT may exist; it is then replaced when the new one is complete.
            inputs: files and directories that OUT must not touch.

        Raises:
            OutputPlaceError: no parent directory, no permission, OUT and an input overlap.
            OutputLockedError: another writer holds OUT.
            OutputExistsError: OUT exists and ``overwrite`` is False, or is not ours to replace.
        """
        absolute = Path(os.path.abspath(out))  # noqa: PTH100  OUT itself must not be resolved
        self.parent = Path(os.path.realpath(absolute.parent))
        self.out = self.parent / absolute.name
        self._directory = directory
        self._overwrite = overwrite
        self.path = self.parent / f".{self.out.name}.tailor-{secrets.token_hex(_ID_BYTES)}"
        lock_path = self.parent / f".{self.out.name}.tailor.lock"
        self._held = _Held(self.path, lock_path)
        # As for a temporary directory of the standard library. It also covers the moment between
        # this constructor and the caller's ``with``, in which a signal may arrive.
        weakref.finalize(self, self._held.discard)
        _check_parent(self.parent, self.out)
        _check_apart(self.out, inputs)
        try:
            with signals_held():  # a file that is made is known to ``discard``
                self._held.lock_fd = _lock(lock_path, self.out)
                self._recover()
                self._check_out()
                self._make()
        except BaseException:
            self.discard()
            raise

    @property
    def fd(self) -> int:
        """The staging directory, open."""
        return self._held.fd

    def _check_out(self) -> None:
        if not os.path.lexists(self.out):
            return
        if not self._overwrite:
            remedy = f"{_ELSEWHERE} or allow it to be overwritten"
            raise OutputExistsError("exists already", path=self.out, remedy=remedy)
        fits = self.out.is_dir() if self._directory else self.out.is_file()
        if self.out.is_symlink() or not fits:
            problem = f"is no {'directory' if self._directory else 'file'} and is not overwritten"
            raise OutputExistsError(problem, path=self.out, remedy=_ELSEWHERE)
        names = list_names(self.out) if self._directory else []
        if names and not any(name.endswith((SUFFIX, INDEX_SUFFIX)) for name in names):
            problem = "holds no safetensors file, so it is no checkpoint and not overwritten"
            raise OutputExistsError(problem, path=self.out, remedy=_ELSEWHERE)

    def _recover(self) -> None:
        """Clear what a killed run of the same OUT left; the lock is held, so none is running."""
        mark = rf"\.{re.escape(self.out.name)}\.tailor-[0-9a-f]{{{2 * _ID_BYTES}}}"
        for name in list_names(self.parent):
            path = self.parent / name
            if re.fullmatch(mark + re.escape(ASIDE), name) and not os.path.lexists(self.out):
                _log.warning("putting back %s, left by a run that was killed", shown_path(self.out))
                try:
                    path.rename(self.out)
                except OSError as error:
                    raise output_error(error, self.out, "putting the old one back") from error
            elif re.fullmatch(f"{mark}({re.escape(ASIDE)})?", name):
                _log.warning("removing %s, left by a run that was killed", shown_path(path))
                _remove_tree(path)

    def _make(self) -> None:
        try:
            self.path.mkdir()
            self._held.fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise output_error(error, self.out, "making the directory") from error

    def final_path(self, name: str) -> Path:
        """Where file ``name`` of the directory will be in the end."""
        return self.out / name if self._directory else self.out

    def create(self, name: str) -> int:
        """Create file ``name`` in the directory and return it open for reading and writing.

        Its mode is 0666 less the umask, as for any file that a program makes.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return self._open(name, flags)

    def reopen(self, name: str, flags: int = 0) -> int:
        """Open file ``name``, made by ``create``, again; ``flags`` come on top."""
        return self._open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | flags)

    def _open(self, name: str, flags: int) -> int:
        try:
            return os.open(name, flags, 0o666, dir_fd=self.fd)
        except OSError as error:
            raise output_error(error, self.final_path(name), "making the file") from error

    def publish(self, name: str | None = None) -> None:
        """Give OUT its content in one step and release the lock.

        Args:
            name: the one file of the directory that becomes OUT; None: the directory itself.

        Raises:
            OutputExistsError: OUT has come into being, or is another thing, meanwhile.
            TransferError: the system failed to rename or to make it durable.
        """
        source = self.path if name is None else self.path / name
        replace = self._overwrite and os.path.lexists(self.out)
        if replace:
            self._check_out()
        try:
            sync_directory(self.fd)
            if replace:
                source.chmod(stat.S_IMODE(self.out.stat().st_mode))
            replacing = exchange if self._directory else os.replace
            (replacing if replace else rename_new)(str(source), str(self.out))
            parent_fd = os.open(self.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                sync_directory(parent_fd)
            finally:
                os.close(parent_fd)
        except FileExistsError as error:
            problem = "came into being while the output was made"
            raise OutputExistsError(problem, path=self.out, remedy=_ELSEWHERE) from error
        except OSError as error:
            raise output_error(error, self.out, "renaming the finished output") from error
        self.discard()

    def discard(self) -> None:
        """Remove the directory, whatever it holds, and release the lock; safe to repeat.

        Before the rename it holds the unfinished output, after an exchange the old one.
        """
        self._held.discard()


def sync_directory(fd: int) -> None:
    """Make the names in a directory durable; nothing where directories cannot be synced."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def _remove_tree(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return
    except OSError as error:
        _log.warning("cannot remove %s: %s", shown_path(path), error.strerror)


def _lock(path: Path, out: Path) -> int:
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise output_error(error, out, "making the lock file") from error
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, fd)
            _take_lock(fd, out)
            if _same_file(fd, path):
                undo.callback(path.unlink)
                _write_pid(fd, out)
                undo.pop_all()
                return fd


def _take_lock(fd: int, out: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
        who = f"process {pid}" if pid.isdecimal() else "another process"
        remedy = f"wait for it or {_ELSEWHERE}"
        raise OutputLockedError(f"is being written by {who}", path=out, remedy=remedy) from None
    except OSError as error:
        problem = f"cannot be locked: {error.strerror}"
        remedy = f"{_ELSEWHERE}, on a file system that can lock"
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


def _check_parent(parent: Path, out: Path) -> None:
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


def _check_apart(out: Path, inputs: Iterable[AnyPath]) -> None:
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
        raise OutputPlaceError(problem, path=out, remedy=_ELSEWHERE)
