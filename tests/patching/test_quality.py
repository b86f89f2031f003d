"""The order that the method must show, on a LLaVA trained for the occasion."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.quality import evaluation, tinyllava, training
from tailor_fast.calibration import RunOptions
from tailor_fast.patching import Recipe, patch_checkpoint

RECIPES = {
    "exact": Recipe(),
    "obs": Recipe(decorate="obs", sensitivity="weight", propagate="none"),
    "mask": Recipe(decorate="none", sensitivity="weight", propagate="none"),
}


@pytest.mark.slow
def test_exact_beats_the_sweep_and_the_sweep_the_bare_mask(tmp_path: Path) -> None:
    setting = training.SMALL
    pair = training.make_pair(tmp_path, setting, report=lambda _line: None)
    base, tuned = pair.base.folder, pair.tuned.folder
    folders = {"base": base, "tuned": tuned} | {name: tmp_path / name for name in RECIPES}
    options = RunOptions(batch_size=64)
    for name, recipe in RECIPES.items():
        data = pair.new_data
        patch_checkpoint(base, tuned, folders[name], recipe, calibration=data, options=options)
    tasks = setting.pretraining.tasks
    scores = {
        name: evaluation.evaluate(
            tinyllava.load(folder), setting.finetuning.task, old_tasks=tasks, count=200
        )
        for name, folder in folders.items()
    }
    new = {name: score.new for name, score in scores.items()}
    old = {name: score.old_mean for name, score in scores.items()}
    assert old["tuned"] < old["base"] - 10, old  # it forgets
    assert new["tuned"] > new["base"] + 50, new  # and has learned
    assert new["exact"] > new["obs"] > new["mask"], new
    assert all(old[name] > old["tuned"] for name in RECIPES), old
