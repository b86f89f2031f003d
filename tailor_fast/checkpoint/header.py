"""The strict parser of one safetensors header.

A file is ``u64 little-endian N | N bytes of JSON | data``. Everything that the format's own library
refuses is refused, and beyond it what it lets pass: repeated names, extra or positional fields,
shapes that no memory could hold. Source of the rules: the format's README and its test suite.

Whatever the 100 MB that a header may have hold, reading them takes about 200 MB and two seconds at
most: the limits on tensors, names and metadata, several times what the largest models have, see to
it. A reader of another kind of file, of one that has more to say, gives limits of its own.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

from tailor_fast.checkpoint.dtypes import DTYPES, byte_size, item_bits
from tailor_fast.checkpoint.errors import (
    AnyPath,
    MalformedError,
    TruncatedError,
    UnsupportedDtypeError,
    listed,
    quoted,
    shorten,
    shown_path,
)
from tailor_fast.checkpoint.foreign import refuse_foreign
from tailor_fast.checkpoint.strict_json import U64_MAX, JsonError, Scanner

PREFIX_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the format library's own limit
MAX_TENSORS = 150_000  # of a checkpoint, however many files it has
MAX_RANK = 64
MAX_DIM = 2**48
MAX_NAME_BYTES = 1024
MAX_NAMES_BYTES = 1 << 24  # of all names together
MAX_METADATA_BYTES = 1 << 24
MAX_METADATA_KEYS = 1 << 14
METADATA_KEY = "__metadata__"


@dataclass(frozen=True, slots=True)
class Limits:
    """What the headers of one input may hold: tensors, and bytes of metadata as written."""

    tensors: int
    metadata_bytes: int


CHECKPOINT_LIMITS = Limits(MAX_TENSORS, MAX_METADATA_BYTES)
_HUB_HEADER_BYTES = 25_000_000  # huggingface_hub refuses longer ones
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")  # some are commands to a terminal
_FIELDS = ("dtype", "shape", "data_offsets")
_AGAIN = "the download or copy stopped early, fetch the file again"
_REWRITE = "fetch the file again, or write it again with the safetensors library"
_SPLIT = "write the model as several files"
# An entry as nearly every writer spells it: some times as fast as field by field.
_NUMBER = b"(?:0|[1-9][0-9]{0,18})"  # below u64 in any case
_COMMON_ENTRY = re.compile(
    rb'\{"dtype": ?("([A-Z0-9_]{1,16})", ?"shape": ?\[((?:N(?:, ?N){0,63})?)\]), ?'
    rb'"data_offsets": ?\[(N), ?(N)\]\}'.replace(b"N", _NUMBER)
)
_PADDING = re.compile(rb"\} *+\Z")
_Form = tuple[str, tuple[int, ...], int]  # dtype, shape, bytes: tensors of a model share a few
_MOST_FORMS = 1024  # that are remembered
_MOST_UNUSUAL = 50_000  # entries that must be read field by field


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
    is_length = file_size >= PREFIX_BYTES and 0 < length <= MAX_HEADER_BYTES
    plausible = is_length and fits
    if plausible and prefix[PREFIX_BYTES : PREFIX_BYTES + 1] in b"{ \t\r\n":
        return length
    # A length of 60 begins like a web page and one of 640 like a pickle: those are then not looked
    # for, and what remains takes three bytes.
    refuse_foreign(prefix, path, fewest=3 if is_length else 1)
    if plausible:
        return length
    if file_size < PREFIX_BYTES:
        problem = f"size is {file_size} bytes, a header alone needs more than {PREFIX_BYTES}"
        raise TruncatedError(problem, path=path, remedy=_AGAIN)
    if length == 0:
        problem = "header length must be above 0; the file starts with zeros, as if never written"
        raise MalformedError(problem, path=path, remedy=_REWRITE)
    if length > MAX_HEADER_BYTES:
        problem = f"header length must be at most {MAX_HEADER_BYTES} bytes; got {length}"
        remedy = "this is no safetensors file; give one"
        raise MalformedError(problem, path=path, remedy=remedy)
    problem = f"size is {file_size} bytes, the header alone needs {PREFIX_BYTES + length}"
    raise TruncatedError(problem, path=path, remedy=_AGAIN)


def parse_header(
    text: bytes | bytearray, data_bytes: int, path: AnyPath, limits: Limits = CHECKPOINT_LIMITS
) -> Header:
    """Parse the N header bytes of a file that has ``data_bytes`` bytes after them.

    Args:
        text: the JSON, without the length in front of it.
        data_bytes: bytes of the file behind the header.
        path: the file, for the messages.
        limits: what it may hold.

    Raises:
        MalformedError: a rule of the format, or one of ours, is broken.
        UnsupportedDtypeError: a dtype that the format does not have.
        TruncatedError: the data are shorter than the header says.
    """
    entries, metadata = _members(Scanner(text), path, limits)
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_tiling(entries, data_bytes, path)
    warnings = [f"{shown_path(path)}: {warning}" for warning in _warnings(text, entries)]
    return Header(tuple(entries), metadata, PREFIX_BYTES + len(text), tuple(warnings))


def _malformed(
    problem: str, path: AnyPath, tensor: str | None = None, remedy: str = _REWRITE
) -> NoReturn:
    raise MalformedError(problem, path=path, tensor=tensor, remedy=remedy)


def _members(scanner: Scanner, path: AnyPath, limits: Limits) -> tuple[list[Entry], dict[str, str]]:
    entries: list[Entry] = []
    metadata: dict[str, str] = {}
    seen = _Seen({})
    room = MAX_NAMES_BYTES
    within: str | None = None  # the member that is being read
    try:
        for name in scanner.members():
            within = name
            if name == METADATA_KEY:
                metadata = _metadata(scanner, limits.metadata_bytes)
                within = None
                continue
            if len(entries) == limits.tensors:
                problem = f"must have at most {limits.tensors} tensors; got more"
                _malformed(problem, path, remedy="leave out what is not a weight")
            nbytes = len(name) if name.isascii() else len(name.encode())
            if not 0 < nbytes <= MAX_NAME_BYTES or _CONTROL.search(name):
                problem = f"name must be 1 to {MAX_NAME_BYTES} bytes without control characters"
                _malformed(f"{problem}; got {nbytes} bytes", path, name)
            room -= nbytes
            if room < 0:
                problem = f"names must have at most {MAX_NAMES_BYTES} bytes together; got more"
                _malformed(problem, path, name, _SPLIT)
            entries.append(_entry(scanner, name, seen, path))
            within = None
        scanner.end()
    except JsonError as error:
        where = f"{METADATA_KEY}: " if within == METADATA_KEY else ""
        tensor = None if within == METADATA_KEY else within
        _malformed(f"{where}header must be what the format allows: {error}", path, tensor)
    return entries, metadata


def _metadata(scanner: Scanner, most: int) -> dict[str, str]:
    metadata: dict[str, str] = {}
    begin = scanner.at
    for key in scanner.members():
        metadata[key] = scanner.string(most)
        if len(metadata) > MAX_METADATA_KEYS or scanner.at - begin > most:
            limits = f"{MAX_METADATA_KEYS} keys and {most} bytes"
            raise JsonError(f"expected at most {limits}, found more at byte {scanner.at}")
    return metadata


@dataclass(slots=True)
class _Seen:
    """What earlier entries of a header leave to the later ones."""

    forms: dict[bytes, _Form]
    unusual: int = 0


def _entry(scanner: Scanner, name: str, seen: _Seen, path: AnyPath) -> Entry:
    common = scanner.match(_COMMON_ENTRY)
    if common is None:
        seen.unusual += 1
        if seen.unusual > _MOST_UNUSUAL:
            expected = f"expected at most {_MOST_UNUSUAL} entries of unusual spelling"
            raise JsonError(f"{expected}, found more at byte {scanner.at}")
        dtype, shape, offsets = _fields(scanner)
        nbytes = _checked_bytes(name, dtype, shape, path)
    else:
        form = seen.forms.get(common[1])
        if form is None:
            dtype = common[2].decode()
            shape = tuple(map(int, common[3].split(b","))) if common[3] else ()
            form = dtype, shape, _checked_bytes(name, dtype, shape, path)
            if len(seen.forms) < _MOST_FORMS:
                seen.forms[common[1]] = form
        dtype, shape, nbytes = form
        offsets = int(common[4]), int(common[5])
    if len(offsets) != 2:
        _malformed(f"data_offsets must be two numbers; got {len(offsets)}", path, name)
    begin, end = offsets
    if end - begin != nbytes:
        problem = f"data_offsets must span the {nbytes} bytes of {_shown(dtype, shape)}"
        _malformed(f"{problem}; got [{begin}, {end}]", path, name)
    return Entry(name, dtype, shape, begin, end)


def _fields(scanner: Scanner) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
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
            raise JsonError(f"expected {', '.join(_FIELDS)} only, found field {quoted(field)}")
    absent = [field for field in _FIELDS if field not in given]
    if absent:
        raise JsonError(f"expected {', '.join(_FIELDS)}, found no {', '.join(absent)}")
    return dtype, shape, offsets


def _shown(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} {shorten(str(list(shape)))}"


def _checked_bytes(name: str, dtype: str, shape: tuple[int, ...], path: AnyPath) -> int:
    if dtype not in DTYPES:
        problem = f"dtype must be one of {', '.join(DTYPES)}; got {quoted(dtype)}"
        remedy = "write the tensor again in one of these"
        raise UnsupportedDtypeError(problem, path=path, tensor=name, remedy=remedy)
    if len(shape) > MAX_RANK:
        _malformed(f"rank must be at most {MAX_RANK}; got {len(shape)}", path, name)
    # zero sizes are left out of the product, so that no order of the sizes hides an overflow
    bits = math.prod(size or 1 for size in shape) * item_bits(dtype)
    if max(shape, default=0) > MAX_DIM or bits > U64_MAX:
        problem = "sizes must be at most 2**48 and their product in bits below 2**64"
        _malformed(f"{problem}; got {_shown(dtype, shape)}", path, name)
    try:
        return byte_size(dtype, shape)
    except ValueError as error:
        _malformed(f"shape must fill whole bytes; got {error}", path, name)


def _check_tiling(entries: list[Entry], data_bytes: int, path: AnyPath) -> None:
    needed = max((entry.end for entry in entries), default=0)
    if needed > data_bytes:
        problem = (
            f"must have the {needed} bytes of data that its header describes; got {data_bytes}"
        )
        raise TruncatedError(problem, path=path, remedy=_AGAIN)
    cursor = 0
    for entry in entries:
        if entry.begin != cursor:
            kind = "leave no hole" if entry.begin > cursor else "not overlap another tensor"
            problem = f"data_offsets must {kind}: expected {cursor}; got {entry.begin}"
            _malformed(problem, path, entry.name)
        cursor = entry.end
    if cursor < data_bytes:
        problem = f"must end with the last tensor's data, {cursor} bytes"
        _malformed(f"{problem}; got {data_bytes - cursor} bytes after them", path)


def folded(name: str) -> str:
    """``name`` as a file system that ignores case and Unicode composition sees it."""
    return unicodedata.normalize("NFC", name).casefold()


def _warnings(text: bytes | bytearray, entries: Iterable[Entry]) -> list[str]:
    warnings = []
    if len(text) > _HUB_HEADER_BYTES:
        warnings.append(f"header of {len(text)} bytes is longer than the Hugging Face hub reads")
    if text[:1] != b"{" or _PADDING.match(text, text.rfind(b"}")) is None:
        warnings.append("header has white space before it, or other than spaces after it")
    names = {entry.name for entry in entries}
    paths = [name for name in names if "/" in name or "\\" in name or ".." in name]
    if paths:
        warnings.append(f"{len(paths)} tensors are named like paths: {listed(sorted(paths))}")
    # Of two names that differ only in case, one at least is not in folded form.
    forms = [(name, form) for name in names if (form := folded(name)) != name]
    counts = Counter(form for _, form in forms)
    alike = {name for name, form in forms if form in names or counts[form] > 1}
    alike |= {form for name, form in forms if name in alike and form in names}
    if alike:
        warnings.append(f"names of tensors differ only in case: {listed(sorted(alike))}")
    return warnings
