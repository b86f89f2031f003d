"""``Held``: several openings of a checkpoint, one reading."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tailor_fast.checkpoint import Hashed, Held, TruncatedError
from tests.checkpoint.reading import ReadBytes

TENSORS = {
    "a": torch.arange(3000, dtype=torch.float32).reshape(30, 100),
    "b": torch.tensor([1, 2, 3], dtype=torch.int8),
    "empty": torch.zeros(0, 4, dtype=torch.bfloat16),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> ReadBytes:
    return ReadBytes(monkeypatch)


def test_every_byte_is_read_once(path: Path, read: ReadBytes) -> None:
    held = Held()
    for _ in range(3):
        with held.open(path) as checkpoint:
            assert held.keep()
            for name, tensor in TENSORS.items():
                assert torch.equal(checkpoint.read(name), tensor)
    assert read.of(path) == held.size == held.kept_bytes == 12003


def test_parts_in_any_order(path: Path, read: ReadBytes) -> None:
    words = TENSORS["a"].numpy().tobytes()
    held = Held()
    with held.open(path) as checkpoint:
        held.keep()
        for begin, end in [(8000, 9000), (0, 10), (8999, 9001), (5, 5), (0, 12000)]:
            buffer = bytearray(end - begin + 3)
            assert checkpoint.read_into("a", buffer, begin, end) == end - begin
            assert buffer == words[begin:end] + bytes(3)
        assert read.of(path) == 12000
        with pytest.raises(ValueError, match=r"range must lie in \[0, 12000\] of 'a'"):
            checkpoint.read_into("a", bytearray(8), 12000, 12001)


def test_threads_that_want_the_same_words(path: Path, read: ReadBytes) -> None:
    held, found = Held(), []
    with held.open(path) as checkpoint:
        held.keep()
        begin = threading.Barrier(8)

        def work() -> None:
            begin.wait()
            found.append(checkpoint.read("a"))

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 8
    assert all(torch.equal(tensor, TENSORS["a"]) for tensor in found)
    assert read.of(path) == 12000


def test_nothing_is_kept_without_being_asked(path: Path, read: ReadBytes) -> None:
    held = Held()
    for _ in range(2):
        with held.open(path) as checkpoint:
            checkpoint.read("a")
    assert (read.of(path), held.kept_bytes) == (24000, 0)
    with held.open(path) as checkpoint:
        held.keep()
        tensor = checkpoint.read("a")
        tensor.zero_()  # the caller's own
        held.drop()
        assert torch.equal(checkpoint.read("a"), TENSORS["a"])
    assert (read.of(path), held.kept_bytes, held.digests) == (48000, 0, {})


def test_digests_are_made_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held()
    with held.open(path) as checkpoint:
        held.keep()
        root = Hashed(checkpoint, digests=held.digests).root(bytearray(64))

    def refused(*_: object) -> None:
        raise AssertionError("hashed again")

    monkeypatch.setattr("tailor_fast.checkpoint.hashed.TensorHasher", refused)
    with held.open(path) as checkpoint:
        assert Hashed(checkpoint, digests=held.digests).root(bytearray(64)) == root
        with pytest.raises(AssertionError, match="hashed again"):
            Hashed(checkpoint).root(bytearray(64))


@pytest.mark.parametrize("how", ["written over", "replaced", "touched"])
def test_files_that_have_changed_are_read_anew(how: str, path: Path) -> None:
    held = Held()
    with held.open(path) as checkpoint:
        held.keep()
        Hashed(checkpoint, digests=held.digests).finish(bytearray(64))
    tensors = {name: tensor + 1 for name, tensor in TENSORS.items()}
    if how == "touched":
        tensors = TENSORS
        os.utime(path, ns=(1, 1))
    elif how == "replaced":
        save_file(tensors, path.with_name("new"))
        status = path.stat()
        os.utime(path.with_name("new"), ns=(status.st_atime_ns, status.st_mtime_ns))
        path.with_name("new").replace(path)
    else:
        save_file(tensors, path)
        os.utime(path, ns=(2, 2))
    with held.open(path) as checkpoint:
        assert (held.kept_bytes, held.digests) == (0, {})
        held.keep()
        for name, tensor in tensors.items():
            assert torch.equal(checkpoint.read(name), tensor)


def test_a_failed_reading_is_not_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held()
    with held.open(path) as checkpoint:
        held.keep()

        def cut_off(*_: object) -> None:
            raise TruncatedError("ends early", path=path)

        with monkeypatch.context() as patch:
            patch.setattr("tailor_fast.checkpoint.reader.read_exact", cut_off)
            with pytest.raises(TruncatedError):
                checkpoint.read("a")
        assert torch.equal(checkpoint.read("a"), TENSORS["a"])


def test_memory_that_is_not_given(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    held = Held()
    with held.open(path) as checkpoint:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", refused)
            assert not held.keep()
        assert held.kept_bytes == 0
        assert torch.equal(checkpoint.read("a"), TENSORS["a"])
