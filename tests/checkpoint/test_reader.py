"""Reading: the bytes that the format's library reads, and a sentence for everything that fails."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tailor_fast._core.errors import StorageError
from tailor_fast.checkpoint import (
    DTYPES,
    ChangedError,
    MissingFileError,
    TransferError,
    TruncatedError,
    open_checkpoint,
    torch_dtype,
)
from tests.checkpoint.files import raw_file, run_python, some_tensors

KNOWN = [name for name in DTYPES if torch_dtype(name) is not None]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_tensor(dtype: torch.dtype, shape: list[int], seed: int) -> torch.Tensor:
    """Random bits: NaN payloads, negative zeros and subnormals among them."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    return (raw & 1 if dtype == torch.bool else raw).view(dtype).reshape(shape)


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.fixture
def single(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(some_tensors(), path, metadata={"format": "pt"})
    return path


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=9),
        st.tuples(st.sampled_from(KNOWN), st.lists(st.integers(0, 5), max_size=3)),
        max_size=7,
    ),
    st.integers(0, 2**32),
)
@settings(max_examples=80)
def test_every_bit_the_library_wrote(spec: dict[str, tuple[str, list[int]]], seed: int) -> None:
    spec.pop("__metadata__", None)
    tensors = {
        name: random_tensor(torch_dtype(dtype), shape, seed)
        for name, (dtype, shape) in spec.items()
    }
    with TemporaryDirectory() as directory:
        path = Path(directory) / "m.safetensors"
        save_file(tensors, path)
        with open_checkpoint(path) as checkpoint:
            assert set(checkpoint.tensors) == set(tensors)
            for name, expected in tensors.items():
                tensor = checkpoint.read(name)
                assert tensor.shape == expected.shape
                assert tensor.dtype == expected.dtype
                assert bits(tensor) == bits(expected)


def test_own_memory_and_file_order(single: Path) -> None:
    expected = load_file(single)
    with open_checkpoint(single) as checkpoint:
        assert checkpoint.directory is None
        assert checkpoint.side_files == ()
        offsets = [info.offset for info in checkpoint.tensors.values()]
        assert offsets == sorted(offsets)
        checkpoint.read("layer.bias").zero_()
        assert torch.equal(checkpoint.read("layer.bias"), expected["layer.bias"])
        info = checkpoint.tensors["layer.weight"]
        assert (info.dtype, info.shape, info.numel, info.nbytes) == ("BF16", (6, 5), 30, 60)
        assert info.torch_dtype == torch.bfloat16
        (shard,) = checkpoint.shards
        assert shard.metadata == {"format": "pt"}
        assert shard.snapshot.size == single.stat().st_size


