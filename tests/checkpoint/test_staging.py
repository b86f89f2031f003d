"""Where an output may go: one writer at a time, never over an input, replaced only when asked."""

import errno
import fcntl
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest

from tailor_fast.checkpoint import (
    CheckpointError,
    NoSpaceError,
    OutputExistsError,
    OutputLockedError,
    OutputPlaceError,
    StagedCheckpoint,
    StagedFile,
    TransferError,
    plan_layout,
    syscalls,
)
from tests.checkpoint.files import layout_of, run_python, some_tensors, tree

EMPTY = plan_layout([])


def refused(out: Path, error: type[CheckpointError], **options: object) -> str:
    """The sentence with which OUT is refused; everything beside it must be as before."""
    before = tree(out.parent) if out.parent.is_dir() else {}
    with pytest.raises(error) as caught:
        StagedCheckpoint(out, EMPTY, **options)
    assert caught.value.exit_code == 73
    assert str(caught.value).startswith(f"{out}: ")
    assert "\n" not in str(caught.value)
    assert not out.parent.is_dir() or tree(out.parent) == before
    return str(caught.value)


def old_checkpoint(out: Path) -> dict[str, bytes]:
    out.mkdir(mode=0o750)
    (out / "model.safetensors").write_bytes(b"old weights")
    (out / "extra.txt").write_bytes(b"old extra")
    (out / "sub").mkdir()
    (out / "sub" / "x").write_bytes(b"old x")
    return tree(out)


def write_all(staged: StagedCheckpoint | StagedFile) -> None:
    for name, tensor in some_tensors().items():
        staged.write(name, 0, tensor)


def test_parent(tmp_path: Path) -> None:
    message = refused(tmp_path / "no" / "out", OutputPlaceError)
    assert f"directory {tmp_path}/no cannot be used: No such file or directory; make it" in message
    (tmp_path / "file").write_bytes(b"")
    message = refused(tmp_path / "file" / "out", OutputPlaceError)
    assert "cannot be used: Not a directory" in message


def test_relative_out_and_links_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    with StagedCheckpoint("link/out/", EMPTY) as staged:
        assert staged.out == tmp_path / "real" / "out"
        staged.commit()
    assert set(tree(tmp_path / "real")) == {"out/model.safetensors"}


