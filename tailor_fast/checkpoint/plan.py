"""The layout of an output, from headers alone: every file, offset and size before a byte is read.

The data of each file start at a multiple of 4096 (spaces fill the header), so that whole pages can
be written; tensors of larger elements come first, so that every tensor is aligned to its element.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tailor_fast.checkpoint.dtypes import DTYPES, byte_size, item_bits
from tailor_fast.checkpoint.errors import quoted
from tailor_fast.checkpoint.header import (
    MAX_HEADER_BYTES,
    MAX_METADATA_BYTES,
    MAX_TENSORS,
    METADATA_KEY,
    PREFIX_BYTES,
)
from tailor_fast.checkpoint.index import SINGLE_NAME, SUFFIX
from tailor_fast.checkpoint.reader import TensorInfo

DEFAULT_SHARD_BYTES = 5 * 10**9
_DATA_ALIGNMENT = 4096
_FORMAT = {"format": "pt"}  # loaders refuse a file without it


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What an output tensor is: name, the format's dtype name, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an output tensor goes: file number, first byte in that file, size in bytes."""

    dtype: str
    shape: tuple[int, ...]
    shard: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One output file.

    Attributes:
        file_name: bare name.
        header: its first bytes, length and padding included.
        size: of the whole file.
        tensors: names in the order of their bytes.
    """

    file_name: str
    header: bytes
    size: int
    tensors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """All output files.

    Attributes:
        shards: the files, in order.
        tensors: where each tensor goes, in the order given.
        total_size: bytes of all tensors.
        index: bytes of the index file; None for a single file.
    """

    shards: tuple[ShardPlan, ...]
    tensors: Mapping[str, Placement]
    total_size: int
    index: bytes | None

    @property
    def file_bytes(self) -> int:
        """Bytes of all files, headers and index included."""
        return sum(shard.size for shard in self.shards) + len(self.index or b"")


def plan_layout(
    specs: Iterable[TensorSpec | TensorInfo],
    *,
    max_shard_bytes: int | None = DEFAULT_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
    index_metadata: Mapping[str, str] | None = None,
) -> Layout:
    """Lay out an output checkpoint.

    Files are filled in the order given; a tensor larger than the limit has a file to itself.

    Args:
        specs: the tensors.
        max_shard_bytes: most tensor bytes per file; None puts all into one.
        metadata: added to the ``__metadata__`` of every file, beside ``format: pt``.
        index_metadata: added to the ``metadata`` of the index, beside ``total_size``.

    Raises:
        ValueError: a name twice or reserved, an unknown dtype, a limit below one byte, a header
            that no reader would accept.
    """
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise ValueError(f"plan_layout: max_shard_bytes must be at least 1; got {max_shard_bytes}")
    sizes = _sizes(specs)
    groups = _groups(sizes, max_shard_bytes)
    tensors: dict[str, Placement] = {}
    shards = []
    for number, group in enumerate(groups):
        file_name = SINGLE_NAME
        if len(groups) > 1:
            file_name = f"model-{number + 1:05}-of-{len(groups):05}{SUFFIX}"
        # the sort is stable: within one element size the given order stays
        ordered = sorted(group, key=lambda spec: -item_bits(spec.dtype))
        header, begins = _header(ordered, sizes, {**_FORMAT, **(metadata or {})})
        end = len(header)
        for spec in ordered:
            offset, nbytes = len(header) + begins[spec.name], sizes[spec]
            tensors[spec.name] = Placement(spec.dtype, spec.shape, number, offset, nbytes)
            end = offset + nbytes
        shards.append(ShardPlan(file_name, header, end, tuple(spec.name for spec in ordered)))
    total = sum(sizes.values())
    index = _index(shards, total, index_metadata or {}) if len(groups) > 1 else None
    return Layout(tuple(shards), {spec.name: tensors[spec.name] for spec in sizes}, total, index)


def _sizes(specs: Iterable[TensorSpec | TensorInfo]) -> dict[TensorSpec, int]:
    sizes: dict[TensorSpec, int] = {}
    names = set[str]()
    for given in specs:
        spec = TensorSpec(given.name, given.dtype, tuple(given.shape))
        if not spec.name or spec.name == METADATA_KEY or spec.name in names:
            what = "used twice" if spec.name in names else "reserved"
            raise ValueError(f"plan_layout: tensor name {quoted(spec.name)} is {what}")
        if spec.dtype not in DTYPES:
            raise ValueError(
                f"plan_layout: dtype of {quoted(spec.name)} must be one of {', '.join(DTYPES)};"
                f" got {quoted(spec.dtype)}"
            )
        names.add(spec.name)
        sizes[spec] = byte_size(spec.dtype, spec.shape)
    return sizes


def _groups(sizes: Mapping[TensorSpec, int], limit: int | None) -> list[list[TensorSpec]]:
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec, nbytes in sizes.items():
        over = limit is not None and filled + nbytes > limit
        if groups[-1] and (over or len(groups[-1]) == MAX_TENSORS):
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += nbytes
    return groups


def _header(
    specs: Sequence[TensorSpec], sizes: Mapping[TensorSpec, int], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    members: dict[str, object] = {METADATA_KEY: dict(metadata)}
    nbytes = len(json.dumps(metadata, ensure_ascii=False).encode())
    if nbytes > MAX_METADATA_BYTES:
        limit = f"metadata may have {MAX_METADATA_BYTES} bytes, these have {nbytes}"
        raise ValueError(f"plan_layout: {limit}. Hint: leave something out")
    begins: dict[str, int] = {}
    cursor = 0
    for spec in specs:
        begins[spec.name] = cursor
        end = cursor + sizes[spec]
        members[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [cursor, end],
        }
        cursor = end
    text = json.dumps(members, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(PREFIX_BYTES + len(text)) % _DATA_ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        limit = f"a header may have {MAX_HEADER_BYTES} bytes, this one has {len(text)}"
        raise ValueError(f"plan_layout: {limit}. Hint: a smaller max_shard_bytes")
    return len(text).to_bytes(PREFIX_BYTES, "little") + text, begins


def _index(shards: Sequence[ShardPlan], total: int, metadata: Mapping[str, str]) -> bytes:
    weight_map = {name: shard.file_name for shard in shards for name in shard.tensors}
    index = {
        "metadata": {**metadata, "total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(index, ensure_ascii=False, indent=2) + "\n").encode()