def test_bytes_of_a_dtype_that_torch_lacks(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    header = {"a": {"dtype": "F6_E2M3", "shape": [2, 4], "data_offsets": [0, 6]}}
    path.write_bytes(raw_file(header, b"\0\1\2\3\4\xff"))
    with open_checkpoint(path) as checkpoint:
        tensor = checkpoint.read("a")
        assert (checkpoint.tensors["a"].numel, tensor.dtype) == (8, torch.uint8)
        assert tensor.tolist() == [0, 1, 2, 3, 4, 255]


@pytest.mark.parametrize(
    "make",
    [
        bytearray,
        lambda n: memoryview(bytearray(n)),
        lambda n: torch.empty(n // 2, dtype=torch.int16),
    ],
)
@pytest.mark.parametrize(("begin", "end"), [(0, 60), (0, None), (7, 20), (60, None), (13, 13)])
def test_ranges(single: Path, make: Callable[[int], object], begin: int, end: int | None) -> None:
    whole = bits(load_file(single)["layer.weight"])
    buffer = make(64)
    with open_checkpoint(single, drop_cache=True) as checkpoint:
        before = bytes(memoryview(buffer.numpy() if torch.is_tensor(buffer) else buffer).cast("B"))
        count = checkpoint.read_into("layer.weight", buffer, begin, end)
    after = bytes(memoryview(buffer.numpy() if torch.is_tensor(buffer) else buffer).cast("B"))
    assert count == len(whole[begin:end])
    assert after == whole[begin:end] + before[count:]


def test_wrong_use(single: Path) -> None:
    checkpoint = open_checkpoint(single)
    for begin, end in [(-1, 2), (3, 2), (0, 61)]:
        with pytest.raises(ValueError, match=r"range must lie in \[0, 60\] of 'layer.weight'; got"):
            checkpoint.read_into("layer.weight", bytearray(99), begin, end)
    with pytest.raises(ValueError, match="buffer must have 60 bytes; got 59"):
        checkpoint.read_into("layer.weight", bytearray(59))
    with pytest.raises(TypeError, match="buffer must be writable; got bytes"):
        checkpoint.read_into("layer.weight", bytes(60))
    with pytest.raises(TypeError, match=r"buffer must be a tensor, bytes, .*; got list"):
        checkpoint.read_into("layer.weight", [0] * 60)
    with pytest.raises(ValueError, match="contiguous CPU tensor; got strides"):
        checkpoint.read_into("layer.weight", torch.zeros(9, 9).T[1:])
    with pytest.raises(ValueError, match=r"contiguous CPU tensor; got strides \(1,\) on meta"):
        checkpoint.read_into("layer.weight", torch.zeros(60, device="meta"))
    with pytest.raises(ValueError, match="buffer must be contiguous"):
        checkpoint.read_into("layer.weight", memoryview(bytearray(120))[::2])
    with pytest.raises(KeyError):
        checkpoint.read("absent")
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(ValueError, match="is closed"):
        checkpoint.read("layer.weight")


def test_offsets_beyond_four_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    size = 5 * 2**30
    header = {
        "far": {"dtype": "U8", "shape": [4], "data_offsets": [size, size + 4]},
        "sparse": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
    }
    head = raw_file(header)
    with path.open("wb") as file:
        file.write(head)
        file.seek(len(head) + size)
        file.write(b"\1\2\3\4")
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.read("far").tolist() == [1, 2, 3, 4]
        last = bytearray(4)
        assert checkpoint.read_into("sparse", last, size - 4) == 4


def test_short_reads_are_continued(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:3]], at))
    expected = load_file(single)
    with open_checkpoint(single) as checkpoint:
        for name, tensor in expected.items():
            assert bits(checkpoint.read(name)) == bits(tensor)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_io_error_names_file_and_offset(
    single: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def broken(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    with open_checkpoint(single) as checkpoint:
        info = checkpoint.tensors["layer.bias"]
        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(TransferError) as caught:
            checkpoint.read_into("layer.bias", bytearray(20), 4)
    assert isinstance(caught.value, StorageError)
    assert caught.value.exit_code == 74
    where = f"{single}: tensor 'layer.bias': reading at byte {info.offset + 4} failed: "
    assert str(caught.value).startswith(where + os.strerror(code))


def test_file_that_shrinks(single: Path) -> None:
    checkpoint = open_checkpoint(single)
    os.truncate(single, single.stat().st_size - 3)
    with pytest.raises(TruncatedError, match=r"ends at byte \d+, 3 bytes were still expected"):
        checkpoint.read(list(checkpoint.tensors)[-1])
    with pytest.raises(ChangedError, match=r"was changed while it was being read \(size"):
        checkpoint.close()


@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.utime(path, ns=(1, 1)),
        lambda path: os.truncate(path, path.stat().st_size + 1),
        lambda path: path.write_bytes(path.read_bytes()),
    ],
)
def test_changed_input(single: Path, change: Callable[[Path], object]) -> None:
    checkpoint = open_checkpoint(single)
    checkpoint.check_unchanged()
    change(single)
    with pytest.raises(ChangedError, match="run again") as caught:
        checkpoint.check_unchanged()
    assert caught.value.exit_code == 65
    with pytest.raises(ChangedError, match="run again"):
        checkpoint.__exit__(None, None, None)


def test_a_change_after_the_last_check_and_read_is_nobodys_concern(single: Path) -> None:
    with open_checkpoint(single) as checkpoint:
        checkpoint.check_unchanged()
        os.utime(single, ns=(1, 1))
    (again := open_checkpoint(single)).check_unchanged()
    again.read("layer.bias")
    os.utime(single, ns=(2, 2))
    with pytest.raises(ChangedError, match="run again"):
        again.close()


def test_an_error_is_not_replaced_by_one_about_a_changed_file(single: Path) -> None:
    def fail() -> None:
        with open_checkpoint(single):
            os.utime(single, ns=(1, 1))
            raise KeyError("first")

    with pytest.raises(KeyError, match="first"):
        fail()


