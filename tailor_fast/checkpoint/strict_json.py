"""A JSON reader that accepts the little that a header or an index may hold.

Python's ``json`` accepts NaN, repeated keys, lone surrogates and ``-0``, and builds whatever a
hostile file describes before anyone can look at it. This scanner is driven by what is expected
next and works on the bytes as they were read, so that memory grows only with what is kept: text
as Python strings takes up to four times its bytes. Strings with escapes go to ``json``.
"""

import json
import re
from collections.abc import Iterator
from typing import NoReturn

from tailor_fast.checkpoint.errors import quoted

U64_MAX = 2**64 - 1
STRING_BYTES = 1 << 13  # names of tensors and files, escaped six for one
_MOST_SKIPPED = 1 << 16  # values that nobody asked for
_MOST_NESTED = 64
_LONGEST_ARRAY = 1 << 16  # bytes; 64 numbers of 20 digits are 1,300
_INDENT = b" \t\r\n"
_SPACE = re.compile(rb"[ \t\r\n]*+")
_PLAIN = re.compile(rb'"([^"\\\x00-\x1f]*+)"')  # no escape, which nearly every string is
# Possessive: an ordinary repetition would remember every one of a hundred million escapes.
_STRING = re.compile(rb'"((?:[^"\\\x00-\x1f]++|\\[^\x00-\x1f])*+)"')
_COLON = re.compile(rb"[ \t\r\n]*+:[ \t\r\n]*+")
_KEY = re.compile(rb'[ \t\r\n]*+"([\x20\x21\x23-\x5b\x5d-\x7f]*+)"[ \t\r\n]*+:[ \t\r\n]*+')
_NEXT = re.compile(rb"[ \t\r\n]*+([,}])")
_SHORT_LIST = re.compile(rb"\[((?:(?:0|[1-9][0-9]{0,18})(?:, ?(?!\])|(?=\]))){0,64})\]")
_SCALAR = re.compile(
    rb"(?:true|false|null|-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?)"
)
_WHOLE = re.compile(rb"0|[1-9][0-9]{0,19}")
_SURROGATE = re.compile("[\ud800-\udfff]")


class JsonError(ValueError):
    """The text is not the JSON that was expected at this place."""


