"""Directories: indexes that lie, names that lead outside, shards that are no files."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

from tests.checkpoint.files import U8_PAIR, raw_file, write_index
from tests.checkpoint.hostile.cases import Case

BAD, MISSING, FOREIGN = "MalformedError", "MissingFileError", "NotSafetensorsError"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
MAP = {"a": ONE, "b": TWO}
BARE = "a file name must be bare and end in .safetensors"


def _good(folder: Path) -> Path:
    for shard, name in ((ONE, "a"), (TWO, "b")):
        (folder / shard).write_bytes(raw_file({name: U8_PAIR}, b"12"))
    write_index(folder, MAP)
    return folder


def index(name: str, text: bytes | str | Callable[[], bytes], error: str, *says: str) -> Case:
    """A good directory but for its index."""

    def write(folder: Path) -> Path:
        body = text() if callable(text) else text
        (_good(folder) / INDEX).write_bytes(body.encode() if isinstance(body, str) else body)
        return folder

    return Case(name, write, error, says)


def mapped(
    name: str, weight_map: object, error: str, *says: str, tensor: str | None = None
) -> Case:
    """A good directory but for the index's map."""

    def write(folder: Path) -> Path:
        write_index(_good(folder), weight_map)
        return folder

    return Case(name, write, error, says, tensor)


def changed(
    name: str, change: Callable[[Path], object], error: str, *says: str, tensor: str | None = None
) -> Case:
    """A good directory but for its second shard, which ``change`` puts in its place."""

    def write(folder: Path) -> Path:
        (_good(folder) / TWO).unlink()
        change(folder / TWO)
        return folder

    return Case(name, write, error, says, tensor)


def lone(name: str, make: Callable[[Path], object], error: str, *says: str) -> Case:
    """A path that is given itself, made by ``make``."""

    def write(folder: Path) -> Path:
        make(folder / "model.safetensors")
        return folder / "model.safetensors"

    return Case(name, write, error, says)


def outside(value: str) -> Case:
    """A name that would lead to an existing good file outside the directory."""

    def write(folder: Path) -> Path:
        inside = folder / "inside"
        inside.mkdir()
        (folder / "secret.safetensors").write_bytes(raw_file({"a": U8_PAIR}, b"12"))
        write_index(_good(inside), MAP | {"a": value.format(folder=folder)})
        return inside

    return Case(f"shard {value!r}", write, BAD, (BARE, "got '"))


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(os.path.relpath(path))  # a socket's path is short


def _shard(**tensors: bytes) -> Callable[[Path], object]:
    begin, fields = 0, {}
    for name, data in tensors.items():
        end = begin + len(data)
        fields[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [begin, end]}
        begin = end
    return lambda path: path.write_bytes(raw_file(fields, b"".join(tensors.values())))


