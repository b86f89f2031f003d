"""``target_old``: the search along the front, what it leaves, what it says, what it refuses."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailor_fast import patch_checkpoint, plan_patch
from tailor_fast._core.errors import InputError, StoppedError, TailorError, UsageError
from tailor_fast._core.processes import ALONE
from tailor_fast._core.progress import Silent
from tailor_fast.calibration.options import RunOptions
from tailor_fast.calibration.streamed import StreamedModel, skeleton_of
from tailor_fast.checkpoint import (
    Hashed,
    OutputExistsError,
    OutputLockedError,
    open_checkpoint,
)
from tailor_fast.checkpoint.staging import Staging
from tailor_fast.models import map_keys
from tailor_fast.patching import targeting
from tailor_fast.patching.held_out import Answers, HeldOut
from tailor_fast.patching.job import Request
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.report import Found, Point, Tried
from tailor_fast.patching.targeting import best_of, bisect, check_target
from tests.cli.running import CommandLine
from tests.patching.disk import llama_pair, write_texts
from tests.patching.test_resuming import lasting, left

OPTIONS = RunOptions(batch_size=32)
RECIPE = Recipe(density=0.1)
DATA = ("calibration", "retain")


def tried(old: float, new: float = 0.5, error: float = 0.0) -> Tried:
    return Tried(Point(0.1, 0.1, 1 - new, 1 - old), old, error, new, 0.0)


@settings(max_examples=50)
@given(st.integers(1, 45), st.integers(0, 45))
def test_the_last_that_keeps_enough_is_found(count: int, good: int) -> None:
    """``good`` of a front's recipes keep enough: few are measured, the last of them among these."""
    front = [Point(0.1, 0.1, 1 - i / count, i / count) for i in range(count)]
    good = min(good, count)
    asked: list[int] = []

    def measure(point: Point) -> Tried:
        index = front.index(point)
        asked.append(index)
        return Tried(point, 1.0 if index < good else 0.5, 0.0, index / count, 0.0)

    measured = bisect(front, 0.9, measure)
    assert len(set(asked)) == len(asked) == len(measured) <= count.bit_length()
    if good:
        assert best_of(measured, 0.9).point is front[good - 1]
    else:
        with pytest.raises(InputError, match=r"no recipe keeps 0\.9 of the old tasks"):
            best_of(measured, 0.9)


def test_a_recipe_counts_less_its_standard_error() -> None:
    found = [tried(0.995, 0.9, error=0.006), tried(0.992, 0.7, error=0.001), tried(0.999, 0.6)]
    assert best_of(found, 0.99) is found[1]
    with pytest.raises(
        InputError, match=r"the best of 2 keeps 0\.9920 ± 0\.0010; lower target_old"
    ):
        best_of(found[:2], 0.9915)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair with samples of both tasks. The larger of two random models' knowledge is the base."""
    folder = tmp_path_factory.mktemp("target")
    base, tuned = llama_pair(folder, blocks=1)
    base.rename(folder / "swapped")
    tuned.rename(base)
    (folder / "swapped").rename(tuned)
    for seed, role in enumerate(DATA, 1):
        write_texts(folder / f"{role}.jsonl", 128, seed)
    return folder


def arguments(place: Path, **more: Any) -> dict[str, Any]:
    data = {role: place / f"{role}.jsonl" for role in DATA}
    return {**data, "target_old": 0.8, "options": OPTIONS, **more}


@pytest.fixture(scope="module")
def made(place: Path) -> tuple[Path, Found]:
    """A run without a break."""
    out = place / "made" / "out"
    out.parent.mkdir()
    report = patch_checkpoint(place / "base", place / "tuned", out, RECIPE, **arguments(place))
    assert report.target_old is not None
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    return out, report.target_old


def test_what_is_found_is_what_is_written(place: Path, made: tuple[Path, Found]) -> None:
    """The model is that of the recipe on what is fitted on, and keeps what it is said to keep."""
    out, found = made
    best = found.chosen
    assert best in found.tried
    assert best.old - best.old_error >= 0.8
    assert all(one.new <= best.new for one in found.tried if one.old - one.old_error >= 0.8)
    assert (found.held_old, found.held_new) == (64, 64)
    assert {point.density for point in found.grid} == {0.1}
    again = place / "again" / "out"
    again.parent.mkdir()
    fitted = replace(OPTIONS, part="fitted")
    recipe = Recipe(density=best.point.density, retain_weight=best.point.retain_weight)
    options = arguments(place, target_old=None, options=fitted)
    patch_checkpoint(place / "base", place / "tuned", again, recipe, **options)
    assert lasting(again) == lasting(out)
    ours, theirs = (asked(place, place / "retain.jsonl", path) for path in (place / "base", out))
    assert theirs.over(ours) == (best.old, best.old_error)
    ours, theirs = (
        asked(place, place / "calibration.jsonl", path) for path in (place / "tuned", out)
    )
    assert theirs.over(ours) == (best.new, best.new_error)


