"""Every failure while writing: one sentence, the right exit code, OUT absent or complete."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from tailor_fast._core.errors import StorageError, TailorError
from tailor_fast.checkpoint import (
    DiskFullError,
    IncompleteError,
    NoSpaceError,
    OutputPlaceError,
    StagedCheckpoint,
    TransferError,
    open_checkpoint,
    syscalls,
)
from tests.checkpoint.files import layout_of, run_python, some_tensors, tree
from tests.checkpoint.test_reader import bits

SHARD_BYTES = 30
REAL_PWRITE, REAL_OPEN = os.pwrite, os.open


def fails(code: int) -> Callable[..., None]:
    def call(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return call


def write_checkpoint(out: Path, *, overwrite: bool = False) -> None:
    """A whole job: three files, an index, a side file."""
    tensors = some_tensors()
    layout = layout_of(tensors, SHARD_BYTES)
    with StagedCheckpoint(out, layout, overwrite=overwrite) as staged:
        for name, tensor in tensors.items():
            staged.write(name, 0, tensor)
        staged.add_file("config.json", b"{}")
        staged.commit()


def check_complete(out: Path) -> None:
    tensors = some_tensors()
    with open_checkpoint(out) as checkpoint:
        for name, tensor in tensors.items():
            if name != "layer.weight" and name != "layer.bias":  # those are random
                assert bits(checkpoint.read(name)) == bits(tensor)
        assert set(checkpoint.tensors) == set(tensors)
    assert (out / "config.json").read_bytes() == b"{}"


@pytest.mark.parametrize(
    ("code", "error", "exit_code", "message"),
    [
        (errno.ENOSPC, DiskFullError, 74, "the disk is full while writing 20 bytes at byte 4096"),
        (errno.EDQUOT, DiskFullError, 74, "the disk quota is used up while writing 20 bytes"),
        (errno.EFBIG, DiskFullError, 74, "the file-size limit is reached while writing 20 bytes"),
        (errno.EIO, TransferError, 74, "writing 20 bytes at byte 4096 failed: Input/output error"),
        (errno.EROFS, OutputPlaceError, 73, "is not possible: Read-only file system"),
    ],
)
def test_failing_write(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    error: type[TailorError],
    exit_code: int,
    message: str,
) -> None:
    tensors = some_tensors()
    staged = StagedCheckpoint(tmp_path / "out", layout_of(tensors, SHARD_BYTES))
    staged.write("layer.weight", 0, tensors["layer.weight"])
    monkeypatch.setattr(os, "pwrite", fails(code))
    with pytest.raises(error, match=message) as caught:
        staged.write("layer.bias", 0, tensors["layer.bias"])
    assert caught.value.exit_code == exit_code
    assert str(caught.value).startswith(f"{tmp_path}/out/model-00002-of-00003.safetensors: ")
    monkeypatch.undo()
    # what the disk holds is unknown now: nothing may be added, nothing committed
    for use in (staged.commit, staged.finish, lambda: staged.write("odd", 0, tensors["odd"])):
        with pytest.raises(IncompleteError, match="a write failed, nothing more is written"):
            use()
    staged.abort()
    staged.abort()
    assert list(tmp_path.iterdir()) == []


def test_everything_is_durable_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []

    def noting(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(first: object, *rest: object) -> object:
            file = "" if name == "rename" else Path(f"/proc/self/fd/{first}").readlink().name
            events.append((name, file))
            return real(first, *rest)

        return call

    monkeypatch.setattr(os, "pwrite", noting("write", os.pwrite))
    monkeypatch.setattr(os, "fsync", noting("sync", os.fsync))
    monkeypatch.setattr(syscalls, "_renameat2", noting("rename", syscalls._renameat2))
    write_checkpoint(tmp_path / "out")
    renamed = events.index(("rename", ""))
    for name in tree(tmp_path / "out"):
        grown = f"{name}.part" if name.endswith(".safetensors") else name
        last_write = max(at for at, event in enumerate(events) if event == ("write", grown))
        assert last_write < events.index(("sync", grown)) < renamed
    index = "model.safetensors.index.json"
    assert [event for event in events if event[0] == "write"][-1] == ("write", index)
    directory = events[renamed - 1]
    assert directory[0] == "sync"
    assert directory[1].startswith(".out.tailor-")
    assert events[renamed + 1 :] == [("sync", tmp_path.name)]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: REAL_PWRITE(fd, view[:3], at))
    write_checkpoint(tmp_path / "out")
    check_complete(tmp_path / "out")


def test_a_write_that_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(TransferError, match="nothing was written at byte 0"):
        write_checkpoint(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["layer.bias", "config.json"])
def test_fsync_is_not_tried_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    tensors = some_tensors()
    with StagedCheckpoint(tmp_path / "out", layout_of(tensors, SHARD_BYTES)) as staged:
        for other, tensor in tensors.items():
            if other != "layer.bias":
                staged.write(other, 0, tensor)
        calls: list[int] = []

        def fail_once(fd: int) -> None:
            calls.append(fd)
            if len(calls) == 1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "fsync", fail_once)
        last = (
            (lambda: staged.write(name, 0, tensors[name]))
            if name in tensors
            else (lambda: staged.add_file(name, b"{}"))
        )
        with pytest.raises(TransferError, match="making the file durable failed: Input"):
            last()
        with pytest.raises(IncompleteError, match="a write failed"):
            staged.commit()
        assert len(calls) == 1
    assert list(tmp_path.iterdir()) == []


def test_error_of_the_disk_while_writing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tailor_fast.checkpoint.shardfile._WINDOW", 1)
    monkeypatch.setattr(syscalls, "_sync_file_range", fails(errno.EIO))
    with pytest.raises(TransferError, match="writing at byte 4096 failed: Input/output error"):
        write_checkpoint(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_calls_that_a_file_system_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr("tailor_fast.checkpoint.shardfile._WINDOW", 1)
    for call in ("_sync_file_range", "_fallocate", "_renameat2"):
        monkeypatch.setattr(syscalls, call, fails(code))
    write_checkpoint(tmp_path / "out")
    write_checkpoint(tmp_path / "out", overwrite=True)
    check_complete(tmp_path / "out")


@pytest.mark.parametrize(
    ("code", "message"), [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk quota")]
)
def test_no_room_to_reserve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    monkeypatch.setattr(syscalls, "_fallocate", fails(code))
    with pytest.raises(NoSpaceError, match=f"{message}.*: reserving 4.16 kB failed") as caught:
        write_checkpoint(tmp_path / "out")
    assert caught.value.exit_code == 73
    assert list(tmp_path.iterdir()) == []


def test_file_size_limit(tmp_path: Path) -> None:
    """A real limit: with reservation nothing is written, without it the write says so."""
    code = """
        import errno, os, resource, sys
        from tailor_fast.checkpoint import CheckpointError, StagedCheckpoint, TensorSpec
        from tailor_fast.checkpoint import plan_layout, syscalls
        layout = plan_layout([TensorSpec("a", "U8", (100_000,))])
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        def write():
            try:
                with StagedCheckpoint(sys.argv[1], layout) as staged:
                    staged.write("a", 0, bytes(100_000))
                    staged.commit()
            except CheckpointError as error:
                print(type(error).__name__, error.exit_code, error)
        write()
        def cannot(*_):
            raise OSError(errno.EOPNOTSUPP, "")
        syscalls._fallocate = cannot
        write()
    """
    done = run_python(code, tmp_path / "out")
    reserved, written = done.stdout.splitlines()
    file = f"{tmp_path}/out/model.safetensors"
    assert reserved.startswith(f"NoSpaceError 73 {file}: the file-size limit is reached: reserving")
    assert written.startswith(f"DiskFullError 74 {file}: the file-size limit is reached while ")
    assert "writing 54096 bytes at byte 50000; make room" in written
    assert list(tmp_path.iterdir()) == []


# what a job calls, each failing once at its n-th use
CALLS = {
    "open": (os, "open"),
    "pwrite": (os, "pwrite"),
    "fsync": (os, "fsync"),
    "mkdir": (os, "mkdir"),
    "fallocate": (syscalls, "_fallocate"),
    "renameat2": (syscalls, "_renameat2"),
}


class Injector:
    """Passes calls through and raises ``error`` in place of, or after, the n-th."""

    def __init__(self, real: Callable[..., object], at: int, error: BaseException) -> None:
        self.real, self.at, self.error = real, at, error
        self.count = 0

    def __call__(self, *arguments: object, **options: object) -> object:
        self.count += 1
        # an interrupt comes after the call; after an open it would lose the file's number
        before = isinstance(self.error, OSError) or self.real is REAL_OPEN
        if self.count == self.at and before:
            raise self.error
        result = self.real(*arguments, **options)
        if self.count == self.at:
            raise self.error
        return result


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["error", "interrupt"])
def test_one_failure_at_every_place(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: str,
    kind: str,
    overwrite: bool,
) -> None:
    module, name = CALLS[call]
    error = OSError(errno.EIO, "injected") if kind == "error" else KeyboardInterrupt()
    expected = StorageError if kind == "error" else KeyboardInterrupt
    for at in range(1, 100):
        out = tmp_path / str(at) / "out"
        out.parent.mkdir()
        if overwrite:
            write_checkpoint(out)
            (out / "model-old.safetensors").write_bytes(b"old")
        old = tree(out.parent)
        injector = Injector(getattr(module, name), at, error)
        with monkeypatch.context() as patched:
            patched.setattr(module, name, injector)
            failed = False
            try:
                write_checkpoint(out, overwrite=overwrite)
            except expected:
                failed = True
        if "cannot remove" in caplog.text:  # the old output, after the new one was in place
            check_complete(out)
            caplog.clear()
            write_checkpoint(out, overwrite=True)
        names = [path.name for path in out.parent.iterdir()]
        assert names in ([], ["out"]), f"{name} number {at} left {names}"
        if failed and tree(out.parent) == old:
            continue
        check_complete(out)
        assert not (out / "model-old.safetensors").exists()
        if injector.count < at:
            assert at > 1
            return
    raise AssertionError("the job never ended without a failure")


JOB = """
    import signal, sys
    from tailor_fast.checkpoint import StagedCheckpoint, TensorSpec, plan_layout
    if sys.argv[2] == "handler":
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    layout = plan_layout([TensorSpec("a", "U8", (100_000,))])
    with StagedCheckpoint(sys.argv[1], layout) as staged:
        staged.write("a", 0, bytes(50_000))
        print("half", flush=True)
        signal.pause()
"""


@pytest.mark.parametrize(
    ("number", "mode", "code"),
    [(signal.SIGTERM, "handler", 143), (signal.SIGKILL, "none", -signal.SIGKILL)],
)
def test_signals(tmp_path: Path, number: int, mode: str, code: int) -> None:
    command = [sys.executable, "-c", textwrap.dedent(JOB), str(tmp_path / "out"), mode]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        assert len(list(tmp_path.iterdir())) == 2
        process.send_signal(number)
        assert process.wait(timeout=300) == code
    assert not (tmp_path / "out").exists()
    if number == signal.SIGKILL:
        assert len(list(tmp_path.iterdir())) == 2
        write_checkpoint(tmp_path / "out")  # the next run clears what the killed one left
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    else:
        assert list(tmp_path.iterdir()) == []