def test_closing_waits_for_reads(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that went on after the close would be of whatever file has the number by then."""
    reading, go_on, events = threading.Event(), threading.Event(), []
    preadv = os.preadv

    def slow(fd: int, views: list[memoryview], at: int) -> int:
        reading.set()
        assert go_on.wait(30)
        events.append("read")
        return preadv(fd, views, at)

    checkpoint = open_checkpoint(single)
    monkeypatch.setattr(os, "preadv", slow)
    reader = threading.Thread(target=checkpoint.read, args=("layer.bias",))
    closer = threading.Thread(target=lambda: (checkpoint.close(), events.append("closed")))
    reader.start()
    assert reading.wait(30)
    closer.start()
    closer.join(0.05)
    go_on.set()
    reader.join()
    closer.join()
    assert events == ["read", "closed"]


def test_replaced_input_keeps_the_open_one(single: Path, tmp_path: Path) -> None:
    expected = load_file(single)
    other = tmp_path / "other.safetensors"
    save_file({"layer.bias": torch.zeros(5)}, other)
    with open_checkpoint(single) as checkpoint:
        other.replace(single)
        assert torch.equal(checkpoint.read("layer.bias"), expected["layer.bias"])


def test_failed_open_closes_every_file(tmp_path: Path) -> None:
    good, bad = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"a": torch.zeros(1)}, good)
    bad.write_bytes(b"no header here")
    index = '{"weight_map":{"a":"a.safetensors","b":"b.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    before = open_files()
    for _ in range(3):
        with pytest.raises(Exception, match="is a text, 'no header here'"):
            open_checkpoint(tmp_path)
    assert open_files() == before


def test_unreadable_file() -> None:
    code = """
        import os, sys
        from tailor_fast.checkpoint import MissingFileError, open_checkpoint
        if os.geteuid() == 0:
            os.setgroups([]); os.setgid(65534); os.setuid(65534)
        for path in sys.argv[1:]:
            try:
                open_checkpoint(path)
            except MissingFileError as error:
                print(error.exit_code, error)
    """
    with TemporaryDirectory() as name:
        directory, hidden = Path(name), Path(name) / "hidden"
        directory.chmod(0o755)
        hidden.mkdir()
        for path in (directory / "model.safetensors", hidden / "model.safetensors"):
            save_file(some_tensors(), path)
            path.chmod(0)
        hidden.chmod(0)
        paths = [directory / "model.safetensors", directory, hidden, hidden / "model.safetensors"]
        done = run_python(code, *paths)
        hidden.chmod(0o700)
    paths[1] = paths[0]
    expected = [f"65 {path}: is not readable; check the permissions" for path in paths]
    assert done.stdout.splitlines() == expected, done.stderr


def test_too_many_open_files(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(TransferError, match="too many open files; raise the limit") as caught:
        open_checkpoint(single)
    assert caught.value.exit_code == 74


SIDE = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "vocab.txt"]
SIDE += ["chat_template.jinja", "preprocessor_config.json", "modeling_x.py", "LICENSE"]
NOT_SIDE = ["pytorch_model.bin", "pytorch_model.bin.index.json", "optimizer.pt", "tf_model.h5"]
NOT_SIDE += ["README.md", ".gitattributes", "tailor_report.json", "tailor_manifest.json"]
NOT_SIDE += ["extra.safetensors", "model.gguf", "flax_model.msgpack"]


def test_side_files(single: Path, tmp_path: Path) -> None:
    for name in SIDE + NOT_SIDE:
        (tmp_path / name).write_text(name)
    (tmp_path / "onnx").mkdir()
    elsewhere = tmp_path.with_name("blobs")
    elsewhere.mkdir()
    (elsewhere / "0a1b").write_text("{}")
    (tmp_path / "linked.json").symlink_to(elsewhere / "0a1b")
    (tmp_path / "folder.json").symlink_to(elsewhere)
    with open_checkpoint(tmp_path) as checkpoint:
        names = [path.name for path in checkpoint.side_files]
    assert names == sorted([*SIDE, "linked.json"])
    (tmp_path / "merges.txt").symlink_to(tmp_path / "gone")
    with (
        open_checkpoint(tmp_path) as checkpoint,
        pytest.raises(MissingFileError, match=r"merges.txt: does not exist") as caught,
    ):
        _ = checkpoint.side_files
    assert caught.value.exit_code == 65


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
@pytest.mark.parametrize("linked", [False, True])
def test_a_pipe_among_the_side_files_is_refused(single: Path, name: str, linked: bool) -> None:
    pipe = single.parent / name if not linked else single.parent.with_name(f"pipe-{name}")
    os.mkfifo(pipe)
    if linked:
        (single.parent / name).symlink_to(pipe)
    with pytest.raises(MissingFileError, match=rf"{name}: must be a regular file; it is a pipe"):
        open_checkpoint(single.parent)
    with open_checkpoint(single):  # a lone file has no side files
        pass


def test_a_device_among_the_side_files_is_refused(single: Path) -> None:
    (single.parent / "vocab.json").symlink_to("/dev/zero")
    with pytest.raises(MissingFileError, match="it is a character device; check the path"):
        open_checkpoint(single.parent)


def test_memory_of_a_large_tensor(tmp_path: Path) -> None:
    """300 MB through an 8 MiB buffer: the process must not grow by more than a few buffers."""
    path = tmp_path / "m.safetensors"
    size = 300_000_000
    path.write_bytes(raw_file({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}))
    os.truncate(path, path.stat().st_size + size)
    code = """
        import re, sys
        from pathlib import Path
        from tailor_fast.checkpoint import open_checkpoint
        def peak():
            return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
        buffer, before = bytearray(8 << 20), peak()
        with open_checkpoint(sys.argv[1]) as checkpoint:
            for begin in range(0, 300_000_000, 8 << 20):
                end = min(begin + (8 << 20), 300_000_000)
                checkpoint.read_into("a", buffer, begin, end)
        print(peak() - before)
    """
    done = run_python(code, path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16 * 1024
