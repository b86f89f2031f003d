"""Reading a small file beside a model, which whoever made the model has named."""

import os
import stat
from pathlib import Path

_MOST = 64 << 20  # bytes; the largest tokenizers have half of it


def read_regular(path: Path, most: int = _MOST) -> bytes:
    """Return the bytes of a regular file, or of one that a link leads to.

    A pipe, a device or a socket is refused and cannot hang the caller.

    Raises:
        OSError: not there, not readable, no regular file, or more than ``most`` bytes.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    with open(fd, "rb") as file:  # noqa: PTH123  a descriptor, not a path
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("must be a regular file")
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(f"must have at most {most} bytes; got {status.st_size}")
    return content
