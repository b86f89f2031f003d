"""What statistics alone tell of many recipes: one walk over both models, and nothing is written.

At each input group every recipe's layer is solved from the same moments, and the patch's output
errors are read off the Grams: ``|(D - P) X|²`` on the new task over ``|D X|²``, and ``|P X|²`` on
old tasks over ``|D X|²`` there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from tailor_fast._core.errors import InputError
from tailor_fast._core.machine import naming
from tailor_fast._core.processes import ALONE, Processes
from tailor_fast._core.progress import Progress
from tailor_fast.calibration.moments import Moments
from tailor_fast.models import Target
from tailor_fast.models.samples import scattered
from tailor_fast.patching.equations import quadratic
from tailor_fast.patching.job import Job, Request
from tailor_fast.patching.layers import LayerPair, Weights
from tailor_fast.patching.masks import Masks
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.report import Point, Report
from tailor_fast.patching.solver import AnyMoments, Solver
from tailor_fast.patching.solving import GroupInputs, solve_layer

DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.3)
RETAIN_WEIGHTS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 2.0, 3.0, 5.0)
Choice = dict[str, float]  # fields of a recipe
# Layers that are solved for every recipe: the errors are means, and each solve takes its time.
_MOST_LAYERS = 48


def choices_of(recipe: Recipe) -> list[Choice]:
    """Every choice of the grid; what ``recipe`` itself chooses of the two stays as it is."""
    densities: Sequence[float] = DENSITIES
    weights: Sequence[float] = RETAIN_WEIGHTS
    if "density" in recipe.model_fields_set:
        densities = (recipe.density,)
    if "retain_weight" in recipe.model_fields_set and recipe.retain_weight is not None:
        weights = (recipe.retain_weight,)
    return [
        {"density": density, "retain_weight": weight} for weight in weights for density in densities
    ]


def front_of(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both errors, from least to most caused on old tasks."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.caused, p.left, p.density)):
        if not best or point.left < best[-1].left:
            best.append(point)
    return best


class GridJob(Job):
    """A run that measures the errors of every recipe of the grid, and writes nothing.

    Args:
        request: as of the run that is searched for.
        progress: told about each step.

    Attributes:
        choices: the grid.
    """

    def __init__(self, request: Request, progress: Progress) -> None:
        self.choices = choices_of(request.recipe)
        # Errors of a layer by itself: the tuned model runs on the new task, the base on old ones.
        alone = {"propagate": "none", "group": "input", **self.choices[-1]}
        recipe = request.recipe.model_copy(update=alone)
        super().__init__(replace(request, recipe=recipe), progress)
        self.make_solver = self._errors
        self._solver: _Errors | None = None

    def points(self) -> list[Point]:
        """The grid, once the walk is over.

        Raises:
            InputError: no token of both data sets reaches a layer.
        """
        points = [] if self._solver is None else self._solver.points()
        if not points:
            raise InputError(
                f"{self.request.tuned}: no layer that is patched sees tokens of the new task and of"
                " old ones; expected one at least; check `targets` and the data"
            )
        return points

    def _errors(
        self,
        recipe: Recipe,
        weights: Weights,
        targets: Mapping[str, Target],
        units: Mapping[str, str],
        report: Report,
        processes: Processes = ALONE,
    ) -> Solver:
        self._solver = _Errors(recipe, weights, targets, units, report, processes)
        self._solver.choices = self.choices
        return self._solver


class _Errors(Solver):
    """Solves some of the layers for every recipe, and keeps the errors in place of the weights."""

    def __init__(
        self,
        recipe: Recipe,
        weights: Weights,
        targets: Mapping[str, Target],
        units: Mapping[str, str],
        report: Report,
        processes: Processes,
    ) -> None:
        super().__init__(recipe, weights, targets, units, report, processes)
        self.choices: Sequence[Choice] = ()
        names = list(targets)
        self._measured = {names[place] for place in scattered(len(names))[:_MOST_LAYERS]}
        self._sums: dict[int, tuple[float, float]] = {}  # by the choice
        self._count = 0

    def finished(self, members: Iterable[str]) -> bool:
        """Whether none of these layers is measured, so that no moments are taken."""
        return self._measured.isdisjoint(members)

    def leave(self, names: Iterable[str], why: str) -> None:
        """Do nothing: a layer that no token reaches has no error."""

    def solve(
        self,
        members: Sequence[str],
        new: AnyMoments | None,
        old: AnyMoments | None,
        note: str = "",  # noqa: ARG002  nothing is reported
    ) -> None:
        """Add the errors of one group's layers under every recipe."""
        if not isinstance(new, Moments) or not isinstance(old, Moments):
            return
        columns = None if self._recipe.refits else self._column_weight(members, new, old)
        for name in (name for name in members if name in self._measured):
            with self.report.timed("solve"), naming("solve", name):
                pair = self._weights.pair(self._targets[name])
                self._add(self._targets[name], pair, members, (new, old), columns)

    def _add(
        self,
        target: Target,
        pair: LayerPair,
        members: Sequence[str],
        moments: tuple[Moments, Moments],
        columns: torch.Tensor | None,
    ) -> None:
        new, old = moments
        delta = pair.tuned.float() - pair.base.float()
        whole = [float(quadratic(delta, moment.gram)) for moment in moments]
        if not all(whole):
            return  # the layers' inputs are zero
        self._count += 1
        inputs, weight = None, -1.0
        for index, choice in enumerate(self.choices):
            recipe = self._recipe.model_copy(update=choice)
            if inputs is None or choice["retain_weight"] != weight:
                # The equations are made in place of the old tasks' Gram.
                weight, taken = choice["retain_weight"], replace(old, gram=old.gram.clone())
                inputs = GroupInputs(tuple(members), new, taken, columns, self.solved_at_once)
            own = recipe.of(target.name)
            solved, _ = solve_layer(target, pair, inputs, Masks(recipe, {}), own)
            patch = solved.float() - pair.base.float()
            caused = float(quadratic(patch, old.gram)) / whole[1]
            left = float(quadratic(delta - patch, new.gram)) / whole[0]
            sums = self._sums.get(index, (0.0, 0.0))
            self._sums[index] = sums[0] + left, sums[1] + caused

    def points(self) -> list[Point]:
        """Mean errors of each choice; none where no layer was measured."""
        return [
            Point(**self.choices[index], left=left / self._count, caused=caused / self._count)
            for index, (left, caused) in self._sums.items()
        ]
