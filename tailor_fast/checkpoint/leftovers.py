"""What a run that ended early leaves beside its output, and how it is removed."""

import logging
import shutil
from pathlib import Path

from tailor_fast.checkpoint.errors import shown_path

_log = logging.getLogger("tailor_fast")
JOURNAL = ".journal"  # ends the name of what says how far the directory of that name has come


def allocated(path: Path) -> int:
    """Bytes of the disk that a file, or the files of a directory, take."""
    try:
        files = list(path.iterdir()) if path.is_dir() else [path]
        return sum(file.lstat().st_blocks * 512 for file in files)
    except OSError:
        return 0  # an estimate; what is wrong with them shows when they are opened


def journal_of(directory: Path) -> Path:
    """Where the journal of a staging directory is."""
    return directory.with_name(directory.name + JOURNAL)


def remove(path: Path) -> None:
    """Remove a file or a directory, if it is there; what cannot be removed is logged."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        _log.warning("cannot remove %s: %s", shown_path(path), error.strerror)
