"""The form of a patch file, version 1: what is stored of a tensor, the plan, the header.

A patch file is a safetensors file. A tensor that differs between BASE and TARGET is stored as the
three parts of ``tailor_fast.ops.codec.EncodedPatch``; the metadata hold the *plan*: every tensor of
the two checkpoints with its dtype, its shape and its digests. docs/patch-files.md specifies it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from tailor_fast._core.errors import UsageError
from tailor_fast.checkpoint import HashName, TensorSpec, byte_size, checkpoint_root
from tailor_fast.checkpoint.dtypes import item_bits
from tailor_fast.checkpoint.hashing import new_hash
from tailor_fast.checkpoint.header import (
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    METADATA_KEY,
    PREFIX_BYTES,
    Limits,
)
from tailor_fast.ops.codec.layout import block_count, mask_bytes

FORMAT = "tailor-patch/1"
PARTS = ("mask", "words", "blocks")
# Three parts of each tensor that a checkpoint may have, and a plan that leaves their names room in
# the 100 MB of a header.
LIMITS = Limits(len(PARTS) * MAX_TENSORS, 80_000_000)
_ALIGNMENT = 4096  # of the data, so that whole pages are written


@dataclass(frozen=True, slots=True)
class PatchEntry:
    """One tensor of the two checkpoints.

    Attributes:
        name: as in the checkpoints.
        dtype: the format's name, e.g. ``BF16``.
        shape: sizes.
        changed: how many words differ; 0 stores nothing.
        base: digest of the tensor in BASE.
        target: digest of the tensor in TARGET, equal to ``base`` where nothing differs.
        parts: digests of the stored mask, words and block counts; empty where nothing differs.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    changed: int
    base: str
    target: str
    parts: tuple[str, ...] = ()

    @property
    def word_bytes(self) -> int:
        """Bytes of one word: an element, or a byte where elements are smaller than that."""
        return max(item_bits(self.dtype) // 8, 1)

    @property
    def words(self) -> int:
        """Number of words of the tensor."""
        return byte_size(self.dtype, self.shape) // self.word_bytes

    @property
    def stored_bytes(self) -> int:
        """Bytes of the parts in the file."""
        if not self.changed:
            return 0
        return sum(byte_size(spec.dtype, spec.shape) for spec in self.part_specs(0))

    def part_specs(self, index: int) -> tuple[TensorSpec, ...]:
        """Name, dtype and shape of each part; ``index`` is the place of the entry in the plan."""
        forms = (
            ("U8", mask_bytes(self.words)),
            (f"U{8 * self.word_bytes}", self.changed),
            ("U32", block_count(self.words)),
        )
        return tuple(
            TensorSpec(part_name(index, part), dtype, (size,))
            for part, (dtype, size) in zip(PARTS, forms, strict=True)
        )


@dataclass(frozen=True, slots=True)
class PatchPlan:
    """What a patch file says of itself.

    Attributes:
        base_name: what BASE was called, without its place.
        target_name: what TARGET was called.
        digest: algorithm of all digests.
        entries: every tensor of the two checkpoints, by name.
    """

    base_name: str
    target_name: str
    digest: HashName
    entries: tuple[PatchEntry, ...] = field(repr=False)

    @property
    def stored(self) -> Iterator[tuple[int, PatchEntry]]:
        """The entries that are stored, with their places."""
        return ((at, entry) for at, entry in enumerate(self.entries) if entry.changed)

    @property
    def base_root(self) -> str:
        """Digest of the whole of BASE."""
        return checkpoint_root({entry.name: entry.base for entry in self.entries}, self.digest)

    @property
    def target_root(self) -> str:
        """Digest of the whole of TARGET."""
        return checkpoint_root({entry.name: entry.target for entry in self.entries}, self.digest)

    @property
    def changed(self) -> int:
        """Words that differ, of all tensors."""
        return sum(entry.changed for entry in self.entries)

    @property
    def words(self) -> int:
        """Words of all tensors."""
        return sum(entry.words for entry in self.entries)

    @property
    def file_bytes(self) -> int:
        """Size of the patch file."""
        return reserved_bytes(self) + sum(entry.stored_bytes for entry in self.entries)


def part_name(index: int, part: str) -> str:
    """Name of a part in the patch file: made of numbers, never of a tensor's name."""
    return f"p.{index:05}.{part}"


def text_digest(text: str, algorithm: HashName) -> str:
    """Digest of the plan's text."""
    hasher = new_hash(algorithm)
    hasher.update(memoryview(text.encode()))
    return hasher.hexdigest()


def header(plan: PatchPlan) -> bytes:
    """Return the first bytes of the patch file; ``reserved_bytes`` of them."""
    text = _header_text(plan, _metadata(plan))
    text += b" " * (reserved_bytes(plan) - PREFIX_BYTES - len(text))
    return len(text).to_bytes(PREFIX_BYTES, "little") + text


def reserved_bytes(plan: PatchPlan) -> int:
    """Return where the data begin.

    The data are written before it is known how many words differ, so the header has the room that
    it would take if every word did. The same two checkpoints give the same file.

    Raises:
        UsageError: more tensors than the header of a file can name.
    """
    blank = "0" * len(new_hash(plan.digest).hexdigest())
    longest = replace(plan, entries=tuple(_all_changed(entry, blank) for entry in plan.entries))
    metadata = _metadata(longest)
    size = PREFIX_BYTES + len(_header_text(longest, metadata))
    size += -size % _ALIGNMENT
    if size - PREFIX_BYTES > MAX_HEADER_BYTES:
        limit = f"a header of {MAX_HEADER_BYTES} bytes cannot name {len(plan.entries)} tensors"
        raise UsageError(f"{limit}; expected a checkpoint with fewer")
    if len(_json(metadata).encode()) > LIMITS.metadata_bytes:
        limit = f"metadata of {LIMITS.metadata_bytes} bytes cannot describe"
        raise UsageError(f"{limit} {len(plan.entries)} tensors; expected a checkpoint with fewer")
    return size


def _all_changed(entry: PatchEntry, blank: str) -> PatchEntry:
    words = entry.words
    parts = (blank,) * len(PARTS) if words else ()
    return replace(entry, changed=words, base=blank, target=blank, parts=parts)


def _header_text(plan: PatchPlan, metadata: Mapping[str, str]) -> bytes:
    members: dict[str, object] = {METADATA_KEY: metadata}
    cursor = 0
    for spec in stored_specs(plan):
        end = cursor + byte_size(spec.dtype, spec.shape)
        members[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [cursor, end],
        }
        cursor = end
    return _json(members).encode()


def _metadata(plan: PatchPlan) -> dict[str, str]:
    text = plan_text(plan)
    return {
        "format": "pt",  # loaders refuse a file without it
        "tailor_format": FORMAT,
        "digest": plan.digest,
        "plan": text,
        "plan_digest": text_digest(text, plan.digest),
    }


def stored_specs(plan: PatchPlan) -> Iterator[TensorSpec]:
    """Every part in the order of its bytes."""
    for index, entry in plan.stored:
        yield from entry.part_specs(index)


def plan_text(plan: PatchPlan) -> str:
    """The plan as it stands in the metadata: one plan has one text."""
    return _json(
        {
            "base": {"name": plan.base_name, "root": plan.base_root},
            "target": {"name": plan.target_name, "root": plan.target_root},
            "tensors": {entry.name: _entry_body(entry) for entry in plan.entries},
        }
    )


def _entry_body(entry: PatchEntry) -> Mapping[str, object]:
    body: dict[str, object] = {"dtype": entry.dtype, "shape": list(entry.shape), "base": entry.base}
    if entry.changed:
        body["target"] = entry.target
        body["changed"] = entry.changed
        body["parts"] = dict(zip(PARTS, entry.parts, strict=True))
    return body


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
