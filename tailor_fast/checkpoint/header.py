"""The strict parser of one safetensors header.

A file is ``u64 little-endian N | N bytes of JSON | data``. Everything that the format's own library
refuses is refused, and beyond it what it lets pass: repeated names, extra or positional fields,
shapes that no memory could hold. Source of the rules: the format's README and its test suite.
"""

import math
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

from tailor_fast.checkpoint.dtypes import DTYPES, byte_size, item_bits
from tailor_fast.checkpoint.errors import (
    AnyPath,
    MalformedError,
    NotSafetensorsError,
    TruncatedError,
    UnsupportedDtypeError,
    quoted,
    shorten,
    shown_path,
)
from tailor_fast.checkpoint.strict_json import U64_MAX, JsonError, Scanner

PREFIX_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the format library's own limit
MAX_TENSORS = 1_000_000
MAX_RANK = 64
MAX_DIM = 2**48
MAX_NAME_BYTES = 1024
METADATA_KEY = "__metadata__"
_HUB_HEADER_BYTES = 25_000_000  # huggingface_hub refuses longer ones
_CONTROL = re.compile("[\x00-\x1f\x7f]")
_FIELDS = frozenset(("dtype", "shape", "data_offsets"))
_AGAIN = "the download or copy stopped early, fetch the file again"
_CONVERT = "convert it to safetensors first, with the tool that wrote it"
# An entry as nearly every writer spells it: twice as fast as field by field. Numbers above
# u64 pass here and fail against the size of the file.
_NUMBER = "(?:0|[1-9][0-9]{0,19})"
_COMMON_ENTRY = re.compile(
    r'\{"dtype":"([A-Z0-9_]+)","shape":\[((?:N(?:,N)*)?)\],"data_offsets":\[(N),(N)\]\}'.replace(
        "N", _NUMBER
    )
)
# first bytes -> what the file is, what to do
_FOREIGN = (
    (b"version https://git-lfs", "is a git-lfs pointer, not the weights", "run `git lfs pull`"),
    (b"<", "is a web page or XML, not the weights", "download the file itself"),
    (b"PK\x03\x04", "is a zip archive, probably a torch pickle, which may run code", _CONVERT),
    (b"\x80\x02", "is a Python pickle, which may run code when loaded", _CONVERT),
    (b"GGUF", "is a GGUF file", "give the safetensors checkpoint it was made from"),
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a header: ``begin`` and ``end`` are bytes from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A header that kept all rules.

    Attributes:
        entries: in the order of their bytes; together they cover the data without hole or overlap.
        metadata: the ``__metadata__`` block, empty when there is none.
        data_begin: offset of the data in the file.
        warnings: legal but suspicious facts, a sentence each.
    """

    entries: tuple[Entry, ...]
    metadata: dict[str, str]
    data_begin: int
    warnings: tuple[str, ...]


def header_length(prefix: bytes, file_size: int, path: AnyPath) -> int:
    """Return N of a file that starts with ``prefix`` (its first 64 bytes, or all it has).

    Raises:
        NotSafetensorsError: the first bytes are those of another format.
        TruncatedError: the file ends inside its header.
        MalformedError: N is zero or above 100,000,000.
    """
    length = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    fits = PREFIX_BYTES + length <= file_size
    if file_size >= PREFIX_BYTES and 0 < length <= MAX_HEADER_BYTES and fits:
        return length
    for magic, what, remedy in _FOREIGN:  # only now: a length may begin with any of these bytes
        if prefix.startswith(magic):
            raise NotSafetensorsError(what, path=path, remedy=remedy)
    if file_size < PREFIX_BYTES:
        problem = f"size is {file_size} bytes, a header alone needs more than {PREFIX_BYTES}"
        raise TruncatedError(problem, path=path, remedy=_AGAIN)
    if length == 0:
        problem = "header length must be above 0; the file starts with zeros, as if never written"
        raise MalformedError(problem, path=path, remedy="fetch the file again")
    if length > MAX_HEADER_BYTES:
        problem = f"header length must be at most {MAX_HEADER_BYTES} bytes; got {length}"
        raise MalformedError(problem, path=path, remedy="this is no safetensors file")
    problem = f"size is {file_size} bytes, the header alone needs {PREFIX_BYTES + length}"
    raise TruncatedError(problem, path=path, remedy=_AGAIN)


def parse_header(text: bytes | bytearray, data_bytes: int, path: AnyPath) -> Header:
    """Parse the N header bytes of a file that has ``data_bytes`` bytes after them.

    Args:
        text: the JSON, without the length in front of it.
        data_bytes: bytes of the file behind the header.
        path: the file, for the messages.

    Raises:
        MalformedError: a rule of the format, or one of ours, is broken.
        UnsupportedDtypeError: a dtype that the format does not have.
        TruncatedError: the data are shorter than the header says.
    """
    if text.count(b'"data_offsets"') > MAX_TENSORS:  # before a single object is built
        _malformed(f"a header may hold at most {MAX_TENSORS} tensors", path)
    try:
        scanner = Scanner(text.decode("utf-8", "strict"))
    except UnicodeDecodeError as error:
        _malformed(f"header must be UTF-8; got byte {error.object[error.start]:#x}", path)
    entries, metadata = _members(scanner, path)
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_tiling(entries, data_bytes, path)
    warnings = [f"{shown_path(path)}: {warning}" for warning in _warnings(text, entries)]
    return Header(tuple(entries), metadata, PREFIX_BYTES + len(text), tuple(warnings))


def _malformed(problem: str, path: AnyPath, tensor: str | None = None) -> NoReturn:
    raise MalformedError(problem, path=path, tensor=tensor)


def _members(scanner: Scanner, path: AnyPath) -> tuple[list[Entry], dict[str, str]]:
    entries: list[Entry] = []
    metadata: dict[str, str] = {}
    name: str | None = None
    try:
        for name in scanner.members():
            if name == METADATA_KEY:
                metadata = {key: scanner.string() for key in scanner.members()}
            elif len(entries) == MAX_TENSORS:
                _malformed(f"a header may hold at most {MAX_TENSORS} tensors", path)
            else:
                entries.append(_entry(scanner, name, path))
        name = None
        scanner.end()
    except JsonError as error:
        where = f"{METADATA_KEY}: " if name == METADATA_KEY else ""
        tensor = None if name == METADATA_KEY else name
        _malformed(f"{where}header is not what the format allows: {error}", path, tensor)
    return entries, metadata


def _entry(scanner: Scanner, name: str, path: AnyPath) -> Entry:
    if not name or _CONTROL.search(name) or len(name.encode()) > MAX_NAME_BYTES:
        problem = f"name must be 1 to {MAX_NAME_BYTES} bytes without control characters"
        _malformed(f"{problem}; got {len(name.encode())} bytes", path, name)
    dtype, shape, offsets = _fields(scanner)
    if dtype not in DTYPES:
        problem = f"dtype must be one of {', '.join(DTYPES)}; got {quoted(dtype)}"
        raise UnsupportedDtypeError(problem, path=path, tensor=name)
    if len(offsets) != 2:
        _malformed(f"data_offsets must be two numbers; got {len(offsets)}", path, name)
    _check_extent(name, dtype, shape, offsets, path)
    return Entry(name, dtype, shape, *offsets)


def _fields(scanner: Scanner) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    common = scanner.match(_COMMON_ENTRY)
    if common is not None:
        sizes = common[2].split(",") if common[2] else ()
        return common[1], tuple(map(int, sizes)), (int(common[3]), int(common[4]))
    dtype = ""
    shape: tuple[int, ...] = ()
    offsets: tuple[int, ...] = ()
    given = set[str]()
    for field in scanner.members():
        given.add(field)
        if field == "dtype":
            dtype = scanner.string()
        elif field == "shape":
            shape = scanner.whole_numbers()
        elif field == "data_offsets":
            offsets = scanner.whole_numbers()
        else:
            raise JsonError(f"unknown field {quoted(field)}")
    if given != _FIELDS:
        raise JsonError(f"missing field {', '.join(sorted(_FIELDS - given))}")
    return dtype, shape, offsets


def _check_extent(
    name: str, dtype: str, shape: tuple[int, ...], offsets: tuple[int, ...], path: AnyPath
) -> None:
    if len(shape) > MAX_RANK:
        _malformed(f"rank must be at most {MAX_RANK}; got {len(shape)}", path, name)
    what = f"{dtype} {shorten(str(list(shape)))}"
    # zero sizes are left out of the product, so that no order of the sizes hides an overflow
    bits = math.prod(size or 1 for size in shape) * item_bits(dtype)
    if max(shape, default=0) > MAX_DIM or bits > U64_MAX:
        problem = "sizes must be at most 2**48 and their product in bits below 2**64"
        _malformed(f"{problem}; got {what}", path, name)
    try:
        nbytes = byte_size(dtype, shape)
    except ValueError as error:
        _malformed(f"shape must fill whole bytes; {error}", path, name)
    begin, end = offsets
    if end - begin != nbytes:
        problem = f"data_offsets must span the {nbytes} bytes of {what}"
        _malformed(f"{problem}; got [{begin}, {end}]", path, name)


def _check_tiling(entries: list[Entry], data_bytes: int, path: AnyPath) -> None:
    needed = max((entry.end for entry in entries), default=0)
    if needed > data_bytes:
        problem = f"has {data_bytes} bytes of data, its header describes {needed}"
        raise TruncatedError(problem, path=path, remedy=_AGAIN)
    cursor = 0
    for entry in entries:
        if entry.begin != cursor:
            kind = "leave no hole" if entry.begin > cursor else "not overlap another tensor"
            problem = f"data_offsets must {kind}: expected {cursor}, got {entry.begin}"
            _malformed(problem, path, entry.name)
        cursor = entry.end
    if cursor < data_bytes:
        _malformed(f"{data_bytes - cursor} bytes follow the last tensor's data", path)


def folded(name: str) -> str:
    """``name`` as a file system that ignores case and Unicode composition sees it."""
    return unicodedata.normalize("NFC", name).casefold()


def _warnings(text: bytes | bytearray, entries: Iterable[Entry]) -> list[str]:
    warnings = []
    if len(text) > _HUB_HEADER_BYTES:
        warnings.append(f"header of {len(text)} bytes is longer than the Hugging Face hub reads")
    if text[:1] != b"{" or text.rstrip(b" ")[-1:] != b"}":
        warnings.append("header has white space before it, or other than spaces after it")
    first_of: dict[str, str] = {}
    for entry in entries:
        name = entry.name
        if "/" in name or "\\" in name or ".." in name:
            warnings.append(f"tensor {quoted(name)} is named like a path")
        first = first_of.setdefault(folded(name), name)
        if first != name:
            warnings.append(f"tensors {quoted(first)} and {quoted(name)} differ only in case")
    return warnings