def _linked(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def _hard(path: Path) -> None:
    path.hardlink_to(path.with_name(ONE))


def _both(folder: Path) -> Path:
    (_good(folder) / "model.safetensors").write_bytes(raw_file({"a": U8_PAIR}, b"12"))
    return folder


def _nothing(folder: Path) -> Path:
    return folder


def _pickles(folder: Path) -> Path:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\0.")
    return folder


def _odd_name(folder: Path) -> Path:
    path = folder / "x\udcff\n.safetensors"  # bytes that are no text
    path.write_bytes(b"")
    return path


def _many_shards(folder: Path) -> Path:
    names = [f"{i}.safetensors" for i in range(300)]
    for name in names:
        fields = {name: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}
        (folder / name).write_bytes(raw_file(fields))
    write_index(folder, {name: name for name in names})
    return folder


def _long_map(count: int) -> Callable[[], bytes]:
    return lambda: json.dumps({"weight_map": {str(i): ONE for i in range(count)}}).encode()


REGULAR = "must be a regular file"
CASES = [
    index("index is empty", "", BAD, "expected '{' at byte 0", "found the end"),
    index("index is a list", "[]", BAD, "expected '{'", "found '[]'"),
    index("index is a web page", "<html>", BAD, "expected '{'", "found '<html>'"),
    index("index is a git-lfs pointer", "version https://git-lfs", BAD, "expected '{'", "'version"),
    index("index is zeros", bytes(64), BAD, "expected '{'", "found '\\x00"),
    index("index with a byte order mark", b"\xef\xbb\xbf{}", BAD, "expected '{'", "'\\ufeff{}'"),
    index("index not UTF-8", b'{"\xff":1}', BAD, "expected UTF-8", "got byte 0xff at byte 2"),
    index("index without a map", '{"metadata":{}}', BAD, "expected a weight_map", "found none"),
    index("map is a list", '{"weight_map":[]}', BAD, "expected '{'", "found '[]"),
    index("map is null", '{"weight_map":null}', BAD, "expected '{'", "found 'null"),
    index("map twice", '{"weight_map":{},"weight_map":{}}', BAD, "every name once", "again"),
    index("index cut", '{"weight_map":{"a":"x.safete', BAD, "a string that ends", "found"),
    index("index with NaN", '{"x":NaN,"weight_map":{}}', BAD, "expected a value", "'NaN,"),
    index("index with a trailing comma", '{"weight_map":{"a":"b",}}', BAD, "a string", "found '}}"),
    index("index nested deep", '{"x":' + "[" * 100_000, BAD, "at most 64 levels", "found '[["),
    index("index nested in metadata", '{"metadata":{"x":' + "[" * 999, BAD, "64 levels", "found"),
    index(
        "60 MB of empty lists beside the map",
        lambda: b'{"x":[' + b"[]," * 20_000_000 + b"[]]}",
        *(BAD, "at most 65536 values that have no meaning here", "found '[]"),
    ),
    index(
        "60 MB of metadata in the index",
        lambda: b'{"metadata":{"x":"' + b"x" * 60_000_000 + b'"}}',
        *(BAD, "string of at most 8192 bytes", "found 60000000"),
    ),
    index("65 MiB of index", lambda: b"{" + b" " * (65 << 20), BAD, "at most 67108864", "got 681"),
    index("150,001 tensors in the map", _long_map(150_001), BAD, "at most 150000", "found more"),
    *(
        mapped(f"shard {value!r}", {"a": value}, BAD, "expected a string", "found")
        for value in (1, None, True, [ONE], {})
    ),
    *(
        outside(value)
        for value in (
            *("../secret.safetensors", "./../secret.safetensors", "x/../../secret.safetensors"),
            *("{folder}/secret.safetensors", "..\\secret.safetensors", "\\secret.safetensors"),
            *("\\\\host\\x.safetensors", "C:secret.safetensors", "C:\\secret.safetensors"),
            *("file:secret.safetensors", "./a.safetensors", "a//b.safetensors", "a\0.safetensors"),
            *(
                "a\n.safetensors",
                "",
                ".",
                "..",
                "x",
                ".safetensors",
                "x.safetensors/",
                "a?.safetensors",
            ),
            *(
                "x.SAFETENSORS",
                "x.safetensors ",
                "x.safetensors.",
                "x.safetensors\0",
                "*.safetensors",
            ),
        )
    ),
    mapped(
        "shard is a pickle",
        {"a": "x.bin"},
        FOREIGN,
        "must name safetensors files",
        "got the pickle 'x.bin'",
    ),
    mapped(
        "shards alike but for case",
        MAP | {"b": ONE.upper()[:-12] + ".safetensors"},
        BAD,
        "must differ",
        "differ only in case",
    ),
    mapped(
        "shards alike but for composition",
        {"a": "\u00e9.safetensors", "b": "e\u0301.safetensors"},
        BAD,
        "must differ",
        "differ only in case",
    ),
    mapped(
        "shard of 300 characters",
        {"a": "x" * 300 + ".safetensors"},
        MISSING,
        "names 1 files",
        "1 are missing",
    ),
    mapped(
        "shard that is not there",
        MAP | {"c": "x.safetensors"},
        MISSING,
        "names 3 files",
        "1 are missing: 'x.safetensors'",
    ),
    mapped(
        "tensor that no shard has",
        MAP | {"c": ONE},
        BAD,
        "must hold what the index names",
        "1 are in no file: 'c'",
    ),
    mapped(
        "tensors swapped",
        {"a": TWO, "b": ONE},
        BAD,
        f"must be in '{TWO}'",
        f"it is in '{ONE}'",
        tensor="a",
    ),
    mapped(
        "tensor that the index lacks",
        {"a": ONE, "x": TWO},
        BAD,
        "must hold what the index names",
        "'x'",
    ),
    changed(
        "one tensor more than the index",
        _shard(b=b"12", c=b"3"),
        BAD,
        "only what the index names",
        "got 1 more: 'c'",
    ),
    changed(
        "tensor in two shards, equal",
        _shard(a=b"12", b=b"34"),
        BAD,
        "in one file only",
        f"it is in '{ONE}' too",
        tensor="a",
    ),
    changed(
        "tensor in two shards, different",
        _shard(a=b"345", b=b"6"),
        BAD,
        "in one file only",
        f"it is in '{ONE}' too",
        tensor="a",
    ),
    changed("shard is a directory", Path.mkdir, MISSING, REGULAR, "it is a directory"),
    changed("shard is a pipe", os.mkfifo, MISSING, REGULAR, "it is a pipe"),
    changed("shard is a socket", _socket, MISSING, "not a regular file", "is a socket"),
    changed(
        "shard is /dev/zero", _linked("/dev/zero"), MISSING, REGULAR, "it is a character device"
    ),
    changed(
        "shard is /dev/stdin", _linked("/dev/full"), MISSING, REGULAR, "it is a character device"
    ),
    changed("shard is a link to itself", _linked(TWO), MISSING, "symbolic link", "in a circle"),
    changed(
        "shard is a link to nothing",
        _linked("nothing"),
        MISSING,
        "does not exist",
        "check the path",
    ),
    changed(
        "shard is a link to /etc/passwd",
        _linked("/etc/passwd"),
        FOREIGN,
        "expected a safetensors file",
        "is a text",
    ),
    changed(
        "shard is a link into /proc",
        _linked("/proc/self/status"),
        "TruncatedError",
        "needs more than 8",
        "size is 0 bytes",
    ),
    changed(
        "shard is a link to its sibling", _linked(ONE), BAD, "in one file only", "too", tensor="a"
    ),
    changed(
        "shard is another name of its sibling", _hard, BAD, "in one file only", "too", tensor="a"
    ),
    changed(
        "shard is a git-lfs pointer",
        lambda path: path.write_bytes(b"version https://git-lfs"),
        FOREIGN,
        "git-lfs pointer",
        "expected a",
    ),
    changed("shard is empty", Path.touch, "TruncatedError", "needs more than 8", "size is 0 bytes"),
    lone("a pipe", os.mkfifo, MISSING, REGULAR, "it is a pipe"),
    lone("a device", _linked("/dev/zero"), MISSING, REGULAR, "it is a character device"),
    lone("a socket", _socket, MISSING, "not a regular file", "is a socket"),
    lone(
        "an empty directory", Path.mkdir, MISSING, "must hold model.safetensors", "it holds neither"
    ),
    lone("nothing", lambda path: None, MISSING, "does not exist", "check the path"),
    Case("both sources", _both, BAD, ("must hold one of", "it holds both")),
    Case("no source", _nothing, MISSING, ("must hold model.safetensors", "it holds neither")),
    Case("pickles only", _pickles, FOREIGN, ("holds only pickles", "'pytorch_model.bin'")),
    Case(
        "file name that is no text",
        _odd_name,
        "TruncatedError",
        ("size is 0 bytes", "x\\\\xff\\n.safe"),
    ),
    Case(
        "more shards than a process may open",
        _many_shards,
        "TransferError",
        ("too many open files", "ulimit -n"),
        exit_code=74,
    ),
]
