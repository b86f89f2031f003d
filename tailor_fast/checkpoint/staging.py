"""The place where an output grows: a locked directory beside OUT, renamed whole at the end.

OUT is absent (or its old self) until the rename and complete from then on, whatever happens.
While the lock is held nobody else writes OUT, so that a directory left by a killed run may go.
"""

import contextlib
import errno
import logging
import os
import re
import secrets
import stat
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tailor_fast.checkpoint.errors import (
    AnyPath,
    OutputExistsError,
    ResumeError,
    shown_path,
)
from tailor_fast.checkpoint.files import durable_error, list_names, output_error
from tailor_fast.checkpoint.index import INDEX_SUFFIX, SUFFIX
from tailor_fast.checkpoint.journal import Journal, Past, Resume, read_journal, what_changed
from tailor_fast.checkpoint.leftovers import JOURNAL, allocated, journal_of, remove
from tailor_fast.checkpoint.places import ELSEWHERE, OVERWRITE, check_apart, check_parent, take_lock
from tailor_fast.checkpoint.signals import signals_held
from tailor_fast.checkpoint.syscalls import ASIDE, exchange, rename_new

_log = logging.getLogger("tailor_fast")
_ID_BYTES = 6


@dataclass
class _Held:
    """What a ``Staging`` has made and must take away again.

    Attributes:
        path: the directory.
        lock_path: the lock file.
        fd: the directory, open; -1 while it is not.
        lock_fd: the lock file, open and locked; -1 while it is not.
        kept: whether ``discard`` leaves the directory and its journal to a later run.
        owner: the process that made them; one forked from it takes nothing away.
    """

    path: Path
    lock_path: Path
    fd: int = -1
    lock_fd: int = -1
    kept: bool = False
    owner: int = field(default_factory=os.getpid)

    def discard(self) -> None:
        """Remove them, or, what is ``kept``, only let go of it; safe to repeat."""
        if os.getpid() != self.owner:
            return
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self.lock_fd < 0:
            return
        if not self.kept:
            remove(self.path)
            remove(journal_of(self.path))
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
        past: what an earlier run says that it finished in the directory; None where it is new.
        journal: for what this one finishes; None where no later run is to go on from it.
        published: whether OUT has its content.
        reusable_bytes: of the disk, taken by an earlier run, that this one needs no more to find.
    """

    def __init__(
        self,
        out: AnyPath,
        *,
        directory: bool,
        overwrite: bool,
        inputs: Iterable[AnyPath],
        resume: Resume | None = None,
        probe: bool = False,
    ) -> None:
        """Lock OUT, check that it may be written and make the directory.

        Args:
            out: the output.
            directory: whether OUT becomes a directory or one file.
            overwrite: whether OUT may exist; it is then replaced when the new one is complete.
            inputs: files and directories that OUT must not touch.
            resume: take over the directory of a run with this fingerprint; None never does.
            probe: only check; make no directory, and leave what an earlier run left.

        Raises:
            OutputPlaceError: no parent directory, no permission, OUT and an input overlap.
            OutputLockedError: another writer holds OUT.
            OutputExistsError: OUT exists and ``overwrite`` is False, or is not ours to replace.
            ResumeError: an earlier run finished something that does not fit this one, or there is
                none although ``resume`` requires it.
        """
        absolute = Path(os.path.abspath(out))  # noqa: PTH100  OUT itself must not be resolved
        self.parent = Path(os.path.realpath(absolute.parent))
        self.out = self.parent / absolute.name
        self._directory = directory
        self._overwrite = overwrite
        self._resume = None if resume is None or resume.mode == "never" else resume
        self.past: Past | None = None
        self.journal: Journal | None = None
        self.published = False
        self.path = self.parent / f".{self.out.name}.tailor-{secrets.token_hex(_ID_BYTES)}"
        lock_path = self.parent / f".{self.out.name}.tailor.lock"
        self._held = _Held(self.path, lock_path)
        # As for a temporary directory of the standard library. It also covers the moment between
        # this constructor and the caller's ``with``, in which a signal may arrive.
        weakref.finalize(self, self._held.discard)
        check_parent(self.parent, self.out)
        check_apart(self.out, inputs)
        try:
            with signals_held():  # a file that is made is known to ``discard``
                self._held.lock_fd = take_lock(lock_path, self.out)
                left = self._put_back()
                found = left if probe else self._resumable(left)
                self.reusable_bytes = sum(allocated(path) for path in found)
                self._clear(path for path in left if path not in found)
                self._check_out()
                if not probe:
                    self._make()
        except BaseException:
            self.discard(keep=self._held.kept)
            raise

    @property
    def fd(self) -> int:
        """The staging directory, open."""
        return self._held.fd

    def _check_out(self) -> None:
        if not os.path.lexists(self.out):
            return
        if not self._overwrite:
            remedy = f"{ELSEWHERE} {OVERWRITE}"
            raise OutputExistsError("exists already", path=self.out, remedy=remedy)
        fits = self.out.is_dir() if self._directory else self.out.is_file()
        if self.out.is_symlink() or not fits:
            problem = f"is no {'directory' if self._directory else 'file'} and is not overwritten"
            raise OutputExistsError(problem, path=self.out, remedy=ELSEWHERE)
        names = list_names(self.out) if self._directory else []
        if names and not any(name.endswith((SUFFIX, INDEX_SUFFIX)) for name in names):
            problem = "holds no safetensors file, so it is no checkpoint and not overwritten"
            raise OutputExistsError(problem, path=self.out, remedy=ELSEWHERE)

    def _put_back(self) -> list[Path]:
        """Undo half a replacement; returns all that a killed run of the same OUT left.

        The lock is held, so none is running.
        """
        mark = rf"\.{re.escape(self.out.name)}\.tailor-[0-9a-f]{{{2 * _ID_BYTES}}}"
        left = []
        for name in list_names(self.parent):
            path = self.parent / name
            if re.fullmatch(mark + re.escape(ASIDE), name) and not os.path.lexists(self.out):
                _log.warning("putting back %s, left by a run that was killed", shown_path(self.out))
                try:
                    path.rename(self.out)
                except OSError as error:
                    raise output_error(error, self.out, "putting the old one back") from error
            elif re.fullmatch(f"{mark}({re.escape(ASIDE)}|{re.escape(JOURNAL)})?", name):
                left.append(path)
        return left

    def _resumable(self, left: list[Path]) -> list[Path]:
        """Take over the directory, and its journal, from which this run can go on, if any."""
        if self._resume is None:
            return []
        for path in left:
            past = read_journal(journal_of(path)) if journal_of(path) in left else None
            # after an exchange the name leads to the old output, which the journal does not mean
            if past is None or path.stat().st_ino != past.inode:
                continue
            changed = what_changed(past.fingerprint, self._resume.fingerprint)
            if changed and past.records:
                problem = f"{len(past.records)} tensors that an earlier run finished do not fit"
                remedy = "undo the change, or start over: resume 'never', or remove"
                remedy += f" {shown_path(path)}"
                raise ResumeError(f"{problem}: {changed}", path=self.out, remedy=remedy)
            if not changed:
                self.past, self.path, self._held.path = past, path, path
                self._held.kept = True
                return [path, journal_of(path)]
        if self._resume.mode == "required":
            problem = "no earlier run left anything to go on from"
            raise ResumeError(problem, path=self.out, remedy="use resume 'auto' to start")
        return []

    def _clear(self, left: Iterable[Path]) -> None:
        for path in left:
            _log.warning("removing %s, left by a run that was killed", shown_path(path))
            remove(path)

    def _make(self) -> None:
        try:
            if self.past is None:
                self.path.mkdir()
            self._held.fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise output_error(error, self.out, "making the directory") from error
        if self._resume is not None:
            self.journal = Journal(journal_of(self.path), self.out, self.past)
            if self.past is None:
                self.journal.begin(os.fstat(self.fd).st_ino, self._resume.fingerprint)

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

    def sync_journal(self) -> None:
        """Make the journal durable, and the names that lead to it and to what it speaks of."""
        if self.journal is not None:
            self.journal.sync()
            try:
                sync_directory(self.fd)
                _sync_names(self.parent)
            except OSError as error:
                raise durable_error(error, self.out, "making the directory durable") from error

    def names(self) -> list[str]:
        """Names of the files in the directory, sorted."""
        return list_names(self.path)

    def rename(self, name: str, new: str) -> None:
        """Rename a file of the directory and make that durable."""
        try:
            os.rename(name, new, src_dir_fd=self.fd, dst_dir_fd=self.fd)
            sync_directory(self.fd)
        except OSError as error:
            raise output_error(error, self.final_path(new), "renaming the file") from error

    def remove(self, name: str) -> None:
        """Remove a file of the directory."""
        try:
            os.unlink(name, dir_fd=self.fd)
        except OSError as error:
            raise output_error(error, self.final_path(name), "removing the file") from error

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
            with signals_held():
                (replacing if replace else rename_new)(str(source), str(self.out))
                self.published = True
            _sync_names(self.parent)
        except FileExistsError as error:
            problem = "came into being while the output was made"
            raise OutputExistsError(problem, path=self.out, remedy=ELSEWHERE) from error
        except OSError as error:
            raise output_error(error, self.out, "renaming the finished output") from error
        self.discard()

    def discard(self, *, keep: bool = False) -> None:
        """Remove the directory, whatever it holds, and release the lock; safe to repeat.

        Before the rename it holds the unfinished output, after an exchange the old one.

        Args:
            keep: leave the directory and its journal to a later run.
        """
        self._held.kept = keep
        if self.journal is not None:
            self.journal.close()
        self._held.discard()


def sync_directory(fd: int) -> None:
    """Make the names in a directory durable; nothing where directories cannot be synced."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def _sync_names(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync_directory(fd)
    finally:
        os.close(fd)
