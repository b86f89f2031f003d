"""The format's own library as the judge of any bytes: what it refuses must be refused here too."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, deserialize, safe_open

from tailor_fast.checkpoint import CheckpointError, MalformedError, open_checkpoint
from tailor_fast.checkpoint.index import INDEX_NAME, locate

# What the library lets pass and this reader does not, by the sentence that says so.
STRICTER = re.compile(
    r"expected every name once"
    r"|expected dtype, shape, data_offsets only"
    r"|expected '\{' at byte \d+, found '(\[|null)"  # an entry as a list, metadata null
    r"|name must be 1 to 1024 bytes"
    r"|sizes must be at most 2\*\*48"
    r"|rank must be at most 64"
    r"|string of at most 8192 bytes"
)
BOTH, NEITHER, STRICTER_HERE = "both accept", "both refuse", "refused here only"

Tensors = dict[str, tuple[str, list[int], bytes]]


@contextmanager
def memory_file() -> Iterator[Path]:
    """Path of a file that is on no disk: ten thousand rewrites of one cost nothing."""
    descriptor = os.memfd_create("judged")
    try:
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def judge_file(blob: bytes, path: Path) -> str:
    """Read ``blob`` as a lone file with both readers and compare.

    Returns:
        Who accepts it.

    Raises:
        AssertionError: only the library refuses it, both read different things, or it is refused
            here for a reason that the format does not have.
    """
    path.write_bytes(blob)
    theirs = _library(blob)
    refused, ours, metadata = _here(path)
    if refused is not None:
        assert theirs is None or STRICTER.search(refused), f"refused, {refused}: {blob!r}"
        return NEITHER if theirs is None else STRICTER_HERE
    assert theirs is not None, f"accepted although the library refuses it: {blob!r}"
    assert ours == theirs, f"read differently: {blob!r}"
    with safe_open(path, "numpy") as file:
        assert metadata == (file.metadata() or {}), f"metadata read differently: {blob!r}"
    return BOTH


def judge_index(blob: bytes, directory: Path) -> str:
    """Read ``blob`` as an index; what is accepted must be what ``json`` reads, and stay inside.

    Returns:
        Who accepts it.

    Raises:
        AssertionError: the index is not JSON, or says something else to ``json``.
    """
    (directory / INDEX_NAME).write_bytes(blob)  # through the link, if it is one
    try:
        source = locate(directory)
    except CheckpointError as error:
        _check_sentence(error, directory)
        return NEITHER
    body = json.loads(blob.decode("utf-8", "strict"))
    assert source.weight_map == body["weight_map"], f"read differently: {blob!r}"
    assert {Path(shard).name for shard in source.shards} == set(body["weight_map"].values())
    return BOTH


def _library(blob: bytes) -> Tensors | None:
    try:
        found = deserialize(blob)
    except SafetensorError:
        return None
    except BaseException as error:  # a panic of the library is a refusal too
        if type(error).__name__ != "PanicException":
            raise
        return None
    return {name: (info["dtype"], info["shape"], bytes(info["data"])) for name, info in found}


def _here(path: Path) -> tuple[str | None, Tensors, dict[str, str]]:
    """Return the sentence of the refusal or None, tensors and metadata."""
    tensors: Tensors = {}
    try:
        with open_checkpoint(path) as checkpoint:
            for name, info in checkpoint.tensors.items():
                data = bytearray(info.nbytes)
                checkpoint.read_into(name, data)
                tensors[name] = info.dtype, list(info.shape), bytes(data)
            return None, tensors, dict(checkpoint.shards[0].metadata)
    except CheckpointError as error:
        _check_sentence(error, path)
        return str(error), {}, {}


def _check_sentence(error: CheckpointError, path: Path) -> None:
    text = str(error)
    assert error.exit_code == 65
    assert text.startswith(str(path))
    assert "\n" not in text
    assert len(text) < 800
    assert error.remedy
    assert text.endswith(error.remedy)
    if isinstance(error, MalformedError):
        assert re.search(r"must|expected", text), text
        assert re.search(r"got|found|it is|starts with|differ only", text), text
