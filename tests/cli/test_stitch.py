"""``stitch`` on real files: options, tables, exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tailor_fast.patchfile import diff_checkpoints
from tailor_fast.stitching import Task, stitch_checkpoints
from tests.cli.running import CommandLine
from tests.stitching.disk import OPTIONS, family, take_statistics, words


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    _, tuned = family(folder, "ab", blocks=1)
    for name, path in tuned.items():
        take_statistics(path, folder / f"{name}.jsonl")
    return folder


def given(made: Path, option: str = "--statistics", ending: str = "safetensors") -> list[object]:
    models = [made / "base", made / "tuned-a", made / "tuned-b"]
    return [*models, *(x for name in "ab" for x in (option, made / f"{name}.{ending}"))]


def test_two_tasks_are_stitched_and_verified(
    tailor_fast: CommandLine, made: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    choices = ("--weight", "1", "--weight", "2.5", "--name", "sums", "--name", "signs")
    ran = tailor_fast("stitch", *given(made), "-o", out, *choices, "--density", "0.08")
    assert ran.code == 0, ran.err
    rows = [line.split() for line in ran.out.splitlines()[1:3]]
    assert [row[:2] for row in rows] == [["sums", "1"], ["signs", "2.5"]]
    assert all(0 < float(row[2]) < 1 for row in rows)
    assert tailor_fast("verify", out).code == 0
    shown = tailor_fast("inspect", out).out
    assert f"sums, weight 1: {made / 'tuned-a'}" in shown
    assert f"signs, weight 2.5: {made / 'tuned-b'}" in shown

    from tailor_fast.patching import Recipe

    tasks = {
        name: Task(made / f"tuned-{name}", statistics=made / f"{name}.safetensors", weight=weight)
        for name, weight in (("a", 1.0), ("b", 2.5))
    }
    again = tmp_path / "again"
    stitch_checkpoints(made / "base", tasks, again, Recipe(density=0.08), options=OPTIONS)
    ours, theirs = words(out), words(again)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_samples_in_place_of_statistics(
    tailor_fast: CommandLine, made: Path, tmp_path: Path
) -> None:
    outs = tmp_path / "taken", tmp_path / "given"
    small = ("--batch-size", "4", "--support", "best", "-q")
    samples = given(made, "--calibration", "jsonl")
    assert tailor_fast("stitch", *samples, "-o", outs[0], *small) == (0, "", "")
    assert tailor_fast("stitch", *given(made), "-o", outs[1], *small) == (0, "", "")
    taken, from_files = map(words, outs)
    assert all(torch.equal(taken[name], from_files[name]) for name in taken)


def test_patches_are_the_surrogate(tailor_fast: CommandLine, made: Path, tmp_path: Path) -> None:
    patches = []
    for name in "ab":
        patches.append(tmp_path / f"{name}.tailor.safetensors")
        diff_checkpoints(made / "base", made / f"tuned-{name}", patches[-1])
    statistics = given(made)[3:]
    ran = tailor_fast(
        *("stitch", made / "base", *patches, "-o", tmp_path / "out", "--from-patches"),
        *statistics,
    )
    assert ran.code == 0, ran.err
    assert "surrogate for a, b" in ran.out
    assert ran.out.splitlines()[1].split()[0] == "a"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "expected --statistics or --calibration, one of them, once for each TUNED"),
        (("--statistics", "x"), "--statistics is given 1 times for 2 models"),
        (("--calibration", "x", "--calibration", "y", "--weight", "1"), "--weight is given 1"),
        (
            ("--statistics", "x", "--statistics", "y", "--name", "n", "--name", "n"),
            "2 tasks are called 'n'; tell them apart with --name",
        ),
        (("--statistics", "x", "--statistics", "y", "--decorate", "obs"), "decorate 'obs' is for"),
    ],
)
def test_requests_that_contradict_themselves(
    tailor_fast: CommandLine, made: Path, tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    models = given(made)[:3]
    ran = tailor_fast("stitch", *models, "-o", tmp_path / "out", *arguments)
    assert ran.code == 2
    assert sentence in ran.err
    assert not list(tmp_path.iterdir())
