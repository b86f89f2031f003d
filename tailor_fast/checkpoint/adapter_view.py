"""A base model as a LoRA adapter changes it, tensor by tensor while it is read: never merged whole.

A tensor is made in blocks of whole rows on a fixed grid, ``W + scale · L R`` in fp32 rounded once
to the base's dtype, so that its words do not depend on the ranges in which they are asked for. Each
reading thread keeps the last block and the factors of the last tensor: what is read from front to
back is computed once.
"""

from __future__ import annotations

import re
import threading
import types
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch

from tailor_fast.checkpoint.dtypes import byte_size
from tailor_fast.checkpoint.files import byte_view, window
from tailor_fast.checkpoint.index import ADAPTER_CONFIG
from tailor_fast.checkpoint.reader import Checkpoint, ShardInfo, TensorInfo
from tailor_fast.checkpoint.sidefiles import side_files

# fp32 elements of a block: one of the ranges in which a pipeline reads 16-bit words, 2 MiB.
BLOCK_ELEMENTS = 1 << 19
# What an adapter's directory says of the merged model, and says better than the base's.
_OWN = re.compile(
    r"(added_tokens|chat_template|config|generation_config|merges|preprocessor_config"
    r"|processor_config|special_tokens_map|sentencepiece|spiece|tokenizer|video_preprocessor_config|vocab)\b.*"
    r"|tokenizer_config\.json"
)
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True, slots=True)
class LowRank:
    """``W + scale · up @ down``, its rows then scaled to the lengths ``magnitude``, if given.

    Attributes:
        down: name of ``A`` ``[rank, in]`` in the adapter.
        up: name of ``B`` ``[out, rank]``.
        scale: of the product.
        swapped: the tensor is stored ``[in, out]``.
        magnitude: name of the lengths ``[out]`` of a DoRA, or None.
        start: name in the adapter of what stands for ``W``, where the base's own does not.
    """

    down: str
    up: str
    scale: float
    swapped: bool
    magnitude: str | None
    start: str | None


@dataclass(frozen=True, slots=True)
class Shift:
    """``b + scale · step``: a bias of ``B``."""

    step: str
    scale: float


@dataclass(frozen=True, slots=True)
class Whole:
    """The tensor ``name`` of ``source`` itself, in the base's dtype."""

    source: Checkpoint
    name: str


Change = LowRank | Shift | Whole


@dataclass(frozen=True, slots=True)
class Changes:
    """What an adapter changes.

    Attributes:
        adapter: its file, open.
        rest: files of whole tensors beside it, open.
        made: tensor name in the base -> how its words are made.
        tensors: what those tensors are, in the merged model.
    """

    adapter: Checkpoint
    rest: tuple[Checkpoint, ...]
    made: Mapping[str, Change]
    tensors: Mapping[str, TensorInfo]


class _Scratch(threading.local):
    """What one thread has made last."""

    def __init__(self) -> None:
        self.block: tuple[str, int] | None = None
        self.words = memoryview(b"")
        self.tensor = ""
        self.factors: tuple[torch.Tensor, ...] = ()


