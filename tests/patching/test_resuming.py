"""Stopped, killed, out of room: the next run goes on, and its bytes are those of one run."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tailor_fast._core.errors import StoppedError, StorageError
from tailor_fast._core.progress import Silent
from tailor_fast.calibration import calibrate
from tailor_fast.calibration.options import RunOptions
from tailor_fast.checkpoint import REPORT_NAME, ResumeError, StagedCheckpoint
from tailor_fast.patching import records
from tailor_fast.patching.checkpoints import patch_checkpoint, plan_patch
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.records import PICTURE_NAME
from tests.checkpoint.files import tree
from tests.patching.disk import llama_pair, write_texts

OPTIONS = RunOptions(max_shard_bytes=40_000, batch_size=4)
TIMED = (REPORT_NAME, PICTURE_NAME)


class StopAfter(Silent):
    """Ctrl-C when so many groups are finished."""

    def __init__(self, groups: int) -> None:
        self.groups = groups

    def group(self, name: str, done: int, total: int, bytes_done: int) -> None:
        if done == self.groups:
            raise KeyboardInterrupt


def lasting(out: Path) -> dict[str, bytes]:
    """Everything that must be equal to the last byte."""
    return {name: data for name, data in tree(out).items() if name not in TIMED}


def golden(base: Path, tuned: Path, **data: Any) -> dict[str, bytes]:
    """What one run without a break writes."""
    out = base.parent / "golden" / "out"
    out.parent.mkdir()
    patch_checkpoint(base, tuned, out, **{"options": OPTIONS, **data})
    return lasting(out)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def stop(out: Path, base: Path, tuned: Path, groups: int = 3, **more: Any) -> None:
    options = {"options": OPTIONS, **more}
    with pytest.raises(StoppedError, match="are finished and kept; run the same again") as caught:
        patch_checkpoint(base, tuned, out, progress=StopAfter(groups), **options)
    assert isinstance(caught.value, KeyboardInterrupt)
    assert caught.value.exit_code == 75
    assert not out.exists()
    assert len(left(out.parent)) == 2  # the directory and its journal, no lock


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that are written from here on."""
    names: list[str] = []
    write = StagedCheckpoint.write

    def noting(self: StagedCheckpoint, name: str, *rest: Any) -> None:
        names.append(name)
        write(self, name, *rest)

    monkeypatch.setattr(StagedCheckpoint, "write", noting)
    return names


RUNS: dict[str, tuple[Recipe, tuple[str, ...]]] = {
    "data-free": (Recipe(), ()),
    "data-free, global": (Recipe(scope="global"), ()),
    "asymmetric": (Recipe(), ("calibration",)),
    "no propagation": (Recipe(propagate="none"), ("calibration",)),
    "per block": (Recipe(group="block", propagate="sequential"), ("calibration",)),
    "scope layer": (Recipe(scope="layer"), ("calibration", "retain")),
    "statistics": (Recipe(), ("statistics",)),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_goes_on_with_the_same_bytes(
    name: str, tmp_path: Path, written: list[str]
) -> None:
    recipe, wanted = RUNS[name]
    base, tuned = llama_pair(tmp_path)
    data: dict[str, Any] = {"recipe": recipe}
    if "statistics" in wanted:
        data["statistics"] = tmp_path / "sums.safetensors"
        calibrate(tuned, write_texts(tmp_path / "texts.jsonl"), data["statistics"])
    else:
        data |= {role: write_texts(tmp_path / f"{role}.jsonl") for role in wanted}
    place, out = tmp_path / "golden" / "out", tmp_path / "resumed" / "out"
    for path in (place, out):
        path.parent.mkdir()
    whole = patch_checkpoint(base, tuned, place, options=OPTIONS, **data)
    stop(out, base, tuned, groups=6 if recipe.group == "block" else 3, **data)
    before = set(written)
    written.clear()
    required = replace(OPTIONS, resume="required")
    report = patch_checkpoint(base, tuned, out, options=required, **data)
    assert lasting(out) == lasting(place)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert 0 < len(set(written)) < len(before)
    assert any(note.endswith("were finished by an earlier run") for note in report.notes)
    assert [(row.name, row.kept, row.loss) for row in report.linears] == [
        (row.name, row.kept, row.loss) for row in whole.linears
    ]


def touch(path: Path) -> None:
    os.utime(path / "model.safetensors.index.json")
    shard = next(path.glob("model-00001*"))
    raw = shard.read_bytes()
    shard.write_bytes(raw)  # the same bytes: only the system knows that they were written


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda base, more: more.update(recipe=Recipe(density=0.2)), "recipe.density was 0.1, is"),
        (lambda base, more: touch(base), "inputs.base.model-00001-of-"),
        (
            lambda base, more: more.update(options=replace(OPTIONS, batch_size=3)),
            "options.batch_size was 4, is 3",
        ),
        (
            lambda base, more: more.update(options=replace(OPTIONS, max_shard_bytes=30_000)),
            "output_files was",
        ),
        (
            lambda base, more: (base / "generation_config.json").write_text("{}"),
            "inputs.base.generation_config.json was",
        ),
    ],
)
def test_what_changed_is_refused(
    tmp_path: Path, change: Callable[[Path, dict[str, Any]], object], sentence: str
) -> None:
    base, tuned = llama_pair(tmp_path)
    out = tmp_path / "out"
    stop(out, base, tuned)
    kept = {path: tree(tmp_path / path) for path in left(tmp_path) if "journal" not in path}
    more: dict[str, Any] = {"options": OPTIONS}
    change(base, more)
    for mode in ("auto", "required"):
        again = {**more, "options": replace(more["options"], resume=mode)}
        with pytest.raises(ResumeError, match="tensors that an earlier run finished") as caught:
            patch_checkpoint(base, tuned, out, **again)
        assert caught.value.exit_code == 73
        assert sentence in str(caught.value)
        assert "undo the change, or start over: resume 'never', or remove" in str(caught.value)
        assert {path: tree(tmp_path / path) for path in kept} == kept
    more["options"] = replace(more["options"], resume="never")
    patch_checkpoint(base, tuned, out, **more)
    assert left(tmp_path) == []


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = llama_pair(tmp_path)
    stop(tmp_path / "out", base, tuned)
    monkeypatch.setattr(records, "__version__", "99")
    with pytest.raises(ResumeError, match=r'versions.tailor_fast was ".*", is "99"'):
        patch_checkpoint(base, tuned, tmp_path / "out", options=OPTIONS)