class Scanner:
    """A cursor over ``text`` that takes one expected thing after the other.

    Every method raises ``JsonError`` when the text holds something else.
    """

    def __init__(self, text: bytes | bytearray) -> None:
        """Start at the first byte."""
        self.text = text
        self.at = 0
        self._skipped = 0

    def peek(self) -> str:
        """Skip white space and return the next byte as a character, empty at the end."""
        text = self.text
        if self.at < len(text) and text[self.at] > 0x20:  # as nearly always
            return chr(text[self.at])
        match = _SPACE.match(text, self.at)
        self.at = self.at if match is None else match.end()
        return chr(text[self.at]) if self.at < len(text) else ""

    def take(self, expected: str) -> None:
        """Take the one character ``expected``."""
        if self.peek() != expected:
            self.fail(f"expected {quoted(expected)}")
        self.at += 1

    def match(self, pattern: re.Pattern[bytes]) -> re.Match[bytes] | None:
        """Take what ``pattern`` matches here, or nothing."""
        found = pattern.match(self.text, self.at)
        if found is not None:
            self.at = found.end()
        return found

    def end(self) -> None:
        """Take white space up to the end of the text."""
        if self.peek():
            self.fail("expected nothing more")

    def fail(self, problem: str) -> NoReturn:
        """Raise ``JsonError`` with the place and what is there."""
        found = "the end"
        if self.peek():
            excerpt = self.text[self.at : self.at + 20].decode("utf-8", "backslashreplace")
            found = quoted(excerpt)
        raise JsonError(f"{problem} at byte {self.at}, found {found}")

    def string(self, most: int = STRING_BYTES) -> str:
        """Take a string of at most ``most`` bytes between its quotes, escapes as written."""
        if self.peek() != '"':
            self.fail("expected a string")
        start = self.at + 1
        plain = _PLAIN.match(self.text, self.at)
        found = plain or _STRING.match(self.text, self.at)
        if found is None:
            self.fail("expected a string that ends and has no control character")
        self.at = found.end()
        if self.at - start > most + 1:
            problem = f"expected a string of at most {most} bytes at byte {start - 1}"
            raise JsonError(f"{problem}, found {self.at - start - 1}")
        try:
            value = found[1].decode("utf-8", "strict")
        except UnicodeDecodeError as error:
            got, place = error.object[error.start], start + error.start
            raise JsonError(f"expected UTF-8; got byte {got:#x} at byte {place}") from None
        return value if plain else _unescaped(value, start)

    def members(self) -> Iterator[str]:
        """Take an object: yield each key; the caller takes its value before the next one."""
        self.take("{")
        seen = set[str]()
        if self.peek() == "}":
            self.at += 1
            return
        while True:
            key = self._key()
            if key in seen:
                raise JsonError(f"expected every name once, found {quoted(key)} again")
            seen.add(key)
            yield key
            found = self.match(_NEXT)
            if found is None:
                self.fail("expected ',' or '}'")
            if found[1] == b"}":
                return

    def _key(self) -> str:
        plain = _KEY.match(self.text, self.at)
        if plain is not None and plain.end(1) - plain.start(1) <= STRING_BYTES:
            self.at = plain.end()
            return plain[1].decode("ascii")
        key = self.string()
        if self.match(_COLON) is None:
            self.fail("expected ':'")
        return key

    def whole_numbers(self) -> tuple[int, ...]:
        """Take a list of plain unsigned 64-bit integers: no sign, fraction or exponent."""
        if self.peek() != "[":
            self.fail("expected a list of whole numbers")
        short = self.match(_SHORT_LIST)
        if short is not None:
            return tuple(map(int, short[1].split(b","))) if short[1] else ()
        close = self.text.find(b"]", self.at, self.at + _LONGEST_ARRAY)
        if close < 0:
            self.fail(f"expected a list of whole numbers below {_LONGEST_ARRAY} bytes")
        body = bytes(self.text[self.at + 1 : close])
        items = [item.strip(_INDENT) for item in body.split(b",")] if body.strip(_INDENT) else []
        for item in items:
            if not _WHOLE.fullmatch(item) or int(item) > U64_MAX:
                got = quoted(f"[{body.decode('utf-8', 'backslashreplace')}]")
                raise JsonError(f"expected a list of whole numbers below 2**64, found {got}")
        self.at = close + 1
        return tuple(map(int, items))

    def skip(self, depth: int = 0) -> bytes:
        """Take any value, keep nothing of it, and return its text.

        Some ten thousand values are more than anyone has written where nothing is expected.
        """
        self._skipped += 1
        if self._skipped > _MOST_SKIPPED:
            self.fail(f"expected at most {_MOST_SKIPPED} values that have no meaning here")
        if depth > _MOST_NESTED:
            self.fail(f"expected at most {_MOST_NESTED} levels of nesting")
        first = self.peek()
        begin = self.at
        if first == "{":
            for _ in self.members():
                self.skip(depth + 1)
        elif first == "[":
            self._skip_list(depth)
        elif first == '"':
            self.string()
        elif self.match(_SCALAR) is None:
            self.fail("expected a value")
        return bytes(self.text[begin : self.at]) if depth == 0 else b""

    def _skip_list(self, depth: int) -> None:
        self.take("[")
        if self.peek() == "]":
            self.at += 1
            return
        while True:
            self.skip(depth + 1)
            if self.peek() == "]":
                self.at += 1
                return
            self.take(",")


def _unescaped(raw: str, start: int) -> str:
    try:
        value: str = json.loads(f'"{raw}"')
    except ValueError as error:  # an escape that JSON does not have
        raise JsonError(f"expected a string at byte {start - 1}, found {error}") from None
    if not value.isascii() and _SURROGATE.search(value):
        raise JsonError(f"expected UTF-8; got a lone surrogate in the string at byte {start - 1}")
    return value
