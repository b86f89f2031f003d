"""What a task is measured by: a score in percent of predictions against right answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tailor_fast._core.errors import InputError, UsageError
from tailor_fast.evaluation.captions import bleu, cider_d
from tailor_fast.evaluation.vqa import vqa_accuracy

Score = Callable[[Sequence[str], Sequence[Sequence[str]]], float]


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Percentage of predictions that equal a right answer; runs of white space count as one."""
    pairs = zip(predictions, references, strict=True)
    right = sum(_spaced(said) in map(_spaced, answers) for said, answers in pairs)
    return 100.0 * right / len(predictions)


def vqa(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean ``vqa_accuracy`` in percent.

    Raises:
        InputError: a question has the answer of one annotator only.
    """
    lone = next((place for place, answers in enumerate(references) if len(answers) < 2), None)
    if lone is not None:
        raise InputError(
            f"sample {lone + 1} has one answer; VQA accuracy needs those of several annotators, ten"
            " in the data set; write them as 'answers', or use the metric exact"
        )
    pairs = zip(predictions, references, strict=True)
    return 100.0 * sum(vqa_accuracy(said, given) for said, given in pairs) / len(predictions)


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean CIDEr-D times 100."""
    scores = cider_d(predictions, references)
    return 100.0 * sum(scores) / len(scores)


METRICS: dict[str, Score] = {"exact": exact_match, "vqa": vqa, "cider": cider, "bleu": bleu}


def check_metric(name: str) -> None:
    """Raise ``UsageError`` unless ``name`` is a metric."""
    if name not in METRICS:
        raise UsageError(f"metric must be one of {', '.join(METRICS)}; got {name!r}")


def _spaced(text: str) -> str:
    return " ".join(text.split())
