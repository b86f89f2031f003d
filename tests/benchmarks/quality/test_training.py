"""Training learns, fine-tuning changes what it says, and a folder is used again or refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.quality import evaluation, tinyllava, training
from benchmarks.quality.training import Pair
from tests.benchmarks.quality.conftest import INSTANT, QUICK


def test_the_base_learns_and_the_tuned_model_forgets(pair: Pair) -> None:
    tasks = QUICK.pretraining.tasks
    base, tuned = (
        evaluation.evaluate(tinyllava.load(made.folder), "next", old_tasks=tasks, count=200)
        for made in (pair.base, pair.tuned)
    )
    assert base.old["what"] > 60  # chance is 10%
    assert base.old["parity"] > 70  # chance is 50%
    assert base.new < 20
    assert tuned.new > base.new + 20
    assert tuned.old["what"] < base.old["what"] - 10


def test_finetuning_leaves_the_frozen_weights_alone(pair: Pair) -> None:
    base = tinyllava.load(pair.base.folder).state_dict()
    tuned = tinyllava.load(pair.tuned.folder).state_dict()
    moved = {name for name, weight in base.items() if not torch.equal(weight, tuned[name])}
    trained = ("language_model.layers.2.", "language_model.layers.3.", "multi_modal_projector.")
    assert moved == {name for name in base if any(part in name for part in trained)}


def test_calibration_data_is_written(pair: Pair) -> None:
    new = pair.new_data.read_text(encoding="utf-8").splitlines()
    old = pair.old_data.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["prompt"].split()[1] for line in new] == ["next"] * 6
    assert [json.loads(line)["prompt"].split()[1] for line in old] == ["what", "parity"] * 4


def _make(work: Path, setting: training.Setting) -> tuple[Pair, list[str]]:
    said: list[str] = []
    return training.make_pair(work, setting, said.append), said


def test_a_folder_that_matches_is_used_again(tmp_path: Path) -> None:
    first, said = _make(tmp_path, INSTANT)
    assert [line.split(":")[0] for line in said] == ["base", "tuned"]
    again, said = _make(tmp_path, INSTANT)
    assert again == first
    assert said == [f"base: using {tmp_path / 'base'}", f"tuned: using {tmp_path / 'tuned'}"]


def test_another_base_makes_another_tuned_model(tmp_path: Path) -> None:
    first, _ = _make(tmp_path, INSTANT)
    before = tinyllava.load(first.tuned.folder).state_dict()
    setting = replace(INSTANT, pretraining=replace(INSTANT.pretraining, seed=1))
    second, said = _make(tmp_path, setting)
    assert not any("using" in line for line in said)
    assert second.tuned.fingerprint != first.tuned.fingerprint
    after = tinyllava.load(second.tuned.folder).state_dict()
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def test_another_finetuning_keeps_the_base(tmp_path: Path) -> None:
    _make(tmp_path, INSTANT)
    setting = replace(INSTANT, finetuning=replace(INSTANT.finetuning, seed=1))
    _, said = _make(tmp_path, setting)
    assert said[0] == f"base: using {tmp_path / 'base'}"
    assert "trained" in said[1]


def test_the_same_setting_gives_the_same_weights_on_any_number_of_cores(
    tmp_path: Path, set_num_threads: Callable[[int], None]
) -> None:
    states = []
    for threads in (1, 2):
        set_num_threads(threads)
        made, _ = _make(tmp_path / str(threads), INSTANT)
        assert torch.get_num_threads() == threads
        states.append(tinyllava.load(made.tuned.folder).state_dict())
    assert all(torch.equal(weight, states[1][name]) for name, weight in states[0].items())


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(FileExistsError, match="was not made here; name another work folder"):
        _make(tmp_path, INSTANT)
    assert (tmp_path / "base" / "mine.txt").exists()


def test_an_interrupted_run_starts_again(tmp_path: Path) -> None:
    staged = tmp_path / "base.partial"
    staged.mkdir(parents=True)
    (staged / "model.safetensors").write_text("half", encoding="utf-8")
    made, _ = _make(tmp_path, INSTANT)
    assert not staged.exists()
    assert not (made.base.folder / "model.safetensors").exists()


def test_progress_is_reported_in_steps(tmp_path: Path) -> None:
    said: list[str] = []
    setting = replace(INSTANT.pretraining, steps=training.REPORT_EVERY, per_task=1)
    training.make_base(tmp_path / "base", setting, said.append)
    assert said[0].startswith(f"  step {setting.steps}/{setting.steps}, loss ")
