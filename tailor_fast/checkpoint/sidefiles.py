"""Which files beside the weights belong to a model: everything but weights, indexes and our own."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from tailor_fast.checkpoint.files import input_error, irregular, list_names, open_input
from tailor_fast.checkpoint.index import PICKLES, SUFFIX

CARD_NAME = "README.md"
REPORT_NAME = "tailor_report.json"
MANIFEST_NAME = "tailor_manifest.json"
_OURS = ("tailor_", CARD_NAME)  # every file this project writes beside a model
_WEIGHTS = (
    SUFFIX,
    *PICKLES,
    ".index.json",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".gguf",
    ".ggml",
    ".ot",
    ".tflite",
    ".npz",
    ".npy",
    ".part",
    ".tmp",
    ".lock",
)


def side_files(directory: Path) -> tuple[Path, ...]:
    """Return configuration, tokenizer, processor, template and code files, sorted by name.

    Regular files at the top level, and links to such wherever they lead: a snapshot in the hub's
    cache has nothing else. Left out: directories, weights of any format, indexes, hidden files
    (``.git*``), the model card and the files that this project writes.

    Raises:
        MissingFileError: a link among them leads nowhere, a file cannot be read, or is a pipe, a
            device or a socket.
        TransferError: the directory cannot be listed.
    """
    found = []
    for path in _beside(directory):
        try:
            is_directory = stat.S_ISDIR(path.stat().st_mode)
        except OSError as error:
            raise input_error(error, path) from error
        if not is_directory:
            os.close(open_input(path))
            found.append(path)
    return tuple(found)


def refuse_irregular(directory: Path) -> None:
    """Refuse a pipe, a device or a socket among the side files: opening one may never return.

    Raises:
        MissingFileError: there is one.
        TransferError: the directory cannot be listed.
    """
    for path in _beside(directory):
        try:
            mode = path.stat().st_mode
        except OSError:
            continue  # a file that is not there matters to who needs it
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise irregular(mode, path)


def _beside(directory: Path) -> Iterator[Path]:
    for name in list_names(directory):
        if not name.startswith((".", *_OURS)) and not name.lower().endswith(_WEIGHTS):
            yield directory / name
