"""Layouts: what the format's library reads back, cut as asked, aligned, and sizes as written."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from tailor_fast._core.errors import UsageError
from tailor_fast.checkpoint import (
    DTYPES,
    Layout,
    TensorSpec,
    byte_size,
    parse_size,
    plan_layout,
    shown_size,
    torch_dtype,
)
from tailor_fast.checkpoint.header import parse_header

SHAPES = st.lists(st.integers(0, 40), max_size=3)
NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=10)
SPECS = st.dictionaries(
    NAMES.filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from([name for name in DTYPES if torch_dtype(name)]), SHAPES),
    max_size=9,
).map(lambda found: [TensorSpec(name, dt, tuple(shape)) for name, (dt, shape) in found.items()])


def check_places(layout: Layout) -> None:
    """Every tensor's place is where the file's own header puts it."""
    for number, shard in enumerate(layout.shards):
        assert len(shard.header) % 4096 == 0
        assert shard.header[8:9] == b"{"
        assert shard.header.rstrip(b" ").endswith(b"}")
        header = parse_header(shard.header[8:], shard.size - len(shard.header), shard.file_name)
        assert header.metadata["format"] == "pt"
        assert tuple(item.name for item in header.entries) == shard.tensors
        for item in header.entries:
            place = layout.tensors[item.name]
            assert place.shard == number
            assert place.offset == header.data_begin + item.begin
            assert (place.dtype, place.shape) == (item.dtype, item.shape)
            assert place.nbytes == item.end - item.begin
            dtype = torch_dtype(item.dtype)
            assert dtype is None or place.offset % dtype.itemsize == 0


@given(SPECS, st.none() | st.integers(1, 4000))
@settings(max_examples=120)
def test_layout(specs: list[TensorSpec], limit: int | None) -> None:
    layout = plan_layout(specs, max_shard_bytes=limit)
    check_places(layout)
    assert list(layout.tensors) == [spec.name for spec in specs]
    sizes = {spec.name: byte_size(spec.dtype, spec.shape) for spec in specs}
    assert layout.total_size == sum(sizes.values())
    assert layout.file_bytes == sum(s.size for s in layout.shards) + len(layout.index or b"")
    assert all(shard.tensors for shard in layout.shards) or not specs
    for shard in layout.shards:
        held = sum(sizes[name] for name in shard.tensors)
        assert limit is None or held <= limit or len([n for n in shard.tensors if sizes[n]]) == 1
    if len(layout.shards) == 1:
        assert layout.shards[0].file_name == "model.safetensors"
        assert layout.index is None
        return
    count = len(layout.shards)
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    assert [shard.file_name for shard in layout.shards] == names
    index = json.loads(layout.index)
    assert index["metadata"]["total_size"] == layout.total_size
    assert index["weight_map"] == {n: names[p.shard] for n, p in layout.tensors.items()}


@given(SPECS)
@settings(max_examples=40)
def test_the_library_reads_the_header(specs: list[TensorSpec]) -> None:
    layout = plan_layout(specs, max_shard_bytes=None, metadata={"k": "\u00e9"})
    (shard,) = layout.shards
    with TemporaryDirectory() as directory:
        path = Path(directory) / "m.safetensors"
        path.write_bytes(shard.header + bytes(shard.size - len(shard.header)))
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt", "k": "\u00e9"}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  safe_open has keys() only
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()} == {
        spec.name: (torch_dtype(spec.dtype), spec.shape) for spec in specs
    }


def test_files_are_filled_in_the_order_given() -> None:
    specs = [TensorSpec(name, "U8", (4,)) for name in "dacb"]
    specs.insert(1, TensorSpec("big", "F32", (9,)))
    layout = plan_layout(specs, max_shard_bytes=8)
    assert [shard.tensors for shard in layout.shards] == [("d",), ("big",), ("a", "c"), ("b",)]


def test_larger_elements_first() -> None:
    specs = [
        TensorSpec("u", "U8", (3,)),
        TensorSpec("f", "F64", (1,)),
        TensorSpec("h", "F16", (1,)),
    ]
    assert plan_layout(specs).shards[0].tensors == ("f", "h", "u")


def test_packed_dtypes_and_large_tensors() -> None:
    specs = [TensorSpec("f4", "F4", (3, 2)), TensorSpec("large", "BF16", (2**20, 2**20))]
    layout = plan_layout(specs, max_shard_bytes=None)
    check_places(layout)
    assert layout.total_size == 2**41 + 3


def test_same_input_same_bytes() -> None:
    specs = [TensorSpec(name, "U8", (4,)) for name in "dacb"]
    one = plan_layout(specs, max_shard_bytes=9, index_metadata={"v": "1"})
    assert one == plan_layout(iter(specs), max_shard_bytes=9, index_metadata={"v": "1"})
    assert json.loads(one.index)["metadata"] == {"v": "1", "total_size": 16}


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([TensorSpec("a", "U8", (1,)), TensorSpec("a", "U8", (2,))], "name 'a' is used twice"),
        ([TensorSpec("__metadata__", "U8", (1,))], "'__metadata__' is reserved"),
        ([TensorSpec("", "U8", (1,))], "'' is reserved"),
        ([TensorSpec("a", "F128", (1,))], "dtype of 'a' must be one of BOOL, .*; got 'F128'"),
        ([TensorSpec("a", "F4", (3,))], r"F4 \[3\] is 12 bits"),
    ],
)
def test_refused_specs(specs: list[TensorSpec], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_layout(specs)


def test_refused_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="max_shard_bytes must be at least 1; got 0"):
        plan_layout([], max_shard_bytes=0)
    monkeypatch.setattr("tailor_fast.checkpoint.plan.MAX_HEADER_BYTES", 100)
    with pytest.raises(ValueError, match=r"may have 100 bytes, this one has 4088. Hint: a smaller"):
        plan_layout([])
    monkeypatch.setattr("tailor_fast.checkpoint.plan.MAX_METADATA_BYTES", 30)
    with pytest.raises(ValueError, match=r"metadata may have 30 bytes, these have 33. Hint: leave"):
        plan_layout([], metadata={"k": "12345678"})


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *[("5GB", 5 * 10**9), ("5gb", 5 * 10**9), ("5G", 5 * 10**9), ("5B", 5 * 10**9)],
        *[("512MiB", 512 * 2**20), ("1.5 KiB", 1536), ("1KB", 1000), ("2TB", 2 * 10**12)],
        *[("1000", 1000), (1000, 1000), (" 7 ", 7), ("0.3GB", 300_000_000), ("1TiB", 2**40)],
        ("12345678901234567890123", 12345678901234567890123),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "5XB", "5iB", "5BB", "1e9", "5 G B", "1,5GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(
        UsageError, match="a size must be like 5GB, 512MiB or 1000000; got"
    ) as caught:
        parse_size(text)
    assert caught.value.exit_code == 2


def test_size_below_one_byte() -> None:
    with pytest.raises(UsageError, match=r"at least one byte; got '0.4'"):
        parse_size("0.4")


def test_sizes_as_text() -> None:
    sizes = [shown_size(size) for size in (0, 999, 1000, 13_480_000_000, 2 * 10**12)]
    assert sizes == ["0 bytes", "999 bytes", "1.00 kB", "13.48 GB", "2.00 TB"]
