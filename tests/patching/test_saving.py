"""``patch --save-patch``: the patch of the output, with it or instead of it."""

import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tailor_fast._core.errors import OutputError, StoppedError, StorageError, UsageError
from tailor_fast.calibration.options import RunOptions
from tailor_fast.checkpoint import OutputExistsError, StagedCheckpoint
from tailor_fast.patchfile import Patch, apply_patch, diff_checkpoints, writer
from tailor_fast.patching import saving
from tailor_fast.patching.checkpoints import patch_checkpoint
from tailor_fast.patching.saving import patch_to_file
from tests.cli.running import CommandLine
from tests.patchfile.pairs import content, names_in
from tests.patching.disk import llama_pair
from tests.patching.test_resuming import StopAfter

OPTIONS = RunOptions(max_shard_bytes=40_000)


def test_the_patch_is_that_of_the_output(tmp_path: Path) -> None:
    base, tuned = llama_pair(tmp_path)
    out, saved, diffed = (tmp_path / name for name in ("out", "s.safetensors", "d.safetensors"))
    report = patch_to_file(base, tuned, out, save_patch=saved, options=OPTIONS)
    diff_checkpoints(base, out, diffed)
    assert saved.read_bytes() == diffed.read_bytes()
    with Patch.open(saved) as patch:
        assert patch.plan.target_name == "out"
        assert 0 < patch.plan.changed <= report.kept
        assert set(patch) == {row.tensor for row in report.linears}
    plain = tmp_path / "plain"
    patch_checkpoint(base, tuned, plain, options=OPTIONS)
    apply_patch(base, saved, tmp_path / "applied")
    assert content(out) == content(plain) == content(tmp_path / "applied")


def test_without_a_checkpoint_the_patch_is_the_same(tmp_path: Path) -> None:
    base, tuned = llama_pair(tmp_path)
    with_it, without = tmp_path / "with.safetensors", tmp_path / "without.safetensors"
    patch_to_file(base, tuned, tmp_path / "out", save_patch=with_it, options=OPTIONS)
    before = names_in(tmp_path)
    patch_to_file(base, tuned, "out", save_patch=without, checkpoint=False, options=OPTIONS)
    assert names_in(tmp_path) == sorted([*before, without.name])
    assert without.read_bytes() == with_it.read_bytes()


def test_a_place_that_cannot_be_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = llama_pair(tmp_path)
    old = tmp_path / "old.safetensors"
    old.write_bytes(b"old")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(saving, "patch_checkpoint", lambda *_, **__: pytest.fail("it ran"))
    for place, error, sentence in (
        (old, OutputError, "exists already"),
        (base / "p.safetensors", OutputError, "is, or lies in, the input"),
        (tmp_path / "out" / "p.safetensors", OutputError, "is, or lies in, the input"),
        (tmp_path / "none" / "p.safetensors", OutputError, "make it first"),
        (tmp_path / "p.bin", UsageError, "must end in .safetensors"),
    ):
        with pytest.raises(error, match=sentence):
            patch_to_file(base, tuned, tmp_path / "out", save_patch=place, options=OPTIONS)
    assert old.read_bytes() == b"old"
    assert names_in(tmp_path) == ["base", "old.safetensors", "out", "tuned"]


def test_a_patch_alone_is_not_resumed(tmp_path: Path) -> None:
    base, tuned = llama_pair(tmp_path)
    before = names_in(tmp_path)
    run = {"save_patch": tmp_path / "p.safetensors", "checkpoint": False}
    with pytest.raises(UsageError, match="resume 'required' without a checkpoint: nothing is kept"):
        patch_to_file(base, tuned, "out", options=RunOptions(resume="required"), **run)
    with pytest.raises(KeyboardInterrupt) as caught:
        patch_to_file(base, tuned, "out", options=OPTIONS, progress=StopAfter(3), **run)
    assert not isinstance(caught.value, StoppedError)
    assert names_in(tmp_path) == before


@pytest.mark.parametrize("checkpoint", [True, False])
def test_what_fails_leaves_nothing_half_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: bool
) -> None:
    base, tuned = llama_pair(tmp_path)
    out, place = tmp_path / "out", tmp_path / "p.safetensors"
    options = replace(OPTIONS, resume="never")
    run = {"save_patch": place, "checkpoint": checkpoint, "options": options}
    before = names_in(tmp_path)

    def broken(*_: object) -> None:
        raise StorageError("the disk is gone")

    with monkeypatch.context() as failing:
        failing.setattr(StagedCheckpoint, "commit", broken)
        with pytest.raises(StorageError, match="the disk is gone"):
            patch_to_file(base, tuned, out, **run)
        assert names_in(tmp_path) == before
    monkeypatch.setattr(writer.GrowingFile, "commit", broken)
    with pytest.raises(StorageError, match="the disk is gone"):
        patch_to_file(base, tuned, out, **run)
    assert names_in(tmp_path) == sorted([*before, "out"] if checkpoint else before)


def test_a_patch_that_a_killed_run_did_not_come_to_is_written_later(tmp_path: Path) -> None:
    base, tuned = llama_pair(tmp_path)
    out, place, whole = (tmp_path / name for name in ("out", "p.safetensors", "w.safetensors"))
    run = """
import os, signal, sys
from tailor_fast.calibration.options import RunOptions
from tailor_fast.patching import saving
saving.write_patch = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
saving.patch_to_file(*sys.argv[1:4], save_patch=sys.argv[4])
"""
    command = [sys.executable, "-c", run, *map(str, (base, tuned, out, place))]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    written = content(out)
    assert not place.exists()
    remedy = re.escape(f"if only its patch is missing, run `tailor-fast diff {base} {out} -o ")
    with pytest.raises(OutputExistsError, match=f"out: exists already; {remedy}"):
        patch_to_file(base, tuned, out, save_patch=place)
    assert names_in(tmp_path) == ["base", "out", "tuned"]  # what the killed run left is gone
    assert content(out) == written
    diff_checkpoints(base, out, place)
    again = replace(RunOptions(), overwrite=True)
    patch_to_file(base, tuned, out, save_patch=whole, options=again)
    assert content(out) == written
    assert place.read_bytes() == whole.read_bytes()


def test_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tailor_fast = CommandLine(capsys)
    base, tuned = llama_pair(tmp_path)
    monkeypatch.chdir(tmp_path)
    ran = tailor_fast("patch", base, tuned, "-o", "out", "--save-patch", "p.safetensors")
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert lines[0].split() == ["out", "out"]
    assert lines[1].startswith("patch    p.safetensors, ")
    assert "writing the patch to" in ran.err
    saved = ("--save-patch", "q.safetensors", "--no-checkpoint")
    ran = tailor_fast("patch", base, tuned, "-o", "out", *saved)
    assert ran.code == 0
    assert ran.out.splitlines()[0].startswith("patch  q.safetensors, ")
    assert "report" not in ran.out
    assert Path("p.safetensors").read_bytes() == Path("q.safetensors").read_bytes()
    ran = tailor_fast("patch", base, tuned, "-o", "x", "--no-checkpoint")
    assert (ran.code, ran.out) == (2, "")
    assert "--no-checkpoint leaves nothing to write; expected --save-patch with it" in ran.err
