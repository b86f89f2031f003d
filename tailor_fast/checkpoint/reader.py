"""Reading a checkpoint: headers at once, tensor bytes by ``preadv`` into buffers of the caller.

Nothing is mapped into memory: a file that shrinks, or a disk that fails, under a map kills the
process with a signal that no code can catch; under ``preadv`` it is an error with a sentence.
"""

import hashlib
import math
import os
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from tailor_fast.checkpoint.dtypes import torch_dtype
from tailor_fast.checkpoint.errors import (
    AnyPath,
    ChangedError,
    MalformedError,
    listed,
    quoted,
    shown_path,
)
from tailor_fast.checkpoint.files import Snapshot, open_input, read_exact, window
from tailor_fast.checkpoint.gate import Gate
from tailor_fast.checkpoint.header import (
    CHECKPOINT_LIMITS,
    PREFIX_BYTES,
    Header,
    Limits,
    header_length,
    parse_header,
)
from tailor_fast.checkpoint.hub import local_path
from tailor_fast.checkpoint.index import Source, locate
from tailor_fast.checkpoint.sidefiles import refuse_irregular, side_files

_ONE_REVISION = "fetch index and files again, from one revision"
_PREFIX_PROBE = 64  # enough to recognise what a file is that is not safetensors


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint.

    Attributes:
        name: as in the file.
        dtype: the format's name, e.g. ``BF16``.
        shape: sizes as in the header.
        shard: name of the file that holds it.
        offset: first byte in that file.
        nbytes: size in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The torch dtype; None when the tensor can only be passed through as bytes."""
        return torch_dtype(self.dtype)


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One weight file: its state when it was opened, and the digest of its header bytes."""

    file_name: str
    path: Path
    snapshot: Snapshot
    header_sha256: str
    metadata: Mapping[str, str]


