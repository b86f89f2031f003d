"""The header parser: round trips with the format's own library, and every rule broken once."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, save

from tailor_fast.checkpoint import (
    MalformedError,
    NotSafetensorsError,
    TruncatedError,
    UnsupportedDtypeError,
    dtype_name,
    torch_dtype,
)
from tailor_fast.checkpoint.dtypes import DTYPES, byte_size
from tailor_fast.checkpoint.header import Header, Limits, header_length, parse_header
from tests.checkpoint.files import U8_PAIR, raw_file


def parse(blob: bytes) -> Header:
    length = header_length(blob[:64], len(blob), "m.safetensors")
    return parse_header(blob[8 : 8 + length], len(blob) - 8 - length, "m.safetensors")


def entry(dtype: str = "U8", shape: object = (2,), offsets: object = (0, 2)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12),
        st.tuples(
            st.sampled_from([name for name in DTYPES if torch_dtype(name) is not None]),
            st.lists(st.integers(0, 4), max_size=4),
        ),
        max_size=6,
    )
)
@settings(max_examples=150)
def test_what_the_library_writes(spec: dict[str, tuple[str, list[int]]]) -> None:
    spec.pop("__metadata__", None)
    tensors = {
        name: torch.zeros(shape, dtype=torch_dtype(dt)) for name, (dt, shape) in spec.items()
    }
    header = parse(save(tensors, metadata={"format": "pt"}))
    found = {item.name: (item.dtype, list(item.shape)) for item in header.entries}
    assert found == spec
    assert header.metadata == {"format": "pt"}


def test_every_dtype_has_one_name_and_the_librarys_size() -> None:
    for name in DTYPES:
        dtype = torch_dtype(name)
        if dtype is not None:
            assert dtype_name(dtype) == name
            assert byte_size(name, (3, 5)) == 15 * dtype.itemsize
    assert [name for name in DTYPES if torch_dtype(name) is None] == ["F4", "F6_E2M3", "F6_E3M2"]
    assert len(DTYPES) == 22
    with pytest.raises(TypeError, match=r"dtype must be one of bool, .*; got torch.complex128"):
        dtype_name(torch.complex128)


LEGAL = {
    "empty": ({}, b""),
    "metadata only": ({"__metadata__": {"a": "b"}}, b""),
    "empty metadata": ({"__metadata__": {}, "a": U8_PAIR}, b"12"),
    "scalar": ({"a": entry("F32", [], [0, 4])}, b"1234"),
    "no elements, in the middle": (
        {"a": U8_PAIR, "z": entry("F32", [0, 3], [2, 2]), "b": entry(offsets=[2, 4])},
        b"1234",
    ),
    "out of order": ({"b": entry(offsets=[2, 4]), "a": U8_PAIR}, b"1234"),
    "float32 at an odd offset": (
        {"a": entry("U8", [1], [0, 1]), "b": entry("F32", [1], [1, 5])},
        b"12345",
    ),
    "float4": ({"a": entry("F4", [4], [0, 2])}, b"12"),
    "float6": ({"a": entry("F6_E2M3", [4], [0, 3])}, b"123"),
}


@pytest.mark.parametrize("case", LEGAL)
def test_legal(case: str) -> None:
    header, data = LEGAL[case]
    parsed = parse(raw_file(header, data))
    assert {item.name for item in parsed.entries} == set(header) - {"__metadata__"}
    begins = [item.begin for item in parsed.entries]
    assert begins == sorted(begins)
    assert parsed.metadata == header.get("__metadata__", {})
    assert parsed.warnings == ()


PAIR_TEXT = json.dumps(U8_PAIR)
# header, data, what the message must hold
BROKEN = {
    "list": ("[]", b"", "expected '{'"),
    "null": ("null", b"", "expected '{'"),
    "lone brace": ("{", b"", "found the end"),
    "two objects": ("{}{}", b"", "expected nothing more"),
    "nul padding": ("{}\0\0", b"", "expected nothing more"),
    "not utf-8": (b'{"\xff":1}', b"", "UTF-8; got byte 0xff"),
    "utf-16": ("{}".encode("utf-16le"), b"", "expected a string"),
    "byte order mark": (b"\xef\xbb\xbf{}", b"", "expected '{'"),
    "deep": ('{"a":' + "[" * 100_000, b"", "expected '{'"),
    "name twice": (f'{{"a":{PAIR_TEXT},"\\u0061":{PAIR_TEXT}}}', b"12", "every name once"),
    "empty name": ({"": U8_PAIR}, b"12", "name must be 1 to 1024 bytes"),
    "control character": ({"a\0": U8_PAIR}, b"12", "without control characters"),
    "long name": ({"x" * 1025: U8_PAIR}, b"12", "got 1025 bytes"),
    "lone surrogate": (f'{{"\\ud800":{PAIR_TEXT}}}', b"12", "lone surrogate"),
    "metadata null": ({"__metadata__": None}, b"", "__metadata__: .*expected '{'"),
    "metadata number": ({"__metadata__": {"a": 1}}, b"", "__metadata__: .*expected a string"),
    "metadata nested": ({"__metadata__": {"a": {}}}, b"", "__metadata__: .*expected a string"),
    "metadata list": ({"__metadata__": []}, b"", "__metadata__: .*expected '{'"),
    "metadata key twice": ('{"__metadata__":{"a":"","a":""}}', b"", "found 'a' again"),
    "metadata twice": ('{"__metadata__":{},"__metadata__":{}}', b"", "found '__metadata__' again"),
    "tensor named metadata": ({"__metadata__": U8_PAIR}, b"12", "__metadata__: .*a string"),
    "positional entry": ({"a": ["U8", [2], [0, 2]]}, b"12", "expected '{'"),
    "null entry": ({"a": None}, b"", "expected '{'"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 2]}}, b"12", "found no dtype"),
    "no shape": ({"a": {"dtype": "U8", "data_offsets": [0, 2]}}, b"12", "found no shape"),
    "no offsets": ({"a": {"dtype": "U8", "shape": [2]}}, b"12", "found no data_offsets"),
    "extra field": ({"a": U8_PAIR | {"x": 1}}, b"12", "found field 'x'"),
    "field twice": (
        '{"a":{"dtype":"U8","dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
        b"12",
        "found 'dtype' again",
    ),
    "dtype number": ({"a": entry(dtype=8)}, b"12", "expected a string"),
    "negative size": ({"a": entry(shape=[-2])}, b"12", "list of whole numbers below"),
    "float size": ({"a": entry(shape=[2.0])}, b"12", "list of whole numbers below"),
    "bool size": ({"a": entry(shape=[True, 2])}, b"12", "list of whole numbers below"),
    "shape null": ({"a": entry(shape=None)}, b"12", "expected a list of whole numbers"),
    "rank": ({"a": entry(shape=[1] * 65, offsets=[0, 1])}, b"1", "rank must be at most 64; got 65"),
    "size above 2**48": ({"a": entry(shape=[0, 2**48 + 1], offsets=[0, 0])}, b"", "at most 2"),
    "overflow": ({"a": entry(shape=[2**40, 2**40])}, b"12", "product in bits below 2"),
    "overflow hidden by zero": (
        {"a": entry(shape=[2**40, 2**40, 0], offsets=[0, 0])},
        b"",
        "product in bits below 2",
    ),
    "wraps to 8 bytes": ({"a": entry("F64", [2**61 + 1], [0, 8])}, b"8" * 8, "at most 2"),
    "half a byte": ({"a": entry("F4", [3], [0, 2])}, b"12", "is 12 bits"),
    "one offset": ({"a": entry(offsets=[0])}, b"12", "two numbers; got 1"),
    "three offsets": ({"a": entry(offsets=[0, 2, 2])}, b"12", "two numbers; got 3"),
    "reversed": ({"a": entry(offsets=[2, 0])}, b"12", r"span the 2 bytes .*; got \[2, 0\]"),
    "mismatch": ({"a": entry(shape=[3])}, b"12", r"span the 3 bytes of U8 \[3\]; got \[0, 2\]"),
    "hole at the start": ({"a": entry(offsets=[1, 3])}, b"123", "no hole: expected 0; got 1"),
    "hole": (
        {"a": U8_PAIR, "b": entry(offsets=[3, 5])},
        b"12345",
        "'b': .*no hole: expected 2; got 3",
    ),
    "overlap": ({"a": U8_PAIR, "b": entry(offsets=[1, 3])}, b"123", "not overlap another tensor"),
    "same bytes": ({"a": U8_PAIR, "b": U8_PAIR}, b"12", "not overlap another tensor"),
    "empty one outside": (
        {"a": U8_PAIR, "z": entry("F32", [0], [1, 1])},
        b"12",
        "overlap|hole",
    ),
    "bytes after the last": (
        {"a": U8_PAIR},
        b"12345",
        "end with the last tensor's data, 2 bytes; got 3 bytes after them",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken(case: str) -> None:
    header, data, message = BROKEN[case]
    with pytest.raises(MalformedError, match=message) as caught:
        parse(raw_file(header, data))
    assert caught.value.exit_code == 65
    assert str(caught.value).startswith("m.safetensors: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("dtype", ["F128", "f32", "", "F32 "])
def test_unknown_dtype(dtype: str) -> None:
    with pytest.raises(UnsupportedDtypeError, match="dtype must be one of BOOL, ") as caught:
        parse(raw_file({"a.b": entry(dtype)}, b"12"))
    assert caught.value.exit_code == 65
    assert caught.value.tensor == "a.b"
    assert str(caught.value).endswith(f"got '{dtype}'; write the tensor again in one of these")


@pytest.mark.parametrize(
    ("blob", "error", "message"),
    [
        (b"", TruncatedError, "size is 0 bytes, a header alone needs more than 8"),
        (b"1234567", TruncatedError, "size is 7 bytes"),
        (bytes(4096), MalformedError, "header length must be above 0; the file starts with zeros"),
        (struct.pack("<Q", 100) + b"{}", TruncatedError, "the header alone needs 108"),
        (struct.pack("<Q", 10**8 + 1), MalformedError, "at most 100000000 bytes; got 100000001"),
        (b"\xff" * 8, MalformedError, "got 18446744073709551615"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            NotSafetensorsError,
            "run `git lfs pull`",
        ),
        (b"<!DOCTYPE html><html>", NotSafetensorsError, "web page"),
        (b"PK\x03\x04\x14\0\0\0\x08\0", NotSafetensorsError, "zip archive, .*convert it"),
        (b"\x80\x02}q\0(X\1\0\0\0a", NotSafetensorsError, "pickle, which may run code"),
        (b"GGUF\3\0\0\0\1\0", NotSafetensorsError, "GGUF"),
        (raw_file({"a": U8_PAIR}, b"1"), TruncatedError, "must have the 2 bytes of data .*; got 1"),
        (
            raw_file({"a": entry(shape=[2**40], offsets=[0, 2**40])}),
            TruncatedError,
            "describes; got 0;",
        ),
    ],
)
def test_framing(blob: bytes, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse(blob)


def test_a_length_may_look_like_another_format() -> None:
    # 0x3c is '<' and 0x0280 starts like a pickle: both are legal lengths
    for length in (0x3C, 0x0280):
        blob = length.to_bytes(8, "little") + b"{}".ljust(length)
        assert parse(blob).entries == ()


def test_limits() -> None:
    three = {name: entry(offsets=[2 * i, 2 * i + 2]) for i, name in enumerate("abc")}
    parse_limited({name: three[name] for name in "ab"}, 4, Limits(2, 0))
    with pytest.raises(MalformedError, match="at most 2 tensors; got more"):
        parse_limited(three, 6, Limits(2, 0))
    told: dict[str, object] = {"__metadata__": {"k": "12345678"}}
    parse_limited(told, 0, Limits(0, 15))
    with pytest.raises(MalformedError, match="at most 16384 keys and 14 bytes, found more"):
        parse_limited(told, 0, Limits(0, 14))


def parse_limited(header: dict[str, object], data_bytes: int, limits: Limits) -> None:
    text = json.dumps(header, separators=(",", ":")).encode()
    parse_header(text, data_bytes, "m.safetensors", limits)


def test_warnings() -> None:
    header = {"a/b": U8_PAIR, "A/B": entry(offsets=[2, 4]), "c": entry(offsets=[4, 6])}
    parsed = parse(raw_file("\t" + json.dumps(header) + "\n", b"123456"))
    text = "\n".join(parsed.warnings)
    assert len(parsed.warnings) == 3
    assert "m.safetensors: header has white space before it" in text
    assert "2 tensors are named like paths: 'A/B', 'a/b'" in text
    assert "names of tensors differ only in case: 'A/B', 'a/b'" in text


SEEDS = [
    save({"a": torch.zeros(3, 2), "b": torch.zeros(5, dtype=torch.uint8)}, metadata={"k": "v"}),
    save({"z": torch.zeros(0, 2).bfloat16(), "\u00e9": torch.tensor(True)}),
]


@given(st.sampled_from(SEEDS), st.data())
@settings(max_examples=400)
def test_a_changed_header_is_refused_or_read_as_the_library_reads_it(seed: bytes, data) -> None:
    end = 8 + int.from_bytes(seed[:8], "little")
    blob = bytearray(seed)
    for _ in range(data.draw(st.integers(1, 2))):
        blob[data.draw(st.integers(0, end - 1))] = data.draw(
            st.integers(0, 255) | st.sampled_from(list(b'0123456789{}[],":.eE-+ \\FUBI'))
        )
    try:
        parsed = parse(bytes(blob))
    except (MalformedError, TruncatedError, UnsupportedDtypeError, NotSafetensorsError):
        return
    try:
        tensors = load(bytes(blob))
    except SafetensorError as error:
        raise AssertionError(f"accepted what the library refuses: {bytes(blob)!r}") from error
    assert {item.name: list(item.shape) for item in parsed.entries} == {
        name: list(tensor.shape) for name, tensor in tensors.items()
    }


@given(st.data())
@settings(max_examples=300)
def test_both_spellings_of_an_entry_are_read_alike(data) -> None:
    """The common spelling has a path of its own; one space sends an entry down the general one."""
    number = st.sampled_from(["0", "1", "2", "4", "08", "-1", "1.0", "99999999999999999999", ""])
    shape = ",".join(data.draw(st.lists(number, max_size=3)))
    offsets = ",".join(data.draw(st.lists(number, min_size=1, max_size=3)))
    dtype = data.draw(st.sampled_from(["U8", "F32", "F4", "X", "u8"]))
    text = f'"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{offsets}]'
    outcomes = []
    for spelling in (f'{{"a":{{{text}}}}}', f'{{"a":{{ {text}}}}}'):
        try:
            outcomes.append(parse(raw_file(spelling, b"1234")).entries)
        except (MalformedError, TruncatedError, UnsupportedDtypeError) as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]
