"""What a hostile case is: a file or directory to write, and the error that must come of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.checkpoint.files import raw_file

Write = Callable[[Path], Path]


@dataclass(frozen=True)
class Case:
    """One hostile input.

    Attributes:
        name: of the test.
        write: makes the input in an empty folder and returns the path to open.
        error: name of the exact error class.
        says: pieces of the sentence, what was expected and what was found among them.
        tensor: the tensor that the error names.
        exit_code: what the command line ends with.
    """

    name: str
    write: Write
    error: str
    says: tuple[str, ...]
    tensor: str | None = None
    exit_code: int = 65


def single(
    name: str, blob: bytes | Callable[[], bytes], error: str, *says: str, tensor: str | None = None
) -> Case:
    """A lone file; a large one is made when it is needed."""

    def write(folder: Path) -> Path:
        path = folder / "model.safetensors"
        path.write_bytes(blob if isinstance(blob, bytes) else blob())
        return path

    return Case(name, write, error, says, tensor)


def header(
    name: str,
    text: bytes | str | Mapping[str, object],
    *says: str,
    data: bytes = b"12",
    tensor: str | None = None,
) -> Case:
    """A lone file whose header breaks a rule."""
    return single(name, raw_file(text, data), "MalformedError", *says, tensor=tensor)


def entry(
    name: str,
    *says: str,
    dtype: object = "U8",
    shape: object = (2,),
    offsets: object = (0, 2),
    data: bytes = b"12",
    spelled: str | None = None,
    error: str = "MalformedError",
) -> Case:
    """A lone file with tensor ``a``, whose entry breaks a rule; ``spelled``: the entry as text."""
    fields = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    text = f'{{"a":{json.dumps(fields) if spelled is None else spelled}}}'
    return single(name, raw_file(text, data), error, *says, tensor="a")
