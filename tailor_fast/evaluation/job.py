"""``evaluate_models``: several models on old and new tasks, to predictions and one table."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tailor_fast._core.errors import InputError, OutputError, UsageError
from tailor_fast._core.progress import Progress, Silent
from tailor_fast._core.regular_file import read_regular
from tailor_fast.checkpoint import local_path
from tailor_fast.checkpoint.sidefiles import side_files
from tailor_fast.evaluation.generating import GenerationOptions, Speaker
from tailor_fast.evaluation.metrics import METRICS, check_metric
from tailor_fast.evaluation.predictions import PredictionFile
from tailor_fast.evaluation.table import ModelScores, table_csv, table_rows
from tailor_fast.models.samples import Sample, hash_samples, read_samples

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class EvaluationTask:
    """What models are asked.

    Attributes:
        name: column of the table.
        data: samples with right answers, JSON lines.
        metric: ``exact``, ``vqa``, ``cider`` or ``bleu``.
        new: whether it is what the models were fine-tuned for, or an old task.
    """

    name: str
    data: PathLike
    metric: str = "exact"
    new: bool = False


def evaluate_models(
    models: Mapping[str, PathLike],
    tasks: Sequence[EvaluationTask],
    out: PathLike,
    *,
    base: str | None = None,
    tuned: str | None = None,
    options: GenerationOptions | None = None,
    samples: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, ModelScores]:
    """Let every model answer every task and write predictions and a table into ``out``.

    Predictions are on disk after every batch: a run that was stopped goes on there, and one that is
    repeated generates nothing. ``out`` then holds ``predictions/MODEL.TASK.jsonl``, ``results.csv``
    and ``results.json``.

    Args:
        models: checkpoint directories by the names of their rows.
        tasks: what they are asked.
        out: directory; made if need be.
        base: the model whose scores are 100% kept of the old tasks.
        tuned: the model whose scores are 100% kept of the new tasks.
        options: how predictions are made.
        samples: so many of each data file at most, evenly spaced; None takes all.
        overwrite: begin anew where predictions are of another model, data or setting.
        progress: told about each model and task.

    Returns:
        The scores of each model, in percent.

    Raises:
        InputError: a model or a sample is not usable.
        UsageError: the request contradicts itself, or ``out`` holds other predictions.
        OutputError: ``out`` cannot be written.
    """
    options, progress, out = options or GenerationOptions(), progress or Silent(), Path(out)
    _check(models, tasks, base, tuned)
    asked = {task.name: _questions(task, samples) for task in tasks}
    try:
        (out / "predictions").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out}: cannot be made: {error.strerror}") from error
    scores: dict[str, ModelScores] = {}
    progress.start(len(models) * len(tasks))
    for name, path in models.items():
        speaker = Speaker(local_path(path), options)
        identity = {"model": speaker.digest(), "files": _digest_of_files(speaker.directory)}
        old: dict[str, float] = {}
        new: dict[str, float] = {}
        for task in tasks:
            questions = asked[task.name]
            facts = {**identity, "data": hash_samples(questions), **options.facts()}
            facts["samples"] = [len(questions), questions[-1].line]
            place = out / "predictions" / f"{name}.{task.name}.jsonl"
            with PredictionFile(place, facts, overwrite=overwrite) as file:
                if len(file.said) < len(questions):
                    progress.note(f"{name}: {task.name}, {len(questions)} samples")
                    for said in speaker.answers(questions, frozenset(file.said)):
                        file.add(said)
                predictions = [file.said[index] for index in range(len(questions))]
            score = METRICS[task.metric](predictions, [_right(sample) for sample in questions])
            (new if task.new else old)[task.name] = score
            done = len(scores) * len(tasks) + len(old) + len(new)
            progress.group(f"{name} {task.name}", done, len(models) * len(tasks), 0)
        scores[name] = ModelScores(old, new)
    _write(out, scores, tasks, base, tuned)
    progress.finish()
    return scores


def _check(
    models: Mapping[str, PathLike],
    tasks: Sequence[EvaluationTask],
    base: str | None,
    tuned: str | None,
) -> None:
    if not models or not tasks:
        raise UsageError("expected at least one model and one task")
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"two tasks are called {twice!r}; give the files different names")
    for task in tasks:
        check_metric(task.metric)
    for name in (*models, *names):
        if not name or "/" in name or name.startswith("."):
            raise UsageError(f"{name!r} cannot be part of a file's name; choose another")
    for role in (base, tuned):
        if role is not None and role not in models:
            raise UsageError(f"{role!r} is none of the models {', '.join(models)}")


def _questions(task: EvaluationTask, samples: int | None) -> list[Sample]:
    """The samples of a task, each with a right answer; a chat ends with its own."""
    questions = read_samples(Path(task.data), most=samples)
    for sample in questions:
        last = sample.messages[-1]["role"] if sample.messages else ""
        if sample.messages and last != "assistant":
            raise InputError(
                f"{sample.where}: its messages end with {last!r}; expected the right answer as the"
                " assistant's message"
            )
        if not _right(sample):
            raise InputError(f"{sample.where}: has no answer; expected 'answer' or 'answers'")
    return questions


def _right(sample: Sample) -> tuple[str, ...]:
    if sample.answers or not sample.messages:
        return sample.answers
    content = sample.messages[-1]["content"]
    if isinstance(content, str):
        return (content,)
    return ("".join(part["text"] for part in content if part["type"] == "text"),)


def _digest_of_files(directory: Path) -> str:
    """Configuration, tokenizer, processor and templates: they decide what is said, too."""
    digest = hashlib.sha256()
    for path in side_files(directory):
        content = read_regular(path)
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _write(
    out: Path,
    scores: Mapping[str, ModelScores],
    tasks: Sequence[EvaluationTask],
    base: str | None,
    tuned: str | None,
) -> None:
    rows = table_rows(scores, base=base, tuned=tuned)
    body = {"metrics": {task.name: task.metric for task in tasks}, "rows": rows}
    text = json.dumps(body, indent=2, ensure_ascii=False) + "\n"
    try:
        (out / "results.csv").write_text(table_csv(rows), encoding="utf-8")
        (out / "results.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error.strerror}") from error