def asked(place: Path, data: Path, model: Path) -> Answers:
    with open_checkpoint(model) as file:
        source = Hashed(file)
        keys = map_keys(skeleton_of(source), file.tensors, str(model))
        streamed = StreamedModel(source, keys, torch.device("cpu"))
        return HeldOut(data, place / "tuned", streamed, OPTIONS, place).ask(streamed)


def test_the_report_says_what_was_found(made: tuple[Path, Found]) -> None:
    out, found = made
    body = json.loads((out / "tailor_report.json").read_text())
    said = body["target_old"]
    assert said["chosen"]["point"]["retain_weight"] == found.chosen.point.retain_weight
    assert body["recipe"]["retain_weight"] == found.chosen.point.retain_weight
    assert [one["old"] for one in said["tried"]] == [one.old for one in found.tried]
    assert len(said["grid"]) == len(found.grid) == 11
    assert str(found) in body["notes"]
    assert str(found).startswith("target_old 0.8: density 0.1 and retain_weight ")
    assert 0 < body["seconds"]["search"] < body["seconds"]["total"]


class Stop(Silent):
    """Ctrl-C when so many groups are finished since a note that begins so."""

    def __init__(self, note: str, groups: int) -> None:
        self._note, self._left = note, groups
        self._counts = False

    def note(self, text: str) -> None:
        self._counts |= text.startswith(self._note)

    def group(self, name: str, done: int, total: int, bytes_done: int) -> None:
        self._left -= self._counts
        if self._left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("note", ["taking statistics", "trying"])
def test_ctrl_c_in_the_search_leaves_nothing(note: str, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt) as caught:
        patch_checkpoint(
            place / "base", place / "tuned", out, RECIPE,
            **arguments(place, progress=Stop(note, 2)),
        )  # fmt: skip
    assert not isinstance(caught.value, StoppedError)
    assert list(tmp_path.iterdir()) == []


def scratch_of(out: Path) -> Staging:
    """As a search takes it, for what it makes beside OUT."""
    place = out.parent / f".{out.name}.target"
    return Staging(place, directory=True, overwrite=False, inputs=())