@dataclass
class AdapterView:
    """A ``TensorSource``: the base model with an adapter merged into it.

    Args:
        path: the adapter's directory, as given.
        base: the base model; it must stay open, and is not closed with the view.
        changes: what the adapter changes; closed with the view.
    """

    path: Path
    base: Checkpoint
    changes: Changes
    tensors: Mapping[str, TensorInfo] = field(init=False)
    _scratch: _Scratch = field(init=False, default_factory=_Scratch)

    def __post_init__(self) -> None:
        tensors = {**self.base.tensors, **self.changes.tensors}
        self.tensors = types.MappingProxyType(tensors)

    @property
    def inherited(self) -> frozenset[str]:
        """Tensors that are the base model's own."""
        return frozenset(self.base.tensors.keys() - self.changes.made)

    @property
    def reading_bytes(self) -> int:
        """Memory of one reading thread: a block, its words, and fp32 factors of one tensor."""
        held, block = 0, 0
        for name, change in self.changes.made.items():
            block = max(block, min(BLOCK_ELEMENTS, self.tensors[name].numel))
            if isinstance(change, LowRank):
                pair = (self.changes.adapter.tensors[end] for end in (change.down, change.up))
                held = max(held, sum(4 * factor.numel for factor in pair))
        return 8 * block + held

    @property
    def directory(self) -> Path | None:
        """The adapter's directory when it has a ``config.json``, else the base model's."""
        return self.path if (self.path / "config.json").is_file() else self.base.directory

    @property
    def processor_directory(self) -> Path | None:
        """The adapter's directory when tokenizer and processor are there, else the base model's."""
        base = self.base.directory
        needed = [name for name in _PROCESSORS if base is not None and (base / name).is_file()]
        complete = all((self.path / name).is_file() for name in ("tokenizer_config.json", *needed))
        return self.path if complete else base

    @property
    def shards(self) -> tuple[ShardInfo, ...]:
        """The adapter's own weight files."""
        return tuple(shard for file in self._files for shard in file.shards)

    @property
    def side_files(self) -> tuple[Path, ...]:
        """The base model's, or those of the same names beside the adapter."""
        found = {path.name: path for path in self.base.side_files}
        found |= {path.name: path for path in side_files(self.path) if _OWN.fullmatch(path.name)}
        return tuple(found[name] for name in sorted(found))

    @property
    def settings(self) -> tuple[Path, ...]:
        """The adapter's configuration, which has its scale."""
        return (self.path / ADAPTER_CONFIG,)

    @property
    def input_paths(self) -> tuple[Path, ...]:
        """The adapter's places."""
        return (self.path, *(path for file in self._files for path in file.input_paths))

    @property
    def warnings(self) -> tuple[str, ...]:
        """Those of the adapter's files."""
        return tuple(warning for file in self._files for warning in file.warnings)

    @property
    def _files(self) -> tuple[Checkpoint, ...]:
        return self.changes.adapter, *self.changes.rest

    def path_of(self, name: str) -> Path:
        """The file of what changes tensor ``name``; the base model's where nothing does."""
        change = self.changes.made.get(name)
        if change is None:
            return self.base.path_of(name)
        source = change.source if isinstance(change, Whole) else self.changes.adapter
        return source.shards[0].path

    def empty(self, name: str) -> torch.Tensor:
        """See ``Checkpoint.empty``."""
        if name not in self.changes.made:
            return self.base.empty(name)
        info = self.tensors[name]
        dtype = info.torch_dtype
        if dtype is None:
            return torch.empty(info.nbytes, dtype=torch.uint8)
        return torch.empty(info.shape, dtype=dtype)

    def read(self, name: str) -> torch.Tensor:
        """See ``Checkpoint.read``."""
        tensor = self.empty(name)
        self.read_into(name, tensor)
        return tensor

    def read_into(self, name: str, buffer: object, begin: int = 0, end: int | None = None) -> int:
        """See ``Checkpoint.read_into``; the errors of base and adapter alike."""
        change = self.changes.made.get(name)
        if change is None:
            return self.base.read_into(name, buffer, begin, end)
        info = self.tensors[name]
        if isinstance(change, Whole) and change.source.tensors[change.name].dtype == info.dtype:
            return change.source.read_into(change.name, buffer, begin, end)
        view, end = window(name, info.nbytes, buffer, begin, end)
        step = _block_rows(info) * (info.nbytes // _rows(info)) if info.nbytes else 1
        at = begin
        while at < end:
            words = self._block(info, change, at // step)[at % step :][: end - at]
            view[at - begin :][: len(words)] = words
            at += len(words)
        return end - begin

    def check_unchanged(self) -> None:
        """Check the adapter's files; the base model's are its own."""
        for file in self._files:
            file.check_unchanged()

    def _block(self, info: TensorInfo, change: Change, index: int) -> memoryview:
        """Words of the block number ``index`` as bytes."""
        scratch = self._scratch
        if scratch.block != (info.name, index):
            scratch.block = None  # what fails half way must not look finished
            step = _block_rows(info)
            first, last = index * step, min(_rows(info), (index + 1) * step)
            work = self._made(info, change, first, last)
            dtype = info.torch_dtype
            scratch.words = byte_view(work.to(dtype).contiguous(), writable=False)
            scratch.block = info.name, index
        return scratch.words

    def _made(self, info: TensorInfo, change: Change, first: int, last: int) -> torch.Tensor:
        """Rows ``[first, last)`` in fp32, as a matrix."""
        if isinstance(change, Whole):
            return _read_rows(change.source, change.source.tensors[change.name], first, last)
        source, name = self.base, info.name
        if isinstance(change, LowRank) and change.start is not None:
            source, name = self.changes.adapter, change.start
        work = _read_rows(source, source.tensors[name], first, last)
        factors = self._factors(info.name, change)
        if isinstance(change, Shift):
            return work.add_(factors[0].view(-1, 1)[first:last], alpha=change.scale)
        left, right, *magnitude = factors
        work.addmm_(left[first:last], right, alpha=change.scale)
        for lengths in magnitude:
            norms = torch.linalg.vector_norm(work, dim=1)
            work.mul_((lengths.view(-1)[first:last] / norms).unsqueeze(1))
        return work

    def _factors(self, name: str, change: LowRank | Shift) -> tuple[torch.Tensor, ...]:
        """What the adapter has for a tensor, in fp32: once for all of its blocks."""
        scratch = self._scratch
        if scratch.tensor != name:
            scratch.tensor, scratch.factors = "", ()
            read = self.changes.adapter.read
            if isinstance(change, Shift):
                scratch.factors = (read(change.step).float(),)
            else:
                down, up = read(change.down).float(), read(change.up).float()
                pair = (down.T.contiguous(), up.T.contiguous()) if change.swapped else (up, down)
                lengths = () if change.magnitude is None else (read(change.magnitude).float(),)
                scratch.factors = (*pair, *lengths)
            scratch.tensor = name
        return scratch.factors

    def close(self) -> None:
        """Close the adapter's files; raises ``ChangedError`` when one was changed."""
        with ExitStack() as stack:
            for file in self._files:
                stack.callback(file.close)

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        """Close as ``Checkpoint`` does."""
        for file in self._files:
            file.__exit__(kind, error, trace)


def merged_info(base: TensorInfo, shape: tuple[int, ...]) -> TensorInfo:
    """What a tensor of the base model is when it has been replaced by one of ``shape``."""
    nbytes = byte_size(base.dtype, shape)
    return TensorInfo(base.name, base.dtype, shape, base.shard, base.offset, nbytes)


def _rows(info: TensorInfo) -> int:
    return info.shape[0] if info.shape else 1


def _block_rows(info: TensorInfo) -> int:
    return max(1, BLOCK_ELEMENTS * _rows(info) // info.numel)


def _read_rows(source: Checkpoint, info: TensorInfo, first: int, last: int) -> torch.Tensor:
    """Rows as an fp32 matrix; a vector's elements are rows."""
    cols = info.numel // _rows(info)
    words = torch.empty(last - first, cols, dtype=info.torch_dtype)
    row_bytes = info.nbytes // _rows(info)
    source.read_into(info.name, words, first * row_bytes, last * row_bytes)
    return words.float()
