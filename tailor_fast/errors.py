"""The errors that end a job: one sentence each, and the exit code of the command line.

Jobs and files (``patch_checkpoint``, ``calibrate``, ``Patch`` and the like) raise these; the ops
raise ``TypeError`` and ``ValueError``. ``except TailorError`` catches them all.
"""

from tailor_fast._core.errors import (
    InputError,
    LostPeerError,
    OutputError,
    PeerError,
    StoppedError,
    StorageError,
    TailorError,
    UsageError,
)

__all__ = [
    "InputError",
    "LostPeerError",
    "OutputError",
    "PeerError",
    "StoppedError",
    "StorageError",
    "TailorError",
    "UsageError",
]
