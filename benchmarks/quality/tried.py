"""``python -m benchmarks.quality.tried``: what was tried for the goals that are missed.

With old data, at the density of the goals, on validation scenes. What is not in the library is
put into it for the run alone. What was measured is kept in the work folder and not measured again.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.quality import (
    baselines,
    bench,
    evaluation,
    exchanges,
    protocols,
    scenes,
    sensitivities,
    sources,
    tinyllava,
)
from benchmarks.quality.baselines import State
from benchmarks.quality.bench import Bench, labelled
from benchmarks.quality.cells import Cell, Key, Store
from benchmarks.quality.commands import fill_table
from benchmarks.quality.protocols import NEW_SAMPLES, PROTOCOLS
from benchmarks.quality.training import Report
from benchmarks.results import ROOT
from tailor_fast import Recipe, Tailored, tailor_model
from tailor_fast.patching import forgetting, refit, solving
from tailor_fast.patching.report import LinearReport

OUT = ROOT / "results" / "quality" / "tried.csv"
DENSITY = 0.1
GOALS = ("gentle-code", "gentle-next", "hard-code")
_EXCHANGES = 8  # in a row
_RANGE = 4.0  # a layer's density lies between a quarter and four times of all layers'
_FIRST = 0.3  # density of the first of two passes


@dataclass(frozen=True)
class Try:
    """One attempt.

    Attributes:
        title: in words, for the table.
        make: builds the model's state from a pair of models and the seed of its calibration scenes.
        everywhere: tried on every protocol, not on ``GOALS`` alone.
    """

    title: str
    make: Callable[[Bench, int], State]
    everywhere: bool = False


def _data(found: Bench, task: str, samples: int, seed: int) -> dict[str, torch.Tensor]:
    return labelled(found.family, tinyllava.encode([scenes.draw(task, "train", samples, seed)]))


def _done(
    found: Bench, seed: int, *, samples: int = NEW_SAMPLES, tuned: Any = None, **fields: Any
) -> Tailored:
    recipe = Recipe(**{"density": DENSITY, **fields})
    old = [_data(found, task, samples, seed) for task in found.old_tasks]
    new = [_data(found, found.new_task, samples, seed)]
    return tailor_model(found.base, tuned or found.tuned, new, recipe, retain_batches=old)


def _with(found: Bench, seed: int, **fields: Any) -> State:
    return _done(found, seed, **fields).model.state_dict()


def _factor(found: Bench, seed: int, *, factor: float) -> State:
    with patch.object(forgetting, "MEASURED_RETAIN", factor):
        return _with(found, seed)


def _exchanged(found: Bench, seed: int) -> State:
    refined = exchanges.refined(refit.refit_mask, _EXCHANGES)
    with patch.object(solving, "refit_mask", refined):
        return _with(found, seed)


def by_loss(linears: Sequence[LinearReport]) -> dict[str, float]:
    """Return a density for each layer, by name as a pattern; together they keep ``DENSITY``.

    It grows with the square root of the share of its objective that a patch of equal density left.
    """
    sizes = [line.rows * line.cols for line in linears]
    left = [math.sqrt((line.loss or 0.0) / (line.loss_reverted or 1.0)) for line in linears]
    wanted = DENSITY * sum(sizes)
    low, high = 0.0, 1.0 / max(left)
    for _ in range(60):  # bisection: the total grows with the scale
        scale = (low + high) / 2
        found = [min(max(scale * x, DENSITY / _RANGE), DENSITY * _RANGE) for x in left]
        kept = sum(share * size for share, size in zip(found, sizes, strict=True))
        low, high = (scale, high) if kept < wanted else (low, scale)
    names = (f"^{line.name.replace('.', '[.]')}$" for line in linears)
    return dict(zip(names, found, strict=True))


def _by_loss(found: Bench, seed: int, **fields: Any) -> State:
    first = _done(found, seed, **fields)
    return _with(found, seed, densities=by_loss(first.report.linears), **fields)


def _two_passes(found: Bench, seed: int) -> State:
    first = _done(found, seed, density=_FIRST)
    return _with(found, seed, tuned=first.model)


TRIES: Mapping[str, Try] = {
    "defaults": Try("**defaults**", _with, everywhere=True),
    **{
        f"factor {factor}": Try(
            f"factor of the measured weight {factor}",
            partial(_factor, factor=factor),
            everywhere=True,
        )
        for factor in (0.2, 0.4, 0.5)
    },
    "exchanges": Try(f"up to {_EXCHANGES} exchanges a row after the solve", _exchanged),
    "refits 16": Try("mask refitted in 16 steps", partial(_with, refits=16)),
    "by loss": Try("density of each layer by its loss", _by_loss),
    "by loss, 16": Try("both of these", partial(_by_loss, refits=16)),
    "ratio": Try(
        "mask by target against old sensitivity", partial(_with, refits=0, sensitivity="ratio")
    ),
    "two passes": Try(f"two passes, {_FIRST} then {DENSITY}", _two_passes),
    "512 scenes": Try("512 scenes a task", partial(_with, samples=512)),
    "density 1": Try("every weight may change", partial(_with, density=1.0)),
}
_ANCHORS: Mapping[str, Callable[[Bench, int], State]] = {
    "base": lambda found, _seed: found.states[0],
    "tuned": lambda found, _seed: found.states[1],
}


def _makers(protocol: str) -> dict[str, Callable[[Bench, int], State]]:
    tries = {
        name: attempt.make
        for name, attempt in TRIES.items()
        if attempt.everywhere or protocol in GOALS
    }
    return {**_ANCHORS, **tries}


def code_version() -> str:
    """Return a short digest of the sources that make and measure a cell."""
    modules = (baselines, sensitivities, bench, evaluation, protocols, scenes, exchanges)
    return sources.digest((*modules, sys.modules[__name__]))[:12]


def run(
    work: Path, names: Sequence[str], seeds: Sequence[int], store: Store, report: Report = print
) -> Iterator[Cell]:
    """Measure what is missing and yield every cell, its row the try's name."""
    for seed in seeds:
        for name in names:
            base, tuned = PROTOCOLS[name].make(work, 0, seed, report)
            found: Bench | None = None
            for row, make in _makers(name).items():
                density = 1.0 if row in (*_ANCHORS, "density 1") else DENSITY
                key = Key(name, 0, seed, row, density, "", "validation", tuned.fingerprint[:12])
                cell = store.get(key)
                if cell is None:
                    found = found or Bench(PROTOCOLS[name], base, tuned, seed)
                    made = partial(make, found, seed)
                    cell = store.add(key, found.measure(made, "validation"))
                report(f"{name} {seed} {row}: {cell.scores.h_mean:.1f}")
                yield cell


if __name__ == "__main__":
    fill_table("tried", OUT, code_version(), run)
