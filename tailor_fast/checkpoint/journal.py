"""The journal beside a staging directory: what is finished, so that a later run can go on from it.

One record a line: JSON, a tab, the XXH3 of the JSON. A process that is killed, or a power cut,
leaves at most a torn tail, which is cut off. A record only claims: whoever goes on from it hashes
the words on disk before it is believed.
"""

import json
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash

from tailor_fast.checkpoint.errors import AnyPath
from tailor_fast.checkpoint.files import (
    durable_error,
    open_input,
    output_error,
    read_exact,
    write_exact,
)

FORMAT = "tailor-journal/1"
ResumeMode = Literal["auto", "required", "never"]
_MOST_SHOWN = 3
_LONGEST_VALUE = 40


@dataclass(frozen=True)
class Resume:
    """Whether a run may go on from what a killed or stopped one left, and what must be the same.

    Attributes:
        mode: ``auto`` goes on where it can and starts over where something changed; ``required``
            refuses to start over; ``never`` starts over and keeps nothing that is half done.
        fingerprint: everything that decides the output's bytes, plain JSON.
    """

    mode: ResumeMode
    fingerprint: Mapping[str, Any]


@dataclass(frozen=True)
class Past:
    """What a journal says.

    Attributes:
        inode: of the directory whose files it speaks of.
        fingerprint: of the run that wrote it.
        records: of finished tensors, by name.
        size: bytes of it that are whole.
    """

    inode: int
    fingerprint: Mapping[str, Any]
    records: Mapping[str, Mapping[str, Any]]
    size: int


class Journal:
    """An open journal; records may come from several threads."""

    def __init__(self, path: Path, out: AnyPath, past: Past | None) -> None:
        """Make ``path``, or go on behind what ``past`` was read from; ``out`` is for messages.

        Raises:
            DiskFullError, OutputPlaceError, TransferError: the system failed to open or cut it.
        """
        self._out = out
        self._lock = threading.Lock()
        self._end = 0 if past is None else past.size
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._fd = os.open(path, flags, 0o666)
            os.ftruncate(self._fd, self._end)
        except OSError as error:
            raise output_error(error, out, "making the journal") from error

    def begin(self, inode: int, fingerprint: Mapping[str, Any]) -> None:
        """Write the first record."""
        self.add({"format": FORMAT, "inode": inode, "fingerprint": fingerprint})

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a record.

        Raises:
            DiskFullError, TransferError: the system failed to write.
        """
        text = json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        body = text.encode()
        line = b"%s\t%s\n" % (body, xxhash.xxh3_64_hexdigest(body).encode())
        with self._lock:
            write_exact(self._fd, memoryview(line), self._end, self._out)
            self._end += len(line)

    def sync(self) -> None:
        """Make what was appended durable.

        Raises:
            DiskFullError, TransferError: the system failed.
        """
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise durable_error(error, self._out, "making the journal durable") from error

    def close(self) -> None:
        """Close the file; safe to repeat."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


def read_journal(path: Path) -> Past | None:
    """Read a journal up to its first torn record; None where it is none of this version.

    Raises:
        MissingFileError, TransferError: it cannot be read.
    """
    fd = open_input(path)
    try:
        raw = bytearray(os.fstat(fd).st_size)
        read_exact(fd, memoryview(raw), 0, path)
    finally:
        os.close(fd)
    records: dict[str, Mapping[str, Any]] = {}
    head: Mapping[str, Any] | None = None
    size = 0
    for end, body in _whole(bytes(raw)):
        if head is not None:
            records[body["tensor"]] = body
        elif body.get("format") == FORMAT:
            head = body
        else:
            return None
        size = end
    if head is None:
        return None
    return Past(head["inode"], head["fingerprint"], records, size)


def _whole(raw: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records in front of the first torn one, each with where it ends."""
    begin = 0
    while (end := raw.find(b"\n", begin)) >= 0:
        body, _, digest = raw[begin:end].rpartition(b"\t")
        if xxhash.xxh3_64_hexdigest(body).encode() != digest:
            return
        yield end + 1, json.loads(body)
        begin = end + 1


def what_changed(before: object, now: object) -> str:
    """Say where two fingerprints differ: ``recipe.density was 0.1, is 0.2``."""
    found = [
        f"{where} was {_shown(old)}, is {_shown(new)}" for where, old, new in _differ(before, now)
    ]
    more = f" and {len(found) - _MOST_SHOWN} more" if len(found) > _MOST_SHOWN else ""
    return "; ".join(found[:_MOST_SHOWN]) + more


def _differ(before: object, now: object, where: str = "") -> Iterator[tuple[str, object, object]]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted({*before, *now}):
            path = f"{where}.{key}" if where else str(key)
            yield from _differ(before.get(key), now.get(key), path)
    elif before != now:
        yield where, before, now


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."
