"""Files that look hostile and are legal: they must be opened, as cheaply as the others refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.checkpoint.files import U8_PAIR, raw_file, write_index

_HUNDRED_GB = 10**11


@dataclass(frozen=True)
class Legal:
    """A file or directory that is opened.

    Attributes:
        name: of the test.
        write: makes it in an empty folder and returns the path to open.
        tensors: how many it has.
        warns: a piece of the one warning, empty for none.
    """

    name: str
    write: Callable[[Path], Path]
    tensors: int
    warns: str = ""


def legal(name: str, blob: Callable[[], bytes], tensors: int, warns: str = "") -> Legal:
    """A lone file."""

    def write(folder: Path) -> Path:
        path = folder / "model.safetensors"
        path.write_bytes(blob())
        return path

    return Legal(name, write, tensors, warns)


def _most() -> bytes:
    """As many tensors as a checkpoint may have, in a header of 24 MB."""
    entries = (
        f'"model.layers.{i:028}.mlp.experts.{i:028}.down_proj.weight":'
        f'{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}'
        for i in range(150_000)
    )
    return raw_file(f"{{{','.join(entries)}}}", bytes(150_000))


def _sparse(folder: Path) -> Path:
    path = folder / "model.safetensors"
    fields = {"dtype": "U8", "shape": [_HUNDRED_GB], "data_offsets": [0, _HUNDRED_GB]}
    blob = raw_file({"a": fields, "b": U8_PAIR | {"data_offsets": [10**11, 10**11 + 2]}})
    with path.open("wb") as file:
        file.write(blob)
        file.truncate(len(blob) + _HUNDRED_GB + 2)
    return path


def _linked(folder: Path) -> Path:
    """Links that leave the directory, as in the cache of a model hub."""
    snapshot, blobs = folder / "snapshot", folder / "blobs"
    snapshot.mkdir()
    blobs.mkdir()
    (blobs / "4d7a21").write_bytes(raw_file({"a": U8_PAIR}, b"12"))
    (snapshot / "x.safetensors").symlink_to("../blobs/4d7a21")
    write_index(snapshot, {"a": "x.safetensors"})
    return snapshot


def _pair(one: str, two: str) -> Callable[[], bytes]:
    return lambda: raw_file({one: U8_PAIR, two: U8_PAIR | {"data_offsets": [2, 4]}}, b"1234")


def _shaped(shape: list[int], nbytes: int) -> Callable[[], bytes]:
    fields = {"dtype": "U8", "shape": shape, "data_offsets": [0, nbytes]}
    return lambda: raw_file({"a": fields}, bytes(nbytes))


LEGAL = [
    legal("24 MB of header", _most, 150_000),
    legal("16 MB of metadata", lambda: raw_file({"__metadata__": {"a": "x" * 16_000_000}}), 0),
    legal("95 MB of padding", lambda: raw_file(b"{}" + b" " * 95_000_000), 0, "hub reads"),
    legal("leading space", lambda: raw_file(" " + json.dumps({"a": U8_PAIR}), b"12"), 1, "before"),
    legal("trailing tab", lambda: raw_file(json.dumps({"a": U8_PAIR}) + "\t", b"12"), 1, "after"),
    legal("names alike but for case", _pair("a.W", "a.w"), 2, "only in case: 'a.W', 'a.w'"),
    legal("names alike but for composition", _pair("\u00e9", "e\u0301"), 2, "only in case"),
    legal("name like a path", _pair("../../etc/passwd", "b"), 2, "named like paths: '../../etc"),
    legal("name like a link", _pair("https://x/y", "b"), 2, "named like paths"),
    legal("name of 1024 bytes", _pair("\u00e9" * 512, "b"), 2),
    legal("name beyond the basic plane", _pair("\U0001f600", "b"), 2),
    legal("64 dimensions", _shaped([1] * 64, 1), 1),
    legal("64 dimensions of 0", _shaped([0] * 64, 0), 1),
    legal("2**48 beside 0", _shaped([2**48, 0], 0), 1),
    legal("a length that looks like a web page", lambda: raw_file(b"{}".ljust(0x3C)), 0),
    legal("a length that looks like a pickle", lambda: raw_file(b"{}".ljust(0x280)), 0),
    legal("a length that looks like gzip", lambda: raw_file(b"{}".ljust(0x088B1F)), 0),
    Legal("100 GB that are there", _sparse, 2),
    Legal("links out of the directory", _linked, 1),
]
