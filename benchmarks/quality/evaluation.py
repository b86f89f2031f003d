"""Accuracy by greedy generation, and how much of a model was changed."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoProcessor

from benchmarks.quality import tinyllava
from benchmarks.quality.scenes import OLD_TASKS, Scenes, Split, draw, write
from tailor_fast.evaluation import (
    EvaluationTask,
    GenerationOptions,
    ModelScores,
    evaluate_models,
    table_rows,
)

TEST_SEED = 2024
VALIDATION_SEED = 2025


@dataclass(frozen=True)
class Scores:
    """Accuracies in percent.

    Attributes:
        old: accuracy of each old task.
        new: accuracy of the task that the model was fine-tuned on.
    """

    old: Mapping[str, float]
    new: float

    @property
    def old_mean(self) -> float:
        """Plain mean over the old tasks."""
        return self.figures()["old mean"]

    @property
    def h_mean(self) -> float:
        """Harmonic mean of ``old_mean`` and ``new``; 0 where both are 0."""
        return self.figures()["H-mean"]

    def figures(
        self, base: "Scores | None" = None, tuned: "Scores | None" = None
    ) -> dict[str, float]:
        """Return the columns of ``tailor-fast evaluate``, in percent.

        Args:
            base: the scores that 100% kept of the old tasks means; None leaves the column out.
            tuned: the same of the new task.
        """
        models = {"": self, "base": base, "tuned": tuned}
        found = {
            name: ModelScores(scores.old, {"new": scores.new})
            for name, scores in models.items()
            if scores is not None
        }
        ends = {name: name for name in ("base", "tuned") if name in found}
        row = table_rows(found, **ends)[0]
        return {name: value for name, value in row.items() if isinstance(value, float)}


@torch.inference_mode()
def answers(model: Any, batch: tinyllava.Batch) -> torch.Tensor:
    """Generate greedily; returns ids in the shape of ``answer_ids``, ``<pad>`` after the end."""
    generated = model.generate(
        input_ids=batch.input_ids,
        attention_mask=torch.ones_like(batch.input_ids),
        pixel_values=batch.pixel_values,
        max_new_tokens=batch.answer_ids.shape[1],
        do_sample=False,
    )[:, tinyllava.PROMPT_LENGTH :]
    filled = torch.full_like(batch.answer_ids, tinyllava.PAD)
    filled[:, : generated.shape[1]] = generated
    return filled


def accuracy(model: Any, task: str, split: Split, count: int, seed: int) -> float:
    """Return the percentage of ``count`` prompts answered exactly, the end included."""
    batch = tinyllava.encode([draw(task, split, count, seed)])
    right = (answers(model, batch) == batch.answer_ids).all(dim=1)
    return 100.0 * right.double().mean().item()


def evaluate(
    model: Any,
    new_task: str,
    *,
    old_tasks: Sequence[str] = OLD_TASKS,
    split: Split = "test",
    count: int = 500,
) -> Scores:
    """Measure every old task and the new one on ``count`` prompts each.

    The scenes depend on ``split`` and the task alone, so two models are asked the same questions.
    """
    seed = TEST_SEED if split == "test" else VALIDATION_SEED
    old = {task: accuracy(model, task, split, count, seed) for task in old_tasks}
    return Scores(old, accuracy(model, new_task, split, count, seed))


def check_processor(folder: Path, tasks: Sequence[str], count: int = 4) -> list[str]:
    """Let ``tailor-fast evaluate`` ask ``count`` test prompts of each task, through PNG files.

    Returns:
        What the model said, task by task.

    Raises:
        RuntimeError: the tensors of ``encode`` lead to another answer than the files do.
    """
    model = tinyllava.load(folder)
    processor = AutoProcessor.from_pretrained(folder)
    texts = []
    for task in tasks:
        scenes = draw(task, "test", count, TEST_SEED)
        direct = tinyllava.encode([scenes])
        said = spoken(folder, task, scenes, direct.answer_ids.shape[1])
        expected = processor.batch_decode(answers(model, direct), skip_special_tokens=True)
        if said != expected:
            raise RuntimeError(f"{task}: the processor leads to {said}, tensors to {expected}")
        texts += said
    return texts


def spoken(folder: Path, task: str, scenes: Scenes, longest: int) -> list[str]:
    """Return what ``tailor-fast evaluate`` records for a checkpoint, scene by scene."""
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "scenes.jsonl"
        write([scenes], data)
        options = GenerationOptions(batch_size=len(scenes), max_new_tokens=longest)
        asked = [EvaluationTask(task, data, new=True)]
        evaluate_models({"model": folder}, asked, Path(name) / "out", options=options)
        path = Path(name) / "out" / "predictions" / f"model.{task}.jsonl"
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines()[1:])
        found = {line["sample"]: line["prediction"] for line in lines}
    return [found[place] for place in range(len(scenes))]


def tuned_linears(base: nn.Module, tuned: nn.Module) -> list[str]:
    """Return the names of the ``nn.Linear`` weights in which two models differ, heads excepted."""
    after = dict(tuned.named_modules())
    return [
        f"{name}.weight"
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear)
        and not name.endswith("lm_head")
        and not torch.equal(module.weight, after[name].weight)
    ]


def changed_share(
    base: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], names: Sequence[str]
) -> float:
    """Return the share, 0 to 1, of the elements of ``names`` that are not equal in both states.

    Raises:
        ValueError: ``names`` is empty.
    """
    if not names:
        raise ValueError("changed_share: names must hold at least one tensor; got none")
    changed = sum(int((base[name] != other[name]).sum()) for name in names)
    return changed / sum(base[name].numel() for name in names)
