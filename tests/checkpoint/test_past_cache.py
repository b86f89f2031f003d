"""Whole pages from aligned memory go past the page cache; the file is the same in every case."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from typing import Any

import pytest

from tailor_fast.checkpoint import DiskFullError, StagedCheckpoint, TensorSpec, plan_layout
from tailor_fast.checkpoint import shardfile as module

PAGE = 4096
SIZES = {"whole": 4 * PAGE, "ragged": 2 * PAGE + 100, "behind": 3 * PAGE}


def buffers() -> dict[str, memoryview]:
    """Random bytes in memory that starts at a page."""
    found = {}
    for name, size in SIZES.items():
        found[name] = memoryview(mmap.mmap(-1, size))[:size]
        found[name][:] = os.urandom(size)
    return found


def write(folder: Path, data: dict[str, memoryview]) -> bytes:
    """Write and commit; returns the tensors' part of the file."""
    layout = plan_layout(TensorSpec(name, "U8", (size,)) for name, size in SIZES.items())
    with StagedCheckpoint(folder / "out", layout) as staged:
        for name, view in data.items():
            staged.write(name, 0, view)
        staged.commit()
    return (folder / "out" / "model.safetensors").read_bytes()[len(layout.shards[0].header) :]


@pytest.fixture
def direct(monkeypatch: Any) -> list[tuple[int, int]]:
    """(offset, bytes) of every write past the cache."""
    seen = []
    past = module._PastCache.write

    def noted(self: Any, view: memoryview, offset: int) -> int:
        count = past(self, view, offset)
        if count:
            seen.append((offset, count))
        return count

    monkeypatch.setattr(module._PastCache, "write", noted)
    return seen


def test_whole_pages_go_past_the_cache(tmp_path: Path, direct: list[tuple[int, int]]) -> None:
    data = buffers()
    assert write(tmp_path, data) == b"".join(data.values())
    if not direct:
        pytest.skip("the file system of the temporary directory has no direct I/O")
    # ``behind`` starts inside the page in which ``ragged`` ends: that page belongs to the cache.
    assert direct == [(PAGE, 4 * PAGE), (5 * PAGE, 2 * PAGE)]


def test_memory_that_is_not_aligned_goes_through_the_cache(
    tmp_path: Path, direct: list[tuple[int, int]]
) -> None:
    data = {name: memoryview(bytearray(b"x" + view))[1:] for name, view in buffers().items()}
    if any(module._address(view) % PAGE == 0 for view in data.values()):
        pytest.skip("the allocator happened to align it")
    assert write(tmp_path, data) == b"".join(data.values())
    assert direct == []


def test_a_file_system_without_direct_writes_is_written_through_the_cache(
    tmp_path: Path, direct: list[tuple[int, int]], monkeypatch: Any
) -> None:
    opened = os.open

    def refuse(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    data = buffers()
    assert write(tmp_path, data) == b"".join(data.values())
    assert direct == []


def test_larger_pages_than_ours_are_written_through_the_cache(
    tmp_path: Path, direct: list[tuple[int, int]], monkeypatch: Any
) -> None:
    pwrite = os.pwrite
    refused = []

    def refuse(fd: int, view: Any, offset: int) -> int:
        if is_direct(fd):
            refused.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(fd, view, offset)

    monkeypatch.setattr(os, "pwrite", refuse)
    data = buffers()
    assert write(tmp_path, data) == b"".join(data.values())
    assert direct == []
    assert len(refused) <= 1  # not asked again


def is_direct(fd: int) -> bool:
    text = Path(f"/proc/self/fdinfo/{fd}").read_text()
    flags = next(line for line in text.splitlines() if line.startswith("flags:"))
    return bool(int(flags.split()[1], 8) & os.O_DIRECT)


def test_a_full_disk_is_told_from_a_refusal(tmp_path: Path, monkeypatch: Any) -> None:
    pwrite = os.pwrite

    def full(fd: int, view: Any, offset: int) -> int:
        if len(view) >= PAGE and offset >= PAGE:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(fd, view, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DiskFullError, match="the disk is full while writing 16384 bytes"):
        write(tmp_path, buffers())
