"""Predictions in a file that grows batch by batch, so that a run goes on where it was stopped.

The first line says what the predictions are of: a digest of model, data and settings. Each further
line holds the place of a sample and what the model said. A line that was being written when the run
was stopped is cut off.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tailor_fast._core.closing import Closing
from tailor_fast._core.errors import InputError, OutputError, UsageError

FORMAT = "tailor-predictions/1"


def digest_of(facts: Mapping[str, Any]) -> str:
    """SHA-256 of plain values, whatever their order."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class PredictionFile(Closing):
    """Predictions of one model on one data file.

    Args:
        path: made, or gone on with.
        facts: model, data and settings; whatever makes other predictions.
        overwrite: begin anew where the file is of other facts.

    Attributes:
        said: prediction of each sample that is done, by its place.

    Raises:
        UsageError: the file is of other facts.
        InputError: it is no such file.
        OutputError: it cannot be written.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.path = path
        self.said: dict[int, str] = {}
        header = {"format": FORMAT, "digest": digest_of(facts), "facts": facts}
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise OutputError(f"{path}: another run is writing it; wait for it") from None
        except OSError as error:
            self.close()
            raise OutputError(
                f"{path}: cannot be locked: {error.strerror}; choose a place on a file system that"
                " can lock"
            ) from error
        try:
            if not self._go_on(header, overwrite):
                os.ftruncate(self._fd, 0)
                os.lseek(self._fd, 0, os.SEEK_SET)
                self._append([header])
        except BaseException:
            self.close()
            raise

    def add(self, said: Mapping[int, str]) -> None:
        """Add predictions by place; they are on disk when it returns.

        Raises:
            OutputError: they cannot be written.
        """
        self._append([{"sample": place, "prediction": text} for place, text in said.items()])
        self.said.update(said)

    def close(self) -> None:
        """Close the file; safe to repeat."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _go_on(self, header: Mapping[str, Any], overwrite: bool) -> bool:
        """Read what is there; whether it is a beginning of what is wanted."""
        content = self._read()
        whole = content.rfind(b"\n") + 1
        if not whole:
            if content and not json.dumps(header).encode().startswith(content[:10]):
                raise InputError(f"{self.path}: holds no predictions; choose another place")
            return False
        first, *lines = content[:whole].splitlines()
        found = self._parse(first, 1)
        if found.get("format") != FORMAT:
            raise InputError(
                f"{self.path}: format is {found.get('format')!r}; expected {FORMAT!r}; choose"
                " another place"
            )
        if found.get("digest") != header["digest"]:
            if overwrite:
                return False
            raise UsageError(
                f"{self.path}: holds predictions of {_difference(found, header)}; expected the"
                " same; choose another place or overwrite them (--overwrite, overwrite=True)"
            )
        for number, line in enumerate(lines, 2):
            entry = self._parse(line, number)
            if not isinstance(entry.get("sample"), int) or "prediction" not in entry:
                raise InputError(f"{self.path} line {number}: is no prediction")
            self.said[entry["sample"]] = str(entry["prediction"])
        os.ftruncate(self._fd, whole)
        os.lseek(self._fd, 0, os.SEEK_END)
        return True

    def _read(self) -> bytes:
        parts = []
        while part := os.read(self._fd, 1 << 20):
            parts.append(part)
        return b"".join(parts)

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            found = json.loads(line)
        except ValueError as error:
            raise InputError(f"{self.path} line {number}: is not JSON: {error}") from None
        if not isinstance(found, dict):
            raise InputError(f"{self.path} line {number}: is no JSON object")
        return found

    def _append(self, lines: list[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        try:
            while text:
                text = text[os.write(self._fd, text) :]
            os.fsync(self._fd)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror}") from error


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first fact that differs, in words."""
    before, after = found.get("facts") or {}, wanted["facts"]
    for name, value in after.items():
        if before.get(name) != value:
            return f"another {name.replace('_', ' ')} ({before.get(name)!r}, now {value!r})"
    return "something else"
