"""A JSON reader that accepts the little that a header or an index may hold.

Python's ``json`` accepts NaN, repeated keys, lone surrogates and ``-0``, and builds whatever a
hostile file describes before anyone can look at it. This scanner is driven by what is expected
next, so that memory grows only with what is kept. Strings and free-form values go to ``json``.
"""

import json
import re
from collections.abc import Iterator
from typing import NoReturn

from tailor_fast.checkpoint.errors import quoted, shorten

U64_MAX = 2**64 - 1
_SPACE = re.compile(r"[ \t\r\n]*")
_PLAIN = re.compile(r'"([^"\\\x00-\x1f]*)"')  # no escape, which nearly every string is
_WHOLE = re.compile(r"0|[1-9][0-9]{0,19}")
_LONGEST_ARRAY = 1 << 16  # characters; 64 numbers of 20 digits are 1,300
_INDENT = " \t\r\n"


class JsonError(ValueError):
    """The text is not the JSON that was expected at this place."""


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_decode = json.JSONDecoder(parse_constant=_no_constant).raw_decode


class Scanner:
    """A cursor over ``text`` that takes one expected thing after the other.

    Every method raises ``JsonError`` when the text holds something else.
    """

    def __init__(self, text: str) -> None:
        """Start at the first character."""
        self.text = text
        self.at = 0

    def peek(self) -> str:
        """Skip white space and return the next character, empty at the end."""
        found = self.text[self.at : self.at + 1]
        if found not in _INDENT:
            return found
        match = _SPACE.match(self.text, self.at)
        self.at = self.at if match is None else match.end()
        return self.text[self.at : self.at + 1]

    def take(self, expected: str) -> None:
        """Take the one character ``expected``."""
        if self.peek() != expected:
            self.fail(f"expected {quoted(expected)}")
        self.at += 1

    def match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """Take what ``pattern`` matches next, or nothing."""
        self.peek()
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
        found = quoted(self.text[self.at : self.at + 20]) if self.peek() else "the end"
        raise JsonError(f"{problem} at character {self.at}, found {found}")

    def string(self) -> str:
        """Take a string; every character must be one that UTF-8 can encode."""
        if self.peek() != '"':
            self.fail("expected a string")
        plain = self.match(_PLAIN)
        if plain is not None:
            return plain[1]
        value = self.value()
        if not isinstance(value, str):
            raise JsonError(f"expected a string at character {self.at}")
        if not value.isascii() and re.search("[\ud800-\udfff]", value):
            raise JsonError(f"lone surrogate in the string before character {self.at}")
        return value

    def value(self) -> object:
        """Take any JSON value and return it as ``json`` does."""
        self.peek()
        try:
            value, self.at = _decode(self.text, self.at)
        except (ValueError, RecursionError) as error:  # JSONDecodeError, digit limit, depth
            raise JsonError(f"{error} (value at character {self.at})") from None
        return value

    def members(self) -> Iterator[str]:
        """Take an object: yield each key; the caller takes its value before the next one."""
        self.take("{")
        seen = set[str]()
        if self.peek() == "}":
            self.at += 1
            return
        while True:
            key = self.string()
            if key in seen:
                raise JsonError(f"the name {quoted(key)} occurs twice")
            seen.add(key)
            self.take(":")
            yield key
            if self.peek() == "}":
                self.at += 1
                return
            self.take(",")

    def whole_numbers(self) -> tuple[int, ...]:
        """Take a list of plain unsigned 64-bit integers: no sign, fraction or exponent."""
        if self.peek() != "[":
            self.fail("expected a list of whole numbers")
        close = self.text.find("]", self.at, self.at + _LONGEST_ARRAY)
        if close < 0:
            self.fail("expected a shorter list of whole numbers")
        body = self.text[self.at + 1 : close]
        items = [item.strip(_INDENT) for item in body.split(",")] if body.strip(_INDENT) else []
        for item in items:
            if not _WHOLE.fullmatch(item) or int(item) > U64_MAX:
                raise JsonError(
                    f"must be a list of whole numbers below 2**64; got [{shorten(body)}]"
                )
        self.at = close + 1
        return tuple(int(item) for item in items)
