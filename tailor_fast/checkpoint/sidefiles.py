"""Which files beside the weights belong to a model: everything but weights, indexes and our own."""

import stat
from pathlib import Path

from tailor_fast.checkpoint.files import input_error, list_names
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

    Regular files at the top level, links to such included. Left out: weights of any format,
    indexes, hidden files (``.git*``), the model card and the files that this project writes.

    Raises:
        MissingFileError: a link among them leads nowhere.
        TransferError: the directory cannot be listed.
    """
    found = []
    for name in list_names(directory):
        if name.startswith((".", *_OURS)) or name.lower().endswith(_WEIGHTS):
            continue
        path = directory / name
        try:
            if stat.S_ISREG(path.stat().st_mode):
                found.append(path)
        except OSError as error:
            raise input_error(error, path) from error
    return tuple(found)
