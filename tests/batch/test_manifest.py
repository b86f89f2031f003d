"""A manifest is settled, or refused in one sentence, before anything runs."""

from pathlib import Path

import pytest

from tailor_fast._core.errors import InputError, UsageError
from tailor_fast.batch import read_manifest

JOB = "{base: b, tuned: t, out: o}"


def written(folder: Path, text: str) -> Path:
    path = folder / "jobs.yaml"
    path.write_text(text)
    return path


def test_defaults_and_what_jobs_add(tmp_path: Path) -> None:
    for name in ("base", "a", "b"):
        (tmp_path / "models" / name).mkdir(parents=True)
    text = """
defaults:
  base: models/base
  calibration: /data/new.jsonl
  recipe: {density: 0.05, scope: row}
  max_ram: 2GiB
jobs:
  - {tuned: models/a, out: out/a}
  - {name: b, tuned: models/b, out: out/b, recipe: {density: 0.2}, max_ram: null, samples: null}
"""
    first, second = read_manifest(written(tmp_path, text))
    assert (first.base, first.tuned) == (tmp_path / "models/base", tmp_path / "models/a")
    assert first.calibration == Path("/data/new.jsonl")
    assert (first.recipe.density, first.recipe.scope) == (0.05, "row")
    assert (second.recipe.density, second.recipe.scope) == (0.2, "row")
    assert (first.label, second.label) == ("a", "b")
    options = first.options(overwrite=True)
    assert (options.max_ram, options.overwrite, options.samples) == (2 << 30, True, 128)
    options = second.options(overwrite=False)
    assert (options.max_ram, options.overwrite, options.samples) == (None, False, None)
    assert options.max_shard_bytes == 5_000_000_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("jobs: []", r"jobs must be a list of at least one job; got \[\]"),
        ("{}", "jobs must be a list of at least one job; got None"),
        ("jobs: 3", "jobs must be a list of at least one job; got 3"),
        (
            f"jobs: [{JOB}]\nreport: x",
            "unknown key 'report'; the keys of a manifest are def",
        ),
        (f"jobs: [{JOB}]\ndefaults: 3", "defaults must be keys and values; got 3"),
        (f"jobs: [{JOB}]\ndefaults: {{out: x}}", "defaults: out belongs to each job alone"),
        (f"jobs: [{JOB}, 4]", "job 2: expected keys and values; got 4"),
        ("jobs: [{base: b, out: o}]", "job 1: tuned is missing"),
        ("jobs: [{base: b, tuned: t, out: o, densty: 1}]", "job 1: unknown key 'densty'; the keys"),
        (
            "jobs: [{base: b, tuned: t, out: o, recipe: {densty: 1}}]",
            r"job 1: unknown key 'recipe\.densty'; the keys of a recipe are density, ",
        ),
        (
            "jobs: [{base: b, tuned: t, out: o, recipe: {density: 2}}]",
            r"job 1: recipe.density: Input should be less than or equal to 1; got 2",
        ),
        ("jobs: [{base: b, tuned: t, out: o, max_ram: much}]", "max_ram: a size must be like 5GB"),
        ("jobs: [{base: b, tuned: t, out: o, device: gpu}]", "device: String should match pattern"),
        ("jobs: [{base: b, tuned: t, out: o, samples: 0}]", "samples: Input should be greater"),
        (
            f"jobs: [{JOB}, {{base: b, tuned: u, out: ./o, name: p}}]",
            "2 jobs have out .*/o; ex",
        ),
        (f"jobs: [{JOB}, {{base: b, tuned: u, out: p, name: o}}]", "2 jobs have name o; expected"),
        (f"jobs: [{JOB}]\njobs: []", "a key occurs twice, 'jobs'; expected each of them once"),
        ("jobs: [{base: b, base: c, tuned: t, out: o}]", "a key occurs twice, 'base'"),
        ("jobs: [", "is not YAML"),
        ("- 1", "expected keys and values; got list"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UsageError, match=message) as caught:
        read_manifest(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"jobs.yaml: cannot be read: No such file"):
        read_manifest(tmp_path / "jobs.yaml")
