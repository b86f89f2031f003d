"""Writing a patch file in one pass: the data first, the header when it is known what it must say.

The file grows in a locked staging directory beside OUT and gets its name in one step when it is
complete and durable; leaving the ``with`` block without ``commit`` removes it.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from tailor_fast._core.closing import Closing
from tailor_fast.checkpoint.errors import AnyPath
from tailor_fast.checkpoint.files import byte_view, output_error, write_exact
from tailor_fast.checkpoint.staging import Staging
from tailor_fast.checkpoint.syscalls import finish_writeback, start_writeback

_FILE_NAME = "patch.safetensors"  # in the staging directory
_WINDOW = 64 << 20  # at most two of them wait in memory for the disk


class GrowingFile(Closing):
    """One output file that is written at any offset and cut at its end.

    Attributes:
        out: absolute path of the output.
    """

    def __init__(self, out: AnyPath, *, overwrite: bool, inputs: Iterable[AnyPath]) -> None:
        """Check the place, lock it and make the file; errors as for ``StagedFile``."""
        self._staging = Staging(out, directory=False, overwrite=overwrite, inputs=inputs)
        self.out = self._staging.out
        self._fd = -1
        self._started = self._synced = 0
        try:
            self._fd = self._staging.create(_FILE_NAME)
        except BaseException:
            self.close()
            raise

    @property
    def scratch(self) -> Path:
        """A directory on the same disk that goes when the file is committed or given up."""
        return self._staging.path

    def write(self, offset: int, buffer: object) -> None:
        """Write bytes at ``offset``.

        Args:
            offset: in the file.
            buffer: contiguous CPU tensor of any dtype, bytes, bytearray or memoryview.

        Raises:
            DiskFullError: disk, quota or file-size limit reached.
            TransferError: the system reports an error; the message has file and offset.
        """
        write_exact(self._fd, byte_view(buffer, writable=False), offset, self.out)

    def write_behind(self, end: int) -> None:
        """Let the disk begin with what was written before ``end`` and will not change."""
        if end - self._started < _WINDOW:
            return
        try:
            if self._synced < self._started:  # a length of 0 would mean the whole file
                finish_writeback(self._fd, self._synced, self._started - self._synced)
            start_writeback(self._fd, self._started, end - self._started)
        except OSError as error:
            raise output_error(error, self.out, f"writing at byte {self._synced}") from error
        self._synced, self._started = self._started, end

    def commit(self, size: int) -> None:
        """Cut the file at ``size``, make it durable and give it its name.

        Raises:
            OutputExistsError: OUT has come into being meanwhile.
            DiskFullError, OutputPlaceError, TransferError: the system failed to write or rename.
        """
        try:
            os.ftruncate(self._fd, size)
            os.fsync(self._fd)
        except OSError as error:
            raise output_error(error, self.out, "making the file durable") from error
        self._close()
        self._staging.publish(_FILE_NAME)

    def close(self) -> None:
        """Close the file and, unless it was committed, remove it; safe to repeat."""
        self._close()
        self._staging.discard()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