def test_required_without_anything_to_go_on_from(tmp_path: Path) -> None:
    base, tuned = llama_pair(tmp_path)
    with pytest.raises(ResumeError, match="no earlier run left anything to go on from; use"):
        patch_checkpoint(base, tuned, tmp_path / "out", options=RunOptions(resume="required"))
    assert left(tmp_path) == []


def damaged_word(folder: Path) -> None:
    """One bit of a finished tensor."""
    shard = min(folder.glob(".out.tailor-*/*.safetensors*"))
    raw = bytearray(shard.read_bytes())
    raw[4096] ^= 1
    shard.write_bytes(raw)


def torn_journal(folder: Path) -> None:
    journal = next(folder.glob("*.journal"))
    os.truncate(journal, journal.stat().st_size - 10)


def damaged_journal(folder: Path) -> None:
    journal = next(folder.glob("*.journal"))
    raw = bytearray(journal.read_bytes())
    raw[raw.index(b"\n") + 30] ^= 1
    journal.write_bytes(raw)


def lost_file(folder: Path) -> None:
    min(folder.glob(".out.tailor-*/*.safetensors*")).unlink()


def stray_file(folder: Path) -> None:
    (next(folder.glob(".out.tailor-*[0-9a-f]")) / "config.json").write_bytes(b"half")


@pytest.mark.parametrize(
    "damage", [damaged_word, torn_journal, damaged_journal, lost_file, stray_file]
)
def test_what_was_damaged_meanwhile_is_made_again(
    damage: Callable[[Path], None], tmp_path: Path, written: list[str]
) -> None:
    base, tuned = llama_pair(tmp_path)
    out, expected = tmp_path / "out", golden(base, tuned)
    stop(out, base, tuned, groups=6)
    damage(tmp_path)
    written.clear()
    patch_checkpoint(base, tuned, out, options=OPTIONS)
    assert lasting(out) == expected
    assert left(tmp_path) == []
    assert written


def test_it_can_be_stopped_again_and_again(tmp_path: Path) -> None:
    base, tuned = llama_pair(tmp_path)
    new = write_texts(tmp_path / "new.jsonl")
    out, expected = tmp_path / "out", golden(base, tuned, calibration=new)
    for groups in (2, 3, 4, 6):
        stop(out, base, tuned, groups, calibration=new)
    patch_checkpoint(base, tuned, out, calibration=new, options=OPTIONS)
    assert lasting(out) == expected


def test_never_leaves_nothing(tmp_path: Path) -> None:
    base, tuned = llama_pair(tmp_path)
    never = replace(OPTIONS, resume="never")
    with pytest.raises(KeyboardInterrupt) as caught:
        patch_checkpoint(base, tuned, tmp_path / "out", progress=StopAfter(3), options=never)
    assert not isinstance(caught.value, StoppedError)
    assert left(tmp_path) == []


def test_a_plan_leaves_what_is_finished(tmp_path: Path) -> None:
    base, tuned = llama_pair(tmp_path)
    stop(tmp_path / "out", base, tuned)
    before = tree(tmp_path)
    plan_patch(base, tuned, tmp_path / "out", options=OPTIONS)
    assert tree(tmp_path) == before


def test_the_old_output_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    base, tuned = llama_pair(tmp_path)
    out, options = tmp_path / "out", replace(OPTIONS, overwrite=True)
    patch_checkpoint(base, tuned, out, Recipe(density=0.5), options=OPTIONS)
    old = tree(out)
    with pytest.raises(StoppedError):
        patch_checkpoint(base, tuned, out, progress=StopAfter(3), options=options)
    assert tree(out) == old
    patch_checkpoint(base, tuned, out, options=options)
    assert lasting(out) == golden(base, tuned)
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("call", "code", "kept"),
    [("pwrite", errno.ENOSPC, True), ("pwrite", errno.EIO, False), ("fsync", errno.EIO, False)],
)
def test_what_a_failed_write_keeps(
    call: str, code: int, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk took nothing wrong; after any other failure nobody knows what it holds."""
    base, tuned = llama_pair(tmp_path)
    real, calls = getattr(os, call), []

    def failing(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 60 // (1 if call == "pwrite" else 20):
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    with monkeypatch.context() as broken:
        broken.setattr(os, call, failing)
        with pytest.raises(StorageError) as caught:
            patch_checkpoint(base, tuned, tmp_path / "out", options=OPTIONS)
    notes = getattr(caught.value, "__notes__", [])
    assert bool(notes) == kept == bool(left(tmp_path))
    patch_checkpoint(base, tuned, tmp_path / "out", options=OPTIONS)
    assert lasting(tmp_path / "out") == golden(base, tuned)
