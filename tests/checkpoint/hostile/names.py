"""Names, metadata and entries that break a rule."""

from __future__ import annotations

import json

from tests.checkpoint.files import U8_PAIR, raw_file
from tests.checkpoint.hostile.cases import Case, entry, header, single

PAIR = json.dumps(U8_PAIR)
BAD = "MalformedError"


def _other(text: str) -> str:
    return f'{{"a":{PAIR},{text}}}'


def _long() -> bytes:
    """A file of 17,000 names, 1000 bytes each."""
    entries = (
        f'"{i:01000}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}'
        for i in range(17_000)
    )
    return raw_file(f"{{{','.join(entries)}}}", bytes(17_000))


RULE = "name must be 1 to 1024 bytes without control characters"
C1 = "a\u009b31m"
NAMES = [
    header(
        "name escaped into a newline", f'{{"a\\nb":{PAIR}}}', RULE, "got 3 bytes", tensor="a\nb"
    ),
    header(
        "name with a terminal command", {"a\x1b[2J": U8_PAIR}, RULE, "'a\\x1b", tensor="a\x1b[2J"
    ),
    header("name with an 8-bit command", {C1: U8_PAIR}, RULE, "'a\\x9b", tensor=C1),
    header("name with DEL", {"a\x7f": U8_PAIR}, RULE, "got 2 bytes", tensor="a\x7f"),
    header(
        "name of 1026 bytes", {"\u00e9" * 513: U8_PAIR}, RULE, "got 1026", tensor="\u00e9" * 513
    ),
    header("name of 64 KiB", {"x" * 65536: U8_PAIR}, "at most 8192 bytes", "found 65536"),
    header(
        "path in a name, wrong size",
        {"../../x": U8_PAIR | {"shape": [3]}},
        "span the 3 bytes",
        "got [0, 2]",
        tensor="../../x",
    ),
    header(
        "name twice, other dtype",
        _other(f'"a":{PAIR.replace("U8", "I8")}'),
        "every name once",
        "found 'a' again",
    ),
    header(
        "name twice, other bytes",
        _other('"a":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}'),
        "every name once",
        "'a' again",
        data=b"123",
    ),
    header(
        "name twice, no bytes",
        _other('"a":{"dtype":"U8","shape":[0],"data_offsets":[2,2]}'),
        "every name once",
        "'a' again",
    ),
    header(
        "name twice by surrogates",
        f'{{"\U0001f600":{PAIR},"\\ud83d\\ude00":{PAIR}}}',
        "every name once",
        "again",
    ),
    single(
        "17 MB of names",
        _long,
        BAD,
        "at most 16777216 bytes together",
        "got more",
        tensor=f"{16777:01000}",
    ),
]
METADATA = [
    header(
        "metadata bool", '{"__metadata__":{"a":true}}', "expected a string", "found 'true", data=b""
    ),
    header(
        "metadata float", '{"__metadata__":{"a":1.5}}', "expected a string", "found '1.5", data=b""
    ),
    header(
        "metadata array", '{"__metadata__":{"a":[]}}', "expected a string", "found '[]", data=b""
    ),
    header("metadata string", '{"__metadata__":"pt"}', "expected '{'", "found '\"pt", data=b""),
    header(
        "metadata value not UTF-8",
        b'{"__metadata__":{"a":"\xff"}}',
        "expected UTF-8",
        "0xff",
        data=b"",
    ),
    header(
        "metadata surrogate",
        '{"__metadata__":{"a":"\\ud800"}}',
        "UTF-8",
        "lone surrogate",
        data=b"",
    ),
    header(
        "metadata raw newline",
        '{"__metadata__":{"a":"\n"}}',
        "no control character",
        "found",
        data=b"",
    ),
    header(
        "metadata key by escape twice",
        '{"__metadata__":{"a":"","\\u0061":""}}',
        "every name once",
        "'a' again",
        data=b"",
    ),
    header(
        "metadata key twice by escape",
        '{"__metadata__":{},"__metadata\\u005f_":{}}',
        "every name once",
        "'__metadata__' again",
        data=b"",
    ),
    single(
        "17 MB of metadata",
        lambda: raw_file(b'{"__metadata__":{"a":"' + b"x" * 17_000_000 + b'"}}'),
        BAD,
        "at most 16777216 bytes",
        "found 17000000",
    ),
    single(
        "17 MB of metadata in parts",
        lambda: raw_file({"__metadata__": {str(i): "x" * 10**6 for i in range(17)}}),
        BAD,
        "keys and 16777216 bytes",
        "found more",
    ),
]
FIELDS = "expected dtype, shape, data_offsets"
ENTRIES = [
    entry("entry is text", "expected '{'", "found '\"U8", spelled='"U8"'),
    entry("entry is a number", "expected '{'", "found '8", spelled="8"),
    entry("entry is true", "expected '{'", "found 'true", spelled="true"),
    entry("entry is empty", FIELDS, "found no dtype, shape, data_offsets", spelled="{}"),
    entry("entry in an entry", FIELDS, "found field 'a'", spelled=f'{{"a":{PAIR}}}'),
    entry(
        "field in capitals", FIELDS, "found field 'Dtype'", spelled=PAIR.replace("dtype", "Dtype")
    ),
    entry(
        "field twice by escape",
        "every name once",
        "'dtype' again",
        spelled='{"dtype":"U8","d\\u0074ype":"U8","shape":[2],"data_offsets":[0,2]}',
    ),
    entry("field of torch", FIELDS, "found field 'stride'", spelled=PAIR[:-1] + ',"stride":[1]}'),
    entry(
        "metadata in an entry",
        FIELDS,
        "found field '__metadata__'",
        spelled=PAIR[:-1] + ',"__metadata__":{}}',
    ),
    entry("dtype is a list", "expected a string", "found '[", dtype=["U8"]),
    entry("dtype is null", "expected a string", "found 'null", dtype=None),
    *(
        entry(
            f"dtype {dtype!r}",
            "dtype must be one of BOOL",
            f"got '{dtype}'",
            dtype=dtype,
            error="UnsupportedDtypeError",
        )
        for dtype in (
            "u8",
            "U8 ",
            "",
            "F128",
            "I4",
            "torch.float32",
            "float32",
            "C128",
            "F8",
            "\u0430",
        )
    ),
    entry(
        "dtype of 5 kB",
        "dtype must be one of BOOL",
        "got 'UUU",
        dtype="U" * 5000,
        error="UnsupportedDtypeError",
    ),
    entry(
        "dtype with a terminal command",
        "dtype must be one of",
        "got 'U8\\x1b'",
        dtype="U8\x1b",
        error="UnsupportedDtypeError",
    ),
]
CASES: list[Case] = NAMES + METADATA + ENTRIES