def test_what_a_killed_search_left_goes_with_the_next(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = os.fork()
    if child == 0:
        scratch = scratch_of(out)
        scratch.create("model")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(left(tmp_path)) == 2  # its directory and its lock
    test_ctrl_c_in_the_search_leaves_nothing("taking statistics", place, tmp_path)


def test_two_searches_for_one_output_do_not_meet(place: Path, tmp_path: Path) -> None:
    first = scratch_of(tmp_path / "out")
    with pytest.raises(OutputLockedError, match=rf"is being written by process {os.getpid()}; wa"):
        patch_checkpoint(
            place / "base", place / "tuned", tmp_path / "out", RECIPE, **arguments(place)
        )
    first.discard()
    assert left(tmp_path) == []


def test_ctrl_c_behind_the_search_is_gone_on_from(
    place: Path, made: tuple[Path, Found], tmp_path: Path
) -> None:
    pair, out = (place / "base", place / "tuned"), tmp_path / "out"
    with pytest.raises(StoppedError, match="are finished and kept; run the same again to go on"):
        patch_checkpoint(
            *pair, out, RECIPE, **arguments(place, progress=Stop("target_old 0.8: ", 2))
        )
    assert len(left(tmp_path)) == 2  # the directory and its journal
    report = patch_checkpoint(*pair, out, RECIPE, **arguments(place))
    assert any(note.endswith("were finished by an earlier run") for note in report.notes)
    assert lasting(out) == lasting(made[0])
    assert report.target_old == made[1]
    assert list(tmp_path.iterdir()) == [out]


def test_the_command_shows_what_it_tried(
    place: Path, made: tuple[Path, Found], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tailor_fast = CommandLine(capsys)
    common = (place / "base", place / "tuned", "-o", tmp_path / "out", "--device", "cpu")
    data = [part for role in DATA for part in (f"--{role}", place / f"{role}.jsonl")]
    asked = ("--target-old", 0.8, "--density", 0.1, "--batch-size", 32)
    plan = tailor_fast("plan", *common, *data, *asked)
    assert plan.code == 0, plan.err
    assert "target_old 0.8: 11 recipes by statistics, one pass over each model; then at" in plan.out
    assert "at most 4 are made in turn" in plan.out
    assert "measured on 64 samples of old tasks and 64 of the new one" in plan.out
    patch = tmp_path / "out.tailor.safetensors"
    ran = tailor_fast("patch", *common, *data, *asked, "--no-checkpoint", "--save-patch", patch)
    assert ran.code == 0, ran.err
    rows = [line.split() for line in ran.out.splitlines()]
    assert rows[0] == [
        "tried", "density", "retain", "weight", "old", "kept", "±", "new", "kept", "±",
    ]  # fmt: skip
    found = made[1]
    for row, one in zip(rows[1:], found.tried, strict=False):
        star = "*" if one == found.chosen else ""
        assert row[0] == f"{rows.index(row)}{star}"
        assert row[1:4] == ["0.1", f"{one.point.retain_weight:g}", f"{100 * one.old:.2f}%"]
    assert list(tmp_path.iterdir()) == [patch]
    apply = tailor_fast("apply", place / "base", patch, "-o", tmp_path / "applied")
    assert apply.code == 0, apply.err
    weights = "model-00001-of-"
    for file in made[0].glob(f"{weights}*"):
        assert file.read_bytes() == (tmp_path / "applied" / file.name).read_bytes()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no share": ({"target": 1.0}, "target_old must be more than 0 and less than 1; got 1.0"),
    "nan": ({"target": float("nan")}, "target_old must be more than 0 and less than 1; got nan"),
    "no old data": ({"retain": None}, "expected samples of the new task and of old ones; give cal"),
    "no new data": ({"calibration": None}, "expected samples of the new task and of old ones"),
    "no solve": (
        {"recipe": Recipe(decorate="obs")},
        "expected decorate 'exact' and a scope within",
    ),
    "a scope": ({"recipe": Recipe(scope="global")}, "got 'exact' and 'global'"),
    "all chosen": (
        {"recipe": Recipe(density=0.1, retain_weight=0.1)},
        "target_old searches density and retain_weight; both are chosen; leave one out",
    ),
    "required": ({"options": RunOptions(resume="required")}, "resume 'required' with target_old"),
    "vram": (
        {"options": RunOptions(max_vram=1 << 30)},
        "target_old does not bound the memory of the device",
    ),
    "several": ({"processes": 2}, "target_old is the work of one process; got 2; start it without"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_with_it_is_refused(name: str, tmp_path: Path) -> None:
    given, sentence = REFUSED[name]
    asked = {"recipe": Recipe(), "options": RunOptions(), "calibration": tmp_path / "new.jsonl"}
    asked |= {"retain": tmp_path / "old.jsonl", **given}
    target, count = asked.pop("target", 0.9), asked.pop("processes", 1)
    request = Request(tmp_path, tmp_path, tmp_path / "out", statistics=None, **asked)
    processes = ALONE
    if count > 1:
        processes = type("Several", (), {"count": count})()
    with pytest.raises(UsageError, match=sentence.replace("[", r"\[")):
        check_target(target, request, processes)


def test_what_cannot_work_is_refused_before_a_weight_is_read(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, out = (place / "base", place / "tuned"), tmp_path / "out"
    monkeypatch.setattr(targeting.GridJob, "follow", lambda *_: pytest.fail("it has begun"))
    few = write_texts(tmp_path / "few.jsonl", 127)
    cases: list[tuple[dict[str, Any], type[TailorError], str]] = [
        ({"retain": few}, InputError, "few.jsonl: holds 127 samples; expected at least 128"),
        ({"options": replace(OPTIONS, max_ram=1000)}, UsageError, "max_ram of 1000 bytes is too"),
        ({"target_old": 1.5}, UsageError, "target_old must be more than 0 and less than 1"),
    ]
    for run in (plan_patch, patch_checkpoint):
        for changed, kind, sentence in cases:
            with pytest.raises(kind, match=sentence):
                run(*pair, out, RECIPE, **arguments(place, **changed))
        assert [path.name for path in tmp_path.iterdir()] == ["few.jsonl"]
    out.mkdir()
    for run in (plan_patch, patch_checkpoint):
        with pytest.raises(OutputExistsError):
            run(*pair, out, RECIPE, **arguments(place))
