"""A small file is read whole, and nothing that is no regular file is waited for."""

import os
from pathlib import Path

import pytest

from tailor_fast._core.regular_file import read_regular


def test_regular_files_and_links_to_them(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "b").symlink_to("a")
    assert read_regular(tmp_path / "a", 5) == read_regular(tmp_path / "b") == b"12345"
    with pytest.raises(OSError, match="must have at most 4 bytes; got 5"):
        read_regular(tmp_path / "a", 4)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "c")


def test_pipes_devices_and_directories(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match=r"must be a regular file|Is a directory"):
            read_regular(path)
