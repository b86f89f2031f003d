"""Files that change between the look at their size and the read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tailor_fast.checkpoint import TruncatedError, open_checkpoint
from tests.checkpoint.files import U8_PAIR, raw_file, write_index

GOOD = raw_file({"a": U8_PAIR}, b"12")


def shrinks(monkeypatch: pytest.MonkeyPatch, path: Path, size: int) -> None:
    """``path`` is cut to ``size`` bytes once it is known to be a file, and how long it is."""
    fstat, inode, looks = os.fstat, path.stat().st_ino, []

    def ask(fd: int) -> os.stat_result:
        status = fstat(fd)
        if status.st_ino == inode:
            looks.append(status)
            if len(looks) == 2:
                os.truncate(path, size)
        return status

    monkeypatch.setattr(os, "fstat", ask)


@pytest.mark.parametrize("size", [0, 5, 8, 20, len(GOOD) - 3])
def test_header_cut_after_the_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(GOOD)
    shrinks(monkeypatch, path, size)
    with pytest.raises(TruncatedError, match="ends at byte") as caught:
        open_checkpoint(path)
    assert str(caught.value).endswith("; do not change inputs while they are read")
    assert caught.value.exit_code == 65


@pytest.mark.parametrize("size", [0, 30])
def test_index_cut_after_the_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    (tmp_path / "a.safetensors").write_bytes(GOOD)
    write_index(tmp_path, {"a": "a.safetensors"})
    shrinks(monkeypatch, tmp_path / "model.safetensors.index.json", size)
    with pytest.raises(TruncatedError, match=rf"ends at byte {size}, \d+ bytes were still"):
        open_checkpoint(tmp_path)
