"""Errors of the checkpoint side: each is one sentence that names the file, the tensor, what was
expected, what was found and what to do.

The exit code comes from the family in ``tailor_fast._core.errors``: 65 for an input, 73 for an
output that cannot be made, 74 for reading or writing that failed half way.
"""

import os
from collections.abc import Iterable

from tailor_fast._core.errors import InputError, OutputError, StorageError, TailorError

AnyPath = str | os.PathLike[str]
_LONGEST = 100  # characters of a name or value that a message repeats


def shorten(text: str, longest: int = _LONGEST) -> str:
    """Cut ``text`` in the middle so that a hostile file cannot fill the screen."""
    if len(text) <= longest:
        return text
    return f"{text[: longest // 2]}...{text[-longest // 4 :]}"


def quoted(text: str) -> str:
    """``'name'`` with control characters escaped, at most some hundred characters."""
    text = shorten(text)  # first: escaped, each character may become ten
    return shorten(ascii(text) if not text.isprintable() else f"'{text}'")


def listed(names: Iterable[str], most: int = 5) -> str:
    """``'a', 'b' and 3 more``."""
    names = list(names)
    shown = ", ".join(quoted(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def shown_path(path: AnyPath) -> str:
    """``path`` as text that can be printed whatever bytes it holds."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return text if text.isprintable() else ascii(text)[1:-1]


class CheckpointError(TailorError):
    """Base of the errors below.

    Attributes:
        path: file or directory concerned, or None.
        tensor: name of the tensor concerned, or None.
        remedy: what to do about it, as in the sentence, or None.
    """

    def __init__(
        self,
        problem: str,
        *,
        path: AnyPath | None = None,
        tensor: str | None = None,
        remedy: str | None = None,
    ) -> None:
        """Put the sentence together: ``PATH: tensor 'NAME': PROBLEM; REMEDY``."""
        where = "" if path is None else f"{shown_path(path)}: "
        which = "" if tensor is None else f"tensor {quoted(tensor)}: "
        then = "" if remedy is None else f"; {remedy}"
        super().__init__(f"{where}{which}{problem}{then}")
        self.path = None if path is None else os.fspath(path)
        self.tensor = tensor
        self.remedy = remedy


class MissingFileError(CheckpointError, InputError):
    """A file or directory is not there, not readable, or not a regular file."""


class NotSafetensorsError(CheckpointError, InputError):
    """The file is something else: a pickle, a git-lfs pointer, a web page."""


class TruncatedError(CheckpointError, InputError):
    """The file is shorter than its header says."""


class MalformedError(CheckpointError, InputError):
    """A header or an index breaks the format's rules."""


class UnsupportedDtypeError(CheckpointError, InputError):
    """A dtype that the format does not have."""


class MismatchError(CheckpointError, InputError):
    """BASE and TUNED do not hold the same tensors."""


class ChangedError(CheckpointError, InputError):
    """An input file was changed while it was being read."""


class OutputExistsError(CheckpointError, OutputError):
    """OUT exists already."""


class OutputLockedError(CheckpointError, OutputError):
    """Another process is writing OUT."""


class OutputPlaceError(CheckpointError, OutputError):
    """OUT cannot be made there: no parent directory, no permission, inside an input."""


class ResumeError(CheckpointError, OutputError):
    """What an earlier run left does not fit this one, or there is none to go on from."""


class NoSpaceError(CheckpointError, OutputError):
    """The disk is too small for the output; nothing was written."""


class IncompleteError(CheckpointError, OutputError):
    """A commit was asked for while bytes of a tensor were missing or a write had failed."""


class TransferError(CheckpointError, StorageError):
    """The operating system failed to read or write at some offset."""


class NotDurableError(TransferError):
    """The system could not put on disk what it had taken: nobody knows what is there."""


class DiskFullError(TransferError):
    """The disk, the quota or the file-size limit was reached while writing."""
