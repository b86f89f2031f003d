"""The scanner against ``json``: what both accept is equal, what it refuses is named."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailor_fast.checkpoint.strict_json import U64_MAX, JsonError, Scanner

WHOLE = st.integers(0, U64_MAX)
SPACE = st.sampled_from(["", " ", "\t", "\r\n", "  \n "])
# every character that UTF-8 can encode
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)


def members(text: str) -> dict[str, object]:
    scanner = Scanner(text.encode())
    found = {key: json.loads(scanner.skip()) for key in scanner.members()}
    scanner.end()
    return found


VALUE = st.recursive(
    TEXT | WHOLE | st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(TEXT, VALUE, max_size=4), st.booleans(), SPACE)
@settings(max_examples=150)
def test_objects_as_json_reads_them(value: dict[str, object], escaped: bool, space: str) -> None:
    text = space + json.dumps(value, ensure_ascii=escaped, indent=1 if space else None) + space
    assert members(text) == value


@given(TEXT, st.booleans())
@settings(max_examples=150)
def test_strings_as_json_reads_them(value: str, escaped: bool) -> None:
    assert Scanner(json.dumps(value, ensure_ascii=escaped).encode()).string() == value


@given(st.lists(WHOLE, max_size=70), SPACE)
@settings(max_examples=100)
def test_whole_numbers(values: list[int], space: str) -> None:
    text = f"[{space}{f'{space},{space}'.join(map(str, values))}{space}]"
    assert Scanner(text.encode()).whole_numbers() == tuple(values)


@pytest.mark.parametrize(
    "text",
    [
        *("[-1]", "[-0]", "[01]", "[1.0]", "[8e0]", "[true]", "[null]", '["1"]', "[[1]]", "[1,]"),
        *("[,1]", "[1 2]", "[+1]", "[0x1]", "[1_0]", "[\u0661]", f"[{U64_MAX + 1}]"),
        *(f"[{'9' * 5000}]", "[1", "{}", "", f"[{' ' * 70_000}]", "[NaN]"),
    ],
)
def test_what_is_no_list_of_whole_numbers(text: str) -> None:
    with pytest.raises(JsonError):
        Scanner(text.encode()).whole_numbers()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a":1,"a":2}', "expected every name once, found 'a' again"),
        ('{"a":1,"\\u0061":2}', "expected every name once, found 'a' again"),
        ('{"a":{"b":1,"b":1}}', "expected every name once, found 'b' again"),
        ('{"a":1,}', "expected a string at byte 7, found '}'"),
        ('{"a" 1}', "expected ':' at byte 5, found '1}'"),
        ('{"a":1', "expected ',' or '}' at byte 6, found the end"),
        ('{"a":[1', "expected ',' at byte 7, found the end"),
        ('{"a":[1,]}', "expected a value at byte 8, found '\\]}'"),
        ("[]", "expected '{' at byte 0, found '\\[\\]'"),
        ("{} {}", "expected nothing more at byte 3, found '{}'"),
        ('{"\\ud800":1}', "expected UTF-8; got a lone surrogate in the string at byte 1"),
        ('{"\\x":1}', "expected a string at byte 1, found Invalid"),
        ('{"a\nb":1}', "expected a string that ends and has no control character at byte 1"),
        ('{"a":"b', "expected a string that ends and has no control character at byte 5"),
        ('{"a":NaN}', "expected a value at byte 5, found 'NaN}'"),
        ('{"a":-Infinity}', "expected a value at byte 5, found '-Infinity}'"),
        ('{"a":01}', "expected ',' or '}' at byte 6, found '1}'"),
        ('{"a":' + "[" * 100_000, "expected at most 64 levels of nesting"),
        ('{"a":' + '{"a":' * 100_000, "expected at most 64 levels of nesting"),
        (f'{{"a":[{"1," * 70_000}1]}}', "expected at most 65536 values that have no meaning"),
        (f'{{"{"x" * 8193}":1}}', "expected a string of at most 8192 bytes at byte 1, found 8193"),
        ('// c\n{"a":1}', "expected '{' at byte 0"),
        ("{a:1}", "expected a string at byte 1"),
        ('\ufeff{"a":1}', "expected '{' at byte 0"),
    ],
)
def test_refusals_say_what_and_where(text: str, message: str) -> None:
    with pytest.raises(JsonError, match=message):
        members(text)


@pytest.mark.parametrize("text", [b'{"\xff":1}', b'{"a\\n\xc3":1}', b'{"\xed\xa0\x80":1}'])
def test_bytes_that_are_not_utf8(text: bytes) -> None:
    with pytest.raises(JsonError, match=r"expected UTF-8; got byte 0x(ff|c3|ed) at byte \d"):
        next(Scanner(text).members())
