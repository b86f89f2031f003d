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
    scanner = Scanner(text)
    found = {key: scanner.value() for key in scanner.members()}
    scanner.end()
    return found


@given(st.dictionaries(TEXT, TEXT | WHOLE | st.none()), st.booleans(), SPACE)
@settings(max_examples=150)
def test_objects_as_json_reads_them(value: dict[str, object], escaped: bool, space: str) -> None:
    text = space + json.dumps(value, ensure_ascii=escaped, indent=1 if space else None) + space
    assert members(text) == value


@given(TEXT, st.booleans())
@settings(max_examples=150)
def test_strings_as_json_reads_them(value: str, escaped: bool) -> None:
    assert Scanner(json.dumps(value, ensure_ascii=escaped)).string() == value


@given(st.lists(WHOLE, max_size=70), SPACE)
@settings(max_examples=100)
def test_whole_numbers(values: list[int], space: str) -> None:
    text = f"[{space}{f'{space},{space}'.join(map(str, values))}{space}]"
    assert Scanner(text).whole_numbers() == tuple(values)


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
        Scanner(text).whole_numbers()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a":1,"a":2}', "the name 'a' occurs twice"),
        ('{"a":1,"\\u0061":2}', "the name 'a' occurs twice"),
        ('{"a":1,}', "expected a string at character 7, found '}'"),
        ('{"a" 1}', "expected ':' at character 5, found '1}'"),
        ('{"a":1', "expected ',' at character 6, found the end"),
        ("[]", "expected '{' at character 0, found '\\[\\]'"),
        ("{} {}", "expected nothing more at character 3, found '{}'"),
        ('{"\\ud800":1}', "lone surrogate"),
        ('{"a\nb":1}', "Invalid control character"),
        ('{"a":NaN}', "NaN is not JSON"),
        ('{"a":-Infinity}', "-Infinity is not JSON"),
        ('{"a":' + "[" * 100_000, "recursion"),
        ('{"a":' + "9" * 5000 + "}", "integer string conversion"),
        ('// c\n{"a":1}', "expected '{' at character 0"),
        ("{a:1}", "expected a string at character 1"),
        ('\ufeff{"a":1}', "expected '{' at character 0"),
    ],
)
def test_refusals_say_what_and_where(text: str, message: str) -> None:
    with pytest.raises(JsonError, match=message):
        members(text)
