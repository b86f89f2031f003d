"""``python -m benchmarks.quality.defaults``: the defaults, and one choice at a time changed.

All on validation scenes: this is what defaults are chosen from. What was measured is kept in the
work folder, by checkpoints and code, and not measured again.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.quality import (
    baselines,
    bench,
    evaluation,
    protocols,
    scenes,
    sensitivities,
    sources,
    tinyllava,
)
from benchmarks.quality.baselines import State
from benchmarks.quality.bench import Bench, labelled
from benchmarks.quality.cells import Cell, Key, Store
from benchmarks.quality.choices import CHOICES, Choice, row, setting
from benchmarks.quality.commands import fill_table
from benchmarks.quality.protocols import PROTOCOLS
from benchmarks.quality.training import Report
from benchmarks.results import ROOT
from tailor_fast import Recipe, tailor_model

OUT = ROOT / "results" / "quality" / "defaults.csv"
DENSITY = 0.1


def code_version() -> str:
    """Return a short digest of the sources that make and measure a cell."""
    modules = (baselines, sensitivities, bench, evaluation, protocols, scenes)
    return sources.digest((*modules, sys.modules[__name__]))[:12]


def _tailored(found: Bench, choice: Choice, retain: bool, seed: int) -> State:
    def data(task: str) -> dict[str, torch.Tensor]:
        batch = tinyllava.encode([scenes.draw(task, "train", choice.samples, seed)])
        return labelled(found.family, batch)

    old = [data(task) for task in found.old_tasks] if retain else None
    recipe = Recipe(density=DENSITY, **choice.changed)
    done = tailor_model(found.base, found.tuned, [data(found.new_task)], recipe, retain_batches=old)
    return done.model.state_dict()


def run(
    work: Path, names: Sequence[str], seeds: Sequence[int], store: Store, report: Report = print
) -> Iterator[Cell]:
    """Measure what is missing and yield every cell of these protocols and fine-tuning seeds.

    A cell's row is ``old data`` or ``new data only``, its setting the departure.
    """
    for name in names:
        for seed in seeds:
            base, tuned = PROTOCOLS[name].make(work, 0, seed, report)
            found: Bench | None = None
            for retain, choices in CHOICES.items():
                for choice in choices:
                    key = Key(
                        name, 0, seed, row(retain), DENSITY, setting(choice), "validation",
                        tuned.fingerprint[:12],
                    )  # fmt: skip
                    cell = store.get(key)
                    if cell is None:
                        found = found or Bench(PROTOCOLS[name], base, tuned, seed)
                        make = _maker(found, choice, retain, seed)
                        cell = store.add(key, found.measure(make, "validation"))
                    report(f"{name} {seed} {key.row} {key.setting}: {cell.scores.h_mean:.1f}")
                    yield cell


def _maker(found: Bench, choice: Choice, retain: bool, seed: int) -> Callable[[], State]:
    return lambda: _tailored(found, choice, retain, seed)


if __name__ == "__main__":
    fill_table("defaults", OUT, code_version(), run)