@pytest.mark.parametrize("kind", ["directory", "empty", "file", "link", "broken link"])
def test_existing_out(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_bytes(b"something")
    elif kind == "empty":
        out.mkdir()
    elif kind == "directory":
        old_checkpoint(out)
    else:
        out.symlink_to(tmp_path if kind == "link" else "nowhere")
    message = refused(out, OutputExistsError)
    assert "exists already; choose another OUT or overwrite it (--overwrite, " in message


def test_overwrite_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_bytes(b"precious")
    message = refused(out, OutputExistsError, overwrite=True)
    assert "holds no safetensors file, so it is no checkpoint and not overwritten" in message
    other = tmp_path / "file"
    other.write_bytes(b"1")
    assert "is no directory and is not" in refused(other, OutputExistsError, overwrite=True)
    link = tmp_path / "link"
    link.symlink_to(out)
    assert "is no directory and is not" in refused(link, OutputExistsError, overwrite=True)
    with pytest.raises(OutputExistsError, match="is no file and is not overwritten"):
        StagedFile(out, EMPTY, overwrite=True)


def without_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that knows plain rename only."""

    def missing(*_: object) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(syscalls, "_renameat2", missing)


@pytest.mark.parametrize("plain", [False, True])
def test_overwrite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: bool) -> None:
    if plain:
        without_flags(monkeypatch)
    out = tmp_path / "out"
    old = old_checkpoint(out)
    with StagedCheckpoint(out, layout_of(some_tensors()), overwrite=True) as staged:
        write_all(staged)
        assert tree(out) == old
        staged.commit()
    assert set(tree(tmp_path)) == {"out/model.safetensors"}
    assert out.stat().st_mode & 0o777 == 0o750
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("plain", [False, True])
def test_overwrite_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: bool) -> None:
    if plain:
        without_flags(monkeypatch)
    for name in ("fresh", "empty"):
        if name == "empty":
            (tmp_path / name).mkdir()
        with StagedCheckpoint(tmp_path / name, EMPTY, overwrite=True) as staged:
            staged.commit()
    assert set(tree(tmp_path)) == {"fresh/model.safetensors", "empty/model.safetensors"}


def test_overwrite_that_fails_keeps_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = old_checkpoint(tmp_path / "out")
    with pytest.raises(KeyError), StagedCheckpoint(tmp_path / "out", EMPTY, overwrite=True):
        raise KeyError
    assert tree(tmp_path / "out") == old
    without_flags(monkeypatch)
    rename, calls = os.rename, []

    def second_fails(source: str, target: str, **places: int) -> None:
        if places:  # of a file in the staging directory
            return rename(source, target, **places)
        calls.append(source)
        if len(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    staged = StagedCheckpoint(tmp_path / "out", EMPTY, overwrite=True)
    with pytest.raises(TransferError, match="renaming the finished output failed"), staged:
        staged.commit()
    assert len(calls) == 3
    assert tree(tmp_path) == {f"out/{name}": data for name, data in old.items()}


@pytest.mark.parametrize("plain", [False, True])
def test_out_that_comes_into_being(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    if plain:
        without_flags(monkeypatch)
    with StagedCheckpoint(tmp_path / "out", EMPTY) as staged:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_bytes(b"1")
        with pytest.raises(OutputExistsError, match="came into being while") as caught:
            staged.commit()
    assert caught.value.exit_code == 73
    assert tree(tmp_path) == {"out/theirs": b"1"}


def test_single_file(tmp_path: Path) -> None:
    out = tmp_path / "p.safetensors"
    out.write_bytes(b"old")
    out.chmod(0o640)
    with pytest.raises(OutputExistsError, match="exists already"):
        StagedFile(out, EMPTY)
    with StagedFile(out, EMPTY, overwrite=True) as staged:
        assert out.read_bytes() == b"old"
        staged.commit()
    assert set(tree(tmp_path)) == {"p.safetensors"}
    assert out.read_bytes() == EMPTY.shards[0].header
    assert out.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("inputs", "out", "relation"),
    [
        ("base", "base", "is, or lies in, the input"),
        ("base", "base/tailored", "is, or lies in, the input"),
        ("base", "base/sub/tailored", "is, or lies in, the input"),
        ("link", "base/tailored", "is, or lies in, the input"),
        ("base/model.safetensors", "base", "holds the input"),
        ("base/sub", "base", "holds the input"),
        ("shard", "base", "holds the input"),
    ],
)
def test_inputs_are_out_of_reach(tmp_path: Path, inputs: str, out: str, relation: str) -> None:
    old_checkpoint(tmp_path / "base")
    (tmp_path / "link").symlink_to("base")
    (tmp_path / "shard").symlink_to("base/model.safetensors")
    given = tmp_path / inputs
    message = refused(tmp_path / out, OutputPlaceError, overwrite=True, inputs=[given])
    assert f"{relation} {given}; choose another OUT" in message


def test_out_beside_its_inputs(tmp_path: Path) -> None:
    old_checkpoint(tmp_path / "base")
    inputs = [tmp_path / "base", tmp_path / "base" / "model.safetensors", tmp_path / "gone"]
    with StagedCheckpoint(tmp_path / "base2", EMPTY, inputs=inputs) as staged:
        staged.commit()


def test_second_writer(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with StagedCheckpoint(out, layout_of(some_tensors())) as staged:
        message = refused(out, OutputLockedError)
        assert f"is being written by process {os.getpid()}; wait for it" in message
        with StagedCheckpoint(tmp_path / "other", EMPTY) as other:
            other.commit()
        write_all(staged)
        staged.commit()
    assert "exists already" in refused(out, OutputExistsError)


def test_second_process(tmp_path: Path) -> None:
    code = """
        import sys
        from tailor_fast.checkpoint import OutputError, StagedCheckpoint, plan_layout
        try:
            StagedCheckpoint(sys.argv[1], plan_layout([]))
        except OutputError as error:
            print(error)
            sys.exit(error.exit_code)
    """.replace("OutputError,", "OutputLockedError as OutputError,")
    with StagedCheckpoint(tmp_path / "out", EMPTY) as staged:
        done = run_python(code, tmp_path / "out")
        staged.commit()
    assert done.returncode == 73, done.stderr
    assert f"out: is being written by process {os.getpid()}; wait for it" in done.stdout
    assert set(tree(tmp_path)) == {"out/model.safetensors"}


def test_lock_left_by_a_killed_run(tmp_path: Path) -> None:
    (tmp_path / ".out.tailor.lock").write_text("12345\n" * 3)
    for name in (
        ".out.tailor-0123456789ab",
        ".out.tailor-0123456789a",
        ".out2.tailor-0123456789ab",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"1")
    with StagedCheckpoint(tmp_path / "out", EMPTY) as staged:
        assert (tmp_path / ".out.tailor.lock").read_text() == f"{os.getpid()}\n"
        staged.commit()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"out", ".out.tailor-0123456789a", ".out2.tailor-0123456789ab"}


@pytest.mark.parametrize("finished", [False, True])
def test_replacement_by_steps_that_was_killed(tmp_path: Path, finished: bool) -> None:
    """Killed with the old output set aside: it is put back, unless the new one is in place."""
    aside = tmp_path / ".out.tailor-0123456789ab.old"
    old = old_checkpoint(aside)
    if finished:
        with StagedCheckpoint(tmp_path / "elsewhere", EMPTY) as staged:
            staged.commit()
        (tmp_path / "elsewhere").rename(tmp_path / "out")
    with pytest.raises(OutputExistsError, match="exists already"):
        StagedCheckpoint(tmp_path / "out", EMPTY)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tree(tmp_path / "out") == old) != finished


def test_out_that_changes_before_it_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    old_checkpoint(out)
    with StagedCheckpoint(out, EMPTY, overwrite=True) as staged:
        (out / "model.safetensors").unlink()
        with pytest.raises(OutputExistsError, match="holds no safetensors file"):
            staged.commit()
    assert set(tree(tmp_path)) == {"out/extra.txt", "out/sub/x"}


def test_lock_whose_file_was_unlinked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder unlinks the file and lets go between our open and our lock: try again."""
    flock, calls = fcntl.flock, []

    def late(fd: int, flags: int) -> None:
        if not calls:
            (tmp_path / ".out.tailor.lock").unlink()
        calls.append(fd)
        flock(fd, flags)

    monkeypatch.setattr(fcntl, "flock", late)
    with StagedCheckpoint(tmp_path / "out", EMPTY) as staged:
        assert len(calls) == 2
        assert (tmp_path / ".out.tailor.lock").exists()
        staged.commit()


def test_file_system_that_cannot_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(OutputPlaceError, match="cannot be locked: No locks available") as caught:
        StagedCheckpoint(tmp_path / "out", EMPTY)
    assert caught.value.exit_code == 73


def test_unwritable_parent() -> None:
    code = """
        import os, sys
        from tailor_fast.checkpoint import OutputPlaceError, StagedCheckpoint, plan_layout
        if os.geteuid() == 0:
            os.setgroups([]); os.setgid(65534); os.setuid(65534)
        try:
            StagedCheckpoint(sys.argv[1], plan_layout([]))
        except OutputPlaceError as error:
            print(error.exit_code, error)
    """
    with TemporaryDirectory() as directory:
        Path(directory).chmod(0o555)
        done = run_python(code, f"{directory}/out")
        assert tree(Path(directory)) == {}
    assert done.stdout.startswith(f"73 {directory}/out: making the lock file is not possible: Perm")
    assert done.stdout.endswith("; choose another place\n"), done.stderr


def test_no_space_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of(some_tensors())
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=2, free=1_040_000))
    with pytest.raises(NoSpaceError, match=r"needs 1.05 MB of disk, 1.04 MB are free") as caught:
        StagedCheckpoint(tmp_path / "out", layout)
    assert caught.value.exit_code == 73
    assert list(tmp_path.iterdir()) == []
    # file systems that do not know report zero
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=0, free=0))
    with StagedCheckpoint(tmp_path / "out", EMPTY) as staged:
        staged.commit()


def test_out_name_that_is_too_long(tmp_path: Path) -> None:
    assert "File name too long" in refused(tmp_path / ("x" * 250), OutputPlaceError)


def test_a_staging_that_is_dropped_goes(tmp_path: Path) -> None:
    """As when a signal arrives between the constructor and the ``with`` that it stands in."""
    staged = StagedCheckpoint(tmp_path / "out", layout_of(some_tensors()))
    child = os.fork()
    if child == 0:
        del staged  # the output is its parent's
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert len(list(tmp_path.iterdir())) == 2
    del staged
    assert list(tmp_path.iterdir()) == []


def test_a_staging_that_is_held_to_the_end_of_the_program_goes(tmp_path: Path) -> None:
    code = """
        import sys
        from tailor_fast.checkpoint import StagedCheckpoint, plan_layout
        staged = StagedCheckpoint(sys.argv[1], plan_layout([]))
    """
    done = run_python(code, tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
