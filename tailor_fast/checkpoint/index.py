"""Where the weights of a checkpoint are: one file, or the shards that an index names.

Exactly one source is accepted. Names out of an index are bare file names and are opened relative to
the directory, so that no index can reach out of it; symbolic links are followed, because a Hugging
Face cache consists of them.
"""

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tailor_fast.checkpoint.errors import (
    AnyPath,
    MalformedError,
    MissingFileError,
    NotSafetensorsError,
    listed,
    quoted,
    shown_path,
)
from tailor_fast.checkpoint.files import input_error, list_names, open_input, read_exact
from tailor_fast.checkpoint.foreign import CONVERT
from tailor_fast.checkpoint.header import MAX_TENSORS, folded
from tailor_fast.checkpoint.strict_json import JsonError, Scanner

SUFFIX = ".safetensors"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
INDEX_SUFFIX = ".safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_MAX_INDEX_BYTES = 64 * 2**20
_UNSAFE = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|]')  # a separator or a drive on any system
_AGAIN = "fetch the index again, from the same revision as the files"


@dataclass(frozen=True, slots=True)
class Source:
    """The weight files of a checkpoint.

    Attributes:
        directory: where they lie.
        shards: file names, sorted.
        weight_map: tensor name to file name; None for a single file.
        total_size: what the index claims, or None.
        warnings: a sentence each.
    """

    directory: Path
    shards: tuple[str, ...]
    weight_map: Mapping[str, str] | None = None
    total_size: float | None = None
    warnings: tuple[str, ...] = ()


def locate(path: Path) -> Source:
    """Find the weights of ``path``: a .safetensors file, an index, or a directory with one of them.

    Raises:
        MissingFileError: nothing there, or a shard of the index is missing.
        NotSafetensorsError: only pickles are there.
        MalformedError: two sources, or an index that breaks a rule.
    """
    try:
        is_directory = stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        raise input_error(error, path) from error
    if is_directory:
        return _in_directory(path, list_names(path))
    if path.name.endswith(INDEX_SUFFIX):
        return _read_index(path.parent, path.name)
    if path.suffix in PICKLES:
        problem = "is a pickle, which may run code when loaded"
        raise NotSafetensorsError(problem, path=path, remedy=CONVERT)
    return Source(path.parent, (path.name,))


def _in_directory(directory: Path, names: list[str]) -> Source:
    sources = [name for name in (SINGLE_NAME, INDEX_NAME) if name in names]
    if len(sources) == 2:
        problem = f"must hold one of {SINGLE_NAME} and {INDEX_NAME}; it holds both"
        remedy = "remove the stale one, or give the file itself"
        raise MalformedError(problem, path=directory, remedy=remedy)
    if not sources:
        _refuse_directory(directory, names)
    source = (
        Source(directory, (SINGLE_NAME,))
        if sources[0] == SINGLE_NAME
        else _read_index(directory, INDEX_NAME)
    )
    stray = [name for name in names if name.endswith(SUFFIX) and name not in source.shards]
    if not stray:
        return source
    warning = f"{shown_path(directory)}: not part of the checkpoint and not read: {listed(stray)}"
    return Source(
        directory,
        source.shards,
        source.weight_map,
        source.total_size,
        (*source.warnings, warning),
    )


def _refuse_directory(directory: Path, names: list[str]) -> None:
    others = [name for name in names if name.endswith((SUFFIX, INDEX_SUFFIX))]
    problem = f"must hold {SINGLE_NAME} or {INDEX_NAME}"
    if ADAPTER_CONFIG in names:
        remedy = "give it as TUNED, and the model that it was trained on as BASE"
        raise MissingFileError(f"{problem}; it is a PEFT adapter", path=directory, remedy=remedy)
    if others:
        remedy = "give the file itself"
        raise MissingFileError(f"{problem}; got {listed(others)}", path=directory, remedy=remedy)
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        problem = f"holds only pickles, which may run code when loaded: {listed(pickles)}"
        raise NotSafetensorsError(problem, path=directory, remedy=CONVERT)
    remedy = "check the path"
    raise MissingFileError(f"{problem}; it holds neither", path=directory, remedy=remedy)


def _read_index(directory: Path, name: str) -> Source:
    path = directory / name
    fd = open_input(path)
    try:
        size = os.fstat(fd).st_size
        if size > _MAX_INDEX_BYTES:
            problem = f"index must be at most {_MAX_INDEX_BYTES} bytes; got {size}"
            raise MalformedError(problem, path=path, remedy=_AGAIN)
        raw = bytearray(size)
        read_exact(fd, memoryview(raw), 0, path)
    finally:
        os.close(fd)
    try:
        weight_map, total_size = _parse_index(raw)
    except JsonError as error:
        problem = f"must be a valid index: {error}"
        raise MalformedError(problem, path=path, remedy=_AGAIN) from None
    shards = tuple(sorted(set(weight_map.values())))
    _check_shards(directory, path, shards)
    return Source(directory, shards, weight_map, total_size)


def _parse_index(text: bytearray) -> tuple[dict[str, str], float | None]:
    scanner = Scanner(text)
    weight_map: dict[str, str] = {}
    total = b""
    for key in scanner.members():
        if key == "weight_map":
            weight_map = _parse_map(scanner)
        elif key == "metadata" and scanner.peek() == "{":
            for field in scanner.members():
                value = scanner.skip()
                total = value if field == "total_size" else total
        else:
            scanner.skip()
    scanner.end()
    if not weight_map:
        raise JsonError("expected a weight_map from tensors to files, found none or an empty one")
    try:  # int, float and string all occur
        return weight_map, float(total.strip(b'"'))
    except ValueError:
        return weight_map, None


def _parse_map(scanner: Scanner) -> dict[str, str]:
    weight_map: dict[str, str] = {}
    files: dict[str, str] = {}  # one string per file instead of one per tensor
    for tensor in scanner.members():
        shard = scanner.string()
        weight_map[tensor] = files.setdefault(shard, shard)
        if len(weight_map) > MAX_TENSORS:
            raise JsonError(f"expected at most {MAX_TENSORS} tensors in weight_map, found more")
    return weight_map


def _check_shards(directory: Path, index: AnyPath, shards: tuple[str, ...]) -> None:
    seen: dict[str, str] = {}
    for shard in shards:
        if shard.endswith(PICKLES):
            problem = f"must name safetensors files; got the pickle {quoted(shard)}"
            raise NotSafetensorsError(problem, path=index, remedy=CONVERT)
        if _UNSAFE.search(shard) or not shard.endswith(SUFFIX) or shard == SUFFIX:
            problem = f"a file name must be bare and end in {SUFFIX}; got {quoted(shard)}"
            raise MalformedError(problem, path=index, remedy=_AGAIN)
        first = seen.setdefault(folded(shard), shard)
        if first != shard:
            problem = (
                f"file names must differ; {quoted(first)} and {quoted(shard)} differ only in case"
            )
            raise MalformedError(problem, path=index, remedy=_AGAIN)
    missing = [shard for shard in shards if not os.path.lexists(directory / shard)]
    if missing:
        problem = f"names {len(shards)} files, of which {len(missing)} are missing"
        remedy = "fetch the missing files"
        raise MissingFileError(f"{problem}: {listed(missing)}", path=index, remedy=remedy)
