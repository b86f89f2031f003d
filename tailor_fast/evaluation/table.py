"""Scores of several models on old and new tasks, and what of them is kept."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelScores:
    """One model.

    Attributes:
        old: score of each old task.
        new: score of each new task.
    """

    old: Mapping[str, float]
    new: Mapping[str, float]

    @property
    def old_mean(self) -> float | None:
        """Plain mean over the old tasks; None without any."""
        return _mean(self.old)

    @property
    def new_mean(self) -> float | None:
        """Plain mean over the new tasks; None without any."""
        return _mean(self.new)

    @property
    def task_mean(self) -> float | None:
        """Mean over all tasks, each counting the same."""
        return _mean({**{f"old {k}": v for k, v in self.old.items()}, **self.new})

    @property
    def group_mean(self) -> float | None:
        """Mean of ``old_mean`` and ``new_mean``: old and new count the same, however many."""
        old, new = self.old_mean, self.new_mean
        return None if old is None or new is None else (old + new) / 2

    @property
    def h_mean(self) -> float | None:
        """Harmonic mean of ``old_mean`` and ``new_mean``; 0 where both are 0."""
        old, new = self.old_mean, self.new_mean
        if old is None or new is None:
            return None
        return 2 * old * new / (old + new) if old + new else 0.0


def table_rows(
    models: Mapping[str, ModelScores], *, base: str | None = None, tuned: str | None = None
) -> list[dict[str, str | float | None]]:
    """One row a model, columns in order, percent unrounded; None where there is no such figure.

    Args:
        models: by name, with the same tasks.
        base: the model whose old mean is 100% kept of the old tasks.
        tuned: the model whose new mean is 100% kept of the new ones.
    """
    whole_old = models[base].old_mean if base is not None else None
    whole_new = models[tuned].new_mean if tuned is not None else None
    return [
        {
            "model": name,
            **scores.old,
            "old mean": scores.old_mean,
            **scores.new,
            "new mean": scores.new_mean,
            "old kept": _share(scores.old_mean, whole_old),
            "new kept": _share(scores.new_mean, whole_new),
            "H-mean": scores.h_mean,
            "mean over tasks": scores.task_mean,
            "mean of old and new": scores.group_mean,
        }
        for name, scores in models.items()
    ]


def table_csv(rows: Sequence[Mapping[str, str | float | None]]) -> str:
    """The rows as CSV, every figure as measured."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _mean(scores: Mapping[str, float]) -> float | None:
    return sum(scores.values()) / len(scores) if scores else None


def _share(part: float | None, whole: float | None) -> float | None:
    return 100 * part / whole if part is not None and whole else None
