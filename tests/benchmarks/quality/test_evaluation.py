"""Accuracy counts exact answers, and shares count elements."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.quality import evaluation, scenes, tinyllava
from benchmarks.quality.evaluation import Scores
from benchmarks.quality.families import FAMILIES
from benchmarks.quality.training import Pair
from tailor_fast.evaluation import EvaluationTask, GenerationOptions, evaluate_models


class Parrot:
    """Generates given answers, as ``generate`` returns them: after the prompt."""

    def __init__(self, said: torch.Tensor) -> None:
        self.said = said

    def generate(self, *, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.cat([input_ids, self.said], dim=1)


def _truth(task: str, count: int) -> torch.Tensor:
    drawn = scenes.draw(task, "test", count, evaluation.TEST_SEED)
    return tinyllava.encode([drawn]).answer_ids


def _accuracy(said: torch.Tensor, task: str) -> float:
    return evaluation.accuracy(Parrot(said), task, "test", len(said), evaluation.TEST_SEED)


def test_only_whole_answers_count() -> None:
    truth = _truth("list", 8)
    assert _accuracy(truth, "list") == 100
    wrong = truth.clone()
    wrong[0, 3] = tinyllava.IDS["yes"]  # the last digit
    wrong[1, 4] = tinyllava.IDS["1"]  # goes on where it should end
    assert _accuracy(wrong, "list") == 75


def test_generation_that_ends_early_is_wrong_and_fits() -> None:
    assert _accuracy(_truth("list", 4)[:, :3], "list") == 0
    assert _accuracy(torch.full((4, 1), tinyllava.EOS), "what") == 0


def test_means() -> None:
    scores = Scores({"what": 90.0, "list": 70.0}, new=40.0)
    assert scores.old_mean == 80
    assert scores.h_mean == pytest.approx(2 * 80 * 40 / 120)
    assert Scores({"what": 0.0}, new=0.0).h_mean == 0
    base, tuned = Scores({"what": 100.0, "list": 60.0}, 0.0), Scores({"what": 0.0}, 50.0)
    assert scores.figures(base, tuned) == {
        "what": 90.0,
        "list": 70.0,
        "old mean": 80.0,
        "new": 40.0,
        "new mean": 40.0,
        "old kept": 100.0,
        "new kept": 80.0,
        "H-mean": scores.h_mean,
        "mean over tasks": pytest.approx(200 / 3),
        "mean of old and new": 60.0,
    }
    assert "old kept" not in scores.figures(tuned=tuned)


def test_tailor_fast_evaluate_gives_the_accuracies_of_the_harness(
    pair: Pair, tmp_path: Path
) -> None:
    tasks = {"what": False, "parity": False, "next": True}
    asked = []
    for task, new in tasks.items():
        path = tmp_path / task / "scenes.jsonl"
        path.parent.mkdir()
        scenes.write([scenes.draw(task, "test", 60, evaluation.TEST_SEED)], path)
        asked.append(EvaluationTask(task, path, new=new))
    folders = {"base": pair.base.folder, "tuned": pair.tuned.folder}
    found = evaluate_models(
        folders, asked, tmp_path / "out", options=GenerationOptions(batch_size=60)
    )
    for name, folder in folders.items():
        model = tinyllava.load(folder)
        expected = evaluation.evaluate(model, "next", old_tasks=["what", "parity"], count=60)
        assert found[name].old == pytest.approx(expected.old)
        assert found[name].new["next"] == pytest.approx(expected.new)
        for task in tasks:
            batch = tinyllava.encode([scenes.draw(task, "test", 60, evaluation.TEST_SEED)])
            right = FAMILIES["llava"].right(model, batch).double().mean().item()
            said = {**found[name].old, **found[name].new}[task]
            assert 100 * right == pytest.approx(said)


def test_validation_asks_other_questions_than_test(pair: Pair) -> None:
    class Listener:
        def __init__(self) -> None:
            self.seen: list[torch.Tensor] = []

        def generate(
            self, *, input_ids: torch.Tensor, pixel_values: torch.Tensor, **_: Any
        ) -> torch.Tensor:
            self.seen.append(pixel_values)
            return input_ids

    heard = {}
    for split in ("test", "validation"):
        heard[split] = Listener()
        for _ in range(2):
            evaluation.evaluate(heard[split], "code", old_tasks=["what"], split=split, count=5)
    for listener in heard.values():
        assert torch.equal(listener.seen[0], listener.seen[2])  # the same for every model
        assert torch.equal(listener.seen[1], listener.seen[3])
    assert not torch.equal(heard["test"].seen[0], heard["validation"].seen[0])


def test_files_lead_to_the_same_answers(pair: Pair) -> None:
    said = evaluation.check_processor(pair.base.folder, ["what", "parity"], count=20)
    expected = [
        answer
        for task in ("what", "parity")
        for answer in scenes.draw(task, "test", 20, evaluation.TEST_SEED).answers
    ]
    right = sum(one == other for one, other in zip(said, expected, strict=True))
    assert right > 24  # words, not ids: most of a trained model's answers


def test_a_processor_that_differs_is_noticed(pair: Pair, tmp_path: Path) -> None:
    model = tinyllava.load(pair.base.folder)
    tinyllava.save(model, tmp_path)
    path = tmp_path / "processor_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["image_processor"]["image_mean"] = [3.0] * 3
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(RuntimeError, match="what: the processor leads to"):
        evaluation.check_processor(tmp_path, ["what"], count=20)


def test_the_targets_are_the_linears_that_differ(pair: Pair) -> None:
    base, tuned = (tinyllava.load(made.folder) for made in (pair.base, pair.tuned))
    names = evaluation.tuned_linears(base, tuned)
    assert len(names) == 2 * 7 + 2  # two decoder layers and the projector
    modules = dict(base.named_modules())
    assert all(isinstance(modules[name.removesuffix(".weight")], nn.Linear) for name in names)
    with torch.no_grad():
        tuned.lm_head.weight.add_(1)
    assert evaluation.tuned_linears(base, tuned) == names  # heads do not count


def test_the_changed_share_counts_elements() -> None:
    base = {"a": torch.zeros(3, 4), "b": torch.zeros(4), "c": torch.zeros(100)}
    other = {name: weight.clone() for name, weight in base.items()}
    other["a"][0, 1] = 1
    other["b"][:3] = -1
    assert evaluation.changed_share(base, other, ["a", "b"]) == 4 / 16
    assert evaluation.changed_share(base, other, ["c"]) == 0
    with pytest.raises(ValueError, match="changed_share: names must hold at least one tensor"):
        evaluation.changed_share(base, other, [])