class Checkpoint:
    """An open checkpoint; made by ``open_checkpoint``. Reads may come from several threads.

    Attributes:
        path: as given.
        directory: the directory of a directory checkpoint or an index; None for a lone file.
        tensors: by name, in the order of their bytes, file after file.
        shards: the files, sorted by name.
        warnings: legal but suspicious facts, a sentence each.
        settings, inherited, reading_bytes: nothing; see ``TensorSource``.
    """

    settings: tuple[Path, ...] = ()
    inherited: frozenset[str] = frozenset()
    reading_bytes = 0

    def __init__(self, path: Path, source: Source, *, drop_cache: bool, limits: Limits) -> None:
        """Open every file and read every header; see ``open_checkpoint``."""
        self.path = path
        lone = source.weight_map is None and not path.is_dir()
        self.directory = None if lone else source.directory
        if self.directory is not None:
            refuse_irregular(self.directory)
        self._drop_cache, self._limits, self._vouched = drop_cache, limits, False
        self._gate = Gate(path)
        self._files: dict[str, tuple[int, Path]] = {}
        tensors: dict[str, TensorInfo] = {}
        shards: list[ShardInfo] = []
        warnings = list(source.warnings)
        try:
            for name in source.shards:
                shard, header = self._open_shard(source.directory / name)
                shards.append(shard)
                warnings += header.warnings
                _collect(header, shard, tensors, limits)
            _check_distinct(shards)
            warnings += _check_index(path, source, tensors)
        except BaseException:
            self._release()
            raise
        self.tensors: Mapping[str, TensorInfo] = types.MappingProxyType(tensors)
        self.shards = tuple(shards)
        self.warnings = tuple(warnings)

    def _open_shard(self, path: Path) -> tuple[ShardInfo, Header]:
        fd = open_input(path)
        self._files[path.name] = fd, path
        snapshot = Snapshot.of(fd)
        prefix = bytearray(min(_PREFIX_PROBE, snapshot.size))
        read_exact(fd, memoryview(prefix), 0, path)
        length = header_length(bytes(prefix), snapshot.size, path)
        text = bytearray(length)
        read_exact(fd, memoryview(text), PREFIX_BYTES, path)
        header = parse_header(text, snapshot.size - PREFIX_BYTES - length, path, self._limits)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        digest = hashlib.sha256(prefix[:PREFIX_BYTES])
        digest.update(text)
        metadata = types.MappingProxyType(header.metadata)
        return ShardInfo(path.name, path, snapshot, digest.hexdigest(), metadata), header

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def side_files(self) -> tuple[Path, ...]:
        """Configuration, tokenizer, processor and the like, sorted; none of a lone file.

        Raises:
            MissingFileError: a link among them leads nowhere.
        """
        return () if self.directory is None else side_files(self.directory)

    @property
    def input_paths(self) -> tuple[Path, ...]:
        """Every place the checkpoint lives in: an output must not touch one of them."""
        places = [self.path, *(shard.path.resolve() for shard in self.shards)]
        return tuple(dict.fromkeys(places))

    @property
    def processor_directory(self) -> Path | None:
        """As ``directory``."""
        return self.directory

    def path_of(self, name: str) -> Path:
        """The file that holds tensor ``name``."""
        return next(s.path for s in self.shards if s.file_name == self.tensors[name].shard)

    def empty(self, name: str) -> torch.Tensor:
        """Return memory for tensor ``name``, not yet filled.

        Returns:
            Tensor of the stored shape and dtype. Where torch has no such dtype: uint8
            ``[nbytes]``.

        Raises:
            KeyError: no such tensor.
        """
        info = self.tensors[name]
        dtype = info.torch_dtype
        if dtype is None:
            return torch.empty(info.nbytes, dtype=torch.uint8)
        return torch.empty(info.shape, dtype=dtype)

    def read(self, name: str) -> torch.Tensor:
        """Return tensor ``name`` in memory of its own: ``empty``, filled.

        Raises:
            KeyError: no such tensor.
            TruncatedError, TransferError: see ``read_into``.
        """
        tensor = self.empty(name)
        self.read_into(name, tensor)
        return tensor

    def read_into(self, name: str, buffer: object, begin: int = 0, end: int | None = None) -> int:
        """Read the bytes ``[begin, end)`` of tensor ``name`` into the start of ``buffer``.

        Args:
            name: tensor.
            buffer: contiguous CPU tensor of any dtype, bytearray or writable memoryview.
            begin: first byte within the tensor.
            end: one past the last byte; None is the tensor's end.

        Returns:
            The bytes read, ``end - begin``.

        Raises:
            KeyError: no such tensor.
            TypeError, ValueError: buffer not usable or too small, range outside the tensor.
            TruncatedError: the file became shorter.
            TransferError: the system reports an error; the message has file and offset.
        """
        info = self.tensors[name]
        view, end = window(name, info.nbytes, buffer, begin, end)
        count, self._vouched = end - begin, False
        with self._gate:
            fd, path = self._files[info.shard]
            read_exact(fd, view, info.offset + begin, path, name)
            if self._drop_cache and count:
                os.posix_fadvise(fd, info.offset + begin, count, os.POSIX_FADV_DONTNEED)
        return count

    def check_unchanged(self) -> None:
        """Check that no file was changed since it was opened.

        Raises:
            ChangedError: size, time or identity of a file differ.
        """
        self._vouched = False
        with self._gate:
            for shard in self.shards:
                now = Snapshot.of(self._files[shard.file_name][0])
                if now != shard.snapshot:
                    problem = (
                        f"was changed while it was being read (size {shard.snapshot.size} to"
                        f" {now.size}, time {shard.snapshot.mtime_ns} to {now.mtime_ns})"
                    )
                    raise ChangedError(problem, path=shard.path, remedy="run again")
        self._vouched = True

    def close(self) -> None:
        """Close all files; ``check_unchanged`` first, unless nothing was read since it."""
        try:
            if self._files and not self._vouched:  # else an output may stand that was made of it
                self.check_unchanged()
        finally:
            self._release()

    def __enter__(self) -> "Checkpoint":
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        """Close; an exception on its way is not replaced by one about a changed file."""
        if kind is None:
            self.close()
        else:
            self._release()

    def _release(self) -> None:
        self._gate.shut()
        while self._files:
            os.close(self._files.popitem()[1][0])


