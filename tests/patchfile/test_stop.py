"""Failures of the system at every place, and signals: OUT is absent or whole, nothing is left."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tailor_fast._core.errors import StorageError
from tailor_fast.checkpoint import DiskFullError, syscalls
from tailor_fast.patchfile import apply_patch, diff_checkpoints, verify_patch, writer
from tests.checkpoint.test_faults import Injector, fails
from tests.patchfile.pairs import content, names_in, save_pair
from tests.patchfile.test_states import open_files

Made = tuple[Path, Path, Path]
CALLS = {
    "open": (os, "open"),
    "pwrite": (os, "pwrite"),
    "preadv": (os, "preadv"),
    "ftruncate": (os, "ftruncate"),
    "fsync": (os, "fsync"),
    "mkdir": (os, "mkdir"),
    "renameat2": (syscalls, "_renameat2"),
}


@pytest.fixture(autouse=True)
def _nothing_is_left_running() -> Iterator[None]:
    threads, files = threading.active_count(), open_files()
    yield
    assert threading.active_count() == threads
    assert open_files() == files


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["error", "interrupt"])
def test_diff_fails_once_at_every_place(
    made: Made,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: str,
    kind: str,
) -> None:
    base, target, patch = made
    folder, whole = patch.parent, patch.read_bytes()
    error = OSError(errno.EIO, "injected") if kind == "error" else KeyboardInterrupt()
    expected = StorageError if kind == "error" else KeyboardInterrupt
    module, name = CALLS[call]
    before = names_in(folder)
    out = folder / "out.tailor.safetensors"
    for at in range(1, 200):
        injector = Injector(getattr(module, name), at, error)
        with monkeypatch.context() as patched:
            patched.setattr(module, name, injector)
            failed = False
            try:
                diff_checkpoints(base, target, out)
            except expected:
                failed = True
        if (
            "cannot remove" in caplog.text
        ):  # the clean-up itself met the failure: the next run does it
            caplog.clear()
            diff_checkpoints(base, target, out, overwrite=True)
        if out.exists():
            assert out.read_bytes() == whole  # the failure came after the rename
            out.unlink()
        else:
            assert failed
        assert names_in(folder) == before, f"{name} number {at}"
        if injector.count < at:
            assert at > 1
            return
    raise AssertionError("it never ended without a failure")


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (errno.ENOSPC, "the disk is full while writing"),
        (errno.EDQUOT, "the disk quota is used up while writing"),
        (errno.EFBIG, "the file-size limit is reached while writing"),
    ],
)
def test_no_room(made: Made, monkeypatch: pytest.MonkeyPatch, code: int, sentence: str) -> None:
    base, target, patch = made
    before = names_in(patch.parent)
    monkeypatch.setattr(os, "pwrite", fails_but_for_the_lock(code))
    with pytest.raises(DiskFullError, match=rf"q\.safetensors: {sentence}") as caught:
        diff_checkpoints(base, target, patch.parent / "q.safetensors")
    assert caught.value.exit_code == 74
    assert names_in(patch.parent) == before


def fails_but_for_the_lock(code: int) -> Callable[..., int]:
    """The lock file holds a process id, a few bytes."""
    real = os.pwrite

    def call(fd: int, data: memoryview, at: int) -> int:
        if len(data) > 10:
            raise OSError(code, os.strerror(code))
        return real(fd, data, at)

    return call


def test_an_error_of_the_disk_while_writing_behind(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, target, patch = made
    before = names_in(patch.parent)
    monkeypatch.setattr(writer, "_WINDOW", 1)
    diff_checkpoints(base, target, patch.parent / "q.safetensors")
    assert (patch.parent / "q.safetensors").read_bytes() == patch.read_bytes()
    (patch.parent / "q.safetensors").unlink()
    monkeypatch.setattr(syscalls, "_sync_file_range", fails(errno.EIO))
    with pytest.raises(StorageError, match=r"q\.safetensors: writing at byte \d+ failed: Input"):
        diff_checkpoints(base, target, patch.parent / "q.safetensors")
    assert names_in(patch.parent) == before


def test_short_writes_are_continued(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    base, target, patch = made
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:1000], at))
    diff_checkpoints(base, target, patch.parent / "q.safetensors")
    assert (patch.parent / "q.safetensors").read_bytes() == patch.read_bytes()


SCRIPT = """
    import sys, time
    from tailor_fast.checkpoint import Checkpoint
    from tailor_fast.cli import main
    real, reads = Checkpoint.read_into, 0
    def slow(self, *arguments):
        global reads
        reads += 1
        if reads == 6:
            print("half", flush=True)
        if reads >= 6:
            time.sleep(0.3)
        return real(self, *arguments)
    Checkpoint.read_into = slow
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["diff", "apply"])
@pytest.mark.parametrize(
    ("number", "code", "told"),
    [
        (signal.SIGTERM, 143, "tailor-fast: error: terminated; nothing was written\n"),
        (signal.SIGINT, 130, "tailor-fast: error: stopped by the user; nothing was written\n"),
        (signal.SIGKILL, -signal.SIGKILL, ""),
    ],
)
def test_signals(tmp_path: Path, command: str, number: int, code: int, told: str) -> None:
    base, target = save_pair(tmp_path)
    patch = tmp_path / "p.safetensors"
    diff_checkpoints(base, target, patch)
    second, out = (target, "q.safetensors") if command == "diff" else (patch, "out")
    before = names_in(tmp_path)
    arguments = (command, base, second, "-o", tmp_path / out, "-q")
    line = [sys.executable, "-c", textwrap.dedent(SCRIPT), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "half\n"
        process.send_signal(number)
        assert process.wait(timeout=300) == code
        assert process.stderr.read() == told
    if number == signal.SIGKILL:
        assert len(names_in(tmp_path)) == len(before) + 2
        assert not (tmp_path / out).exists()
    else:
        assert names_in(tmp_path) == before
    if command == "diff":  # the next run clears what a killed one left
        diff_checkpoints(base, target, tmp_path / out)
        assert verify_patch(tmp_path / out, base=base).reached
    else:
        apply_patch(base, patch, tmp_path / out)
        assert content(tmp_path / out) == content(target)
    assert names_in(tmp_path) == sorted([*before, out])
