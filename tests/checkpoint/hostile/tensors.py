"""Shapes, offsets and numbers of tensors that break a rule."""

from __future__ import annotations

from collections.abc import Callable

from tests.checkpoint.files import U8_PAIR, raw_file
from tests.checkpoint.hostile.cases import Case, entry, header, single

BAD = "MalformedError"
NUMBERS, FITS = "expected a list of whole numbers", "sizes must be at most 2**48"


def _u8(begin: int, end: int) -> dict[str, object]:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}


def _many(count: int, form: Callable[[int], str], end: str = "}") -> Callable[[], bytes]:
    """A file of ``count`` one-byte tensors, each entry as ``form`` spells it."""
    return lambda: raw_file("{" + ",".join(map(form, range(count))) + end, bytes(count))


def _usual(i: int) -> str:
    return f'"model.layers.{i}.w":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}'


def _unusual(i: int) -> str:
    return f'"{i}":{{"shape":[1],"dtype":"U8","data_offsets":[{i},{i + 1}]}}'


def _same(i: int) -> str:
    return f'"{i}":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'


SHAPES = [
    *(
        entry(
            f"shape {text[:30]}",
            NUMBERS,
            "found",
            spelled=f'{{"dtype":"U8","shape":{text},"data_offsets":[0,2]}}',
        )
        for text in (
            "[-2]",
            "[-0]",
            "[02]",
            "[2.0]",
            "[2e0]",
            "[8E0]",
            "[+2]",
            "[0x2]",
            "[2,]",
            "[,2]",
            "[2 2]",
            "[true]",
            "[null]",
            '["2"]',
            "[[2]]",
            "[{}]",
            "2",
            '"2"',
            "null",
            "{}",
            "[NaN]",
            "[Infinity]",
            f"[{2**64}]",
            f"[{'9' * 5000}]",
            "[2_0]",
            "[\u0662]",
        )
    ),
    entry(
        "size 2**64 - 1",
        FITS,
        "got U8 [0, 18446744073709551615]",
        shape=[0, 2**64 - 1],
        offsets=[0, 0],
        data=b"",
    ),
    entry(
        "size 2**64 - 1 first",
        FITS,
        "got U8 [18446744073709551615, 2, 0]",
        shape=[2**64 - 1, 2, 0],
        offsets=[0, 0],
        data=b"",
    ),
    entry(
        "size 2**63 - 1 beside 0",
        FITS,
        "got U8 [0, 9223372036854775807]",
        shape=[0, 2**63 - 1],
        offsets=[0, 0],
        data=b"",
    ),
    entry(
        "product wraps to 10",
        FITS,
        "got U8 [4194305, 4194305, 211106198978564]",
        shape=[4194305, 4194305, 211106198978564],
        offsets=[0, 10],
        data=b"1" * 10,
    ),
    entry(
        "bits wrap, elements do not",
        FITS,
        "got F64",
        dtype="F64",
        shape=[2**48, 2**10],
        offsets=[0, 0],
        data=b"",
    ),
    entry(
        "4-bit product beyond 64 bits",
        FITS,
        "got F4",
        dtype="F4",
        shape=[2**48, 2**15],
        offsets=[0, 0],
        data=b"",
    ),
    entry(
        "100 dimensions",
        "rank must be at most 64",
        "got 100",
        shape=[1] * 100,
        offsets=[0, 1],
        data=b"1",
    ),
    entry(
        "5000 dimensions",
        "rank must be at most 64",
        "got 5000",
        shape=[1] * 5000,
        offsets=[0, 1],
        data=b"1",
    ),
    entry(
        "100 dimensions of 0",
        "rank must be at most 64",
        "got 100",
        shape=[0] * 100,
        offsets=[0, 0],
        data=b"",
    ),
    entry("4-bit, odd", "fill whole bytes", "is 20 bits", dtype="F4", shape=[5], offsets=[0, 2]),
    entry("6-bit, odd", "fill whole bytes", "is 6 bits", dtype="F6_E3M2", shape=[], offsets=[0, 1]),
    entry(
        "scalar without bytes",
        "span the 4 bytes of F32 []",
        "got [0, 0]",
        dtype="F32",
        shape=[],
        offsets=[0, 0],
        data=b"",
    ),
    entry("no elements, with bytes", "span the 0 bytes of U8 [0]", "got [0, 2]", shape=[0]),
    entry("half the bytes", "span the 4 bytes of BF16 [2]", "got [0, 2]", dtype="BF16"),
    entry("twice the bytes", "span the 1 bytes of U8 [1]", "got [0, 2]", shape=[1]),
]
OFFSETS = [
    *(
        entry(
            f"offsets {text[:30]}",
            NUMBERS,
            "found",
            spelled=f'{{"dtype":"U8","shape":[2],"data_offsets":{text}}}',
        )
        for text in (
            '["0","2"]',
            "[0.0,2.0]",
            "[-2,0]",
            "[0,2e0]",
            "[null,2]",
            "0",
            '"0,2"',
            "{}",
            "null",
            f"[{2**64},{2**64 + 2}]",
            "[0,[2]]",
            "[0,2",
        )
    ),
    entry("no offsets in the list", "must be two numbers", "got 0", offsets=[]),
    entry(
        "offsets of 2**64 - 1", "span the 2 bytes", f"got [0, {2**64 - 1}]", offsets=[0, 2**64 - 1]
    ),
    entry("offsets reversed about 0", "span the 2 bytes", "got [2, 0]", offsets=[2, 0]),
    single(
        "offsets at the end of u64",
        raw_file({"a": U8_PAIR | {"data_offsets": [2**64 - 3, 2**64 - 1]}}, b"12"),
        "TruncatedError",
        f"must have the {2**64 - 1} bytes",
        "got 2",
    ),
    header(
        "contained",
        {"a": _u8(0, 4), "b": _u8(1, 3)},
        "not overlap another tensor: expected 4",
        "got 1",
        data=b"1234",
        tensor="b",
    ),
    header(
        "overlap by one",
        {"a": _u8(0, 2), "b": _u8(1, 4)},
        "not overlap another tensor: expected 2",
        "got 1",
        data=b"1234",
        tensor="b",
    ),
    header(
        "hole, unsorted",
        {"b": _u8(3, 4), "a": _u8(0, 2)},
        "leave no hole: expected 2",
        "got 3",
        data=b"1234",
        tensor="b",
    ),
    header(
        "no elements, inside another",
        {"a": _u8(0, 4), "z": _u8(2, 2)},
        "not overlap another tensor: expected 4",
        "got 2",
        data=b"1234",
        tensor="z",
    ),
    header(
        "no elements, beyond the end",
        {"a": U8_PAIR, "z": _u8(2, 2) | {"data_offsets": [1, 1]}},
        "overlap another tensor: expected 2",
        "got 1",
        tensor="z",
    ),
    single(
        "no elements, beyond the file",
        raw_file({"a": U8_PAIR, "z": _u8(9, 9)}, b"12"),
        "TruncatedError",
        "must have the 9 bytes",
        "got 2",
    ),
    single(
        "10,000 names on one byte",
        _many(10_000, _same),
        BAD,
        "not overlap another tensor: expected 1",
        "got 0",
        tensor="1",
    ),
]
COUNTS = [
    single(
        "a million names on one byte",
        _many(1_000_000, _same),
        BAD,
        "at most 150000 tensors",
        "got more",
    ),
    single("150,001 tensors", _many(150_001, _usual), BAD, "at most 150000 tensors", "got more"),
    single(
        "150,000 tensors, then an error",
        _many(150_000, _usual, ",}"),
        BAD,
        "expected a string",
        "found '}'",
    ),
    single(
        "50,001 entries of unusual spelling",
        _many(50_001, _unusual),
        BAD,
        "at most 50000 entries of unusual",
        "found more",
        tensor="50000",
    ),
]
CASES: list[Case] = SHAPES + OFFSETS + COUNTS