def open_checkpoint(
    path: AnyPath, *, drop_cache: bool = False, limits: Limits = CHECKPOINT_LIMITS
) -> Checkpoint:
    """Open a checkpoint and check all its headers; no tensor is read.

    Args:
        path: a ``.safetensors`` file; a ``.safetensors.index.json``; a directory that holds
            ``model.safetensors`` or ``model.safetensors.index.json``; or a model's hub name, which
            ``local_path`` finds in the local cache.
        drop_cache: tell the system to forget what was read, for checkpoints that would push more
            useful files out of the page cache.
        limits: what its headers may hold.

    Raises:
        MissingFileError: nothing there, a shard is missing, no permission, no regular file.
        NotSafetensorsError: pickles, a git-lfs pointer, a web page.
        TruncatedError: a file is shorter than its header says.
        MalformedError: a header or index breaks a rule, or they contradict each other.
        UnsupportedDtypeError: a dtype that the format does not have.
        TransferError: the system failed to read.
    """
    path = local_path(path)
    return Checkpoint(path, locate(path), drop_cache=drop_cache, limits=limits)


def _collect(
    header: Header, shard: ShardInfo, tensors: dict[str, TensorInfo], limits: Limits
) -> None:
    if len(tensors) + len(header.entries) > limits.tensors:
        problem = f"a checkpoint must have at most {limits.tensors} tensors; got more"
        raise MalformedError(problem, path=shard.path, remedy="leave out what is not a weight")
    for entry in header.entries:
        if entry.name in tensors:
            other = tensors[entry.name].shard
            problem = f"must be in one file only; it is in {quoted(other)} too"
            raise MalformedError(problem, path=shard.path, tensor=entry.name, remedy=_ONE_REVISION)
        place = shard.file_name, header.data_begin + entry.begin, entry.end - entry.begin
        tensors[entry.name] = TensorInfo(entry.name, entry.dtype, entry.shape, *place)


def _check_distinct(shards: list[ShardInfo]) -> None:
    seen: dict[tuple[int, int], ShardInfo] = {}
    for shard in shards:
        first = seen.setdefault((shard.snapshot.device, shard.snapshot.inode), shard)
        if first is not shard:
            problem = f"must be a file of its own; it is the same as {quoted(first.file_name)}"
            raise MalformedError(problem, path=shard.path, remedy=_ONE_REVISION)


def _check_index(path: Path, source: Source, tensors: dict[str, TensorInfo]) -> list[str]:
    if source.weight_map is None:
        return []
    absent = [name for name in source.weight_map if name not in tensors]
    if absent:
        problem = f"must hold what the index names; {len(absent)} are in no file: {listed(absent)}"
        raise MalformedError(problem, path=path, remedy=_ONE_REVISION)
    extra = [name for name in tensors if name not in source.weight_map]
    if extra:
        problem = f"must hold only what the index names; got {len(extra)} more: {listed(extra)}"
        raise MalformedError(problem, path=path, remedy=_ONE_REVISION)
    for name, shard in source.weight_map.items():
        if tensors[name].shard != shard:
            other = quoted(tensors[name].shard)
            problem = f"must be in {quoted(shard)}, as the index says; it is in {other}"
            raise MalformedError(problem, path=path, tensor=name, remedy=_ONE_REVISION)
    total = sum(info.nbytes for info in tensors.values())
    if source.total_size is not None and source.total_size != total:
        return [
            f"{shown_path(path)}: the index says {source.total_size:.0f} bytes, the tensors have"
            f" {total}"
        ]
    return []
