"""The errors of the files-and-jobs side, each with the exit code that the command line gives.

The ops raise plain ``TypeError`` and ``ValueError`` (see ``checks``). Everything that touches a
file or runs a job raises one of these, so that one place maps them to an exit code and a sentence.
"""


class TailorError(Exception):
    """Base of the errors that end a job with one sentence and an exit code."""

    exit_code = 1


class UsageError(TailorError):
    """The request contradicts itself or cannot be carried out as asked (exit 2)."""

    exit_code = 2


class InputError(TailorError):
    """An input file is missing, malformed or does not fit the others (exit 65)."""

    exit_code = 65


class OutputError(TailorError):
    """The output cannot be made: it exists, is locked or may not be written (exit 73)."""

    exit_code = 73


class StorageError(TailorError):
    """Reading or writing failed half way: I/O error, disk full (exit 74)."""

    exit_code = 74


class PeerError(TailorError):
    """Another process of the same run failed, and says so itself; ends with its exit code."""

    def __init__(self, sentence: str, exit_code: int) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


class LostPeerError(TailorError):
    """Another process of the same run is gone without a word (exit 1)."""


class StoppedError(TailorError, KeyboardInterrupt):
    """Stopped on request; what is finished is kept, and the job can go on from it (exit 75).

    Also a ``KeyboardInterrupt``, as which it arrived.
    """

    exit_code = 75
