"""From a group's moments to installed weights and lines of the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from tailor_fast._core.machine import naming
from tailor_fast._core.processes import ALONE, Processes
from tailor_fast.calibration.moments import DiagonalMoments, Moments
from tailor_fast.models import Target, blocks_of
from tailor_fast.patching.layers import Weights
from tailor_fast.patching.masks import Masks
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.report import LinearReport, Report
from tailor_fast.patching.scores import column_weight
from tailor_fast.patching.solving import GroupInputs, Solved, left_at_base, solve_part
from tailor_fast.patching.together import put_together

AnyMoments = Moments | DiagonalMoments


class Solver:
    """Scores, solves and installs the layers of one group at a time.

    Args:
        recipe: what to do.
        weights: where layers come from and go to.
        targets: the layers to patch, by name.
        units: unit of each layer for scopes that span layers (``units_of``).
        report: filled in.
        processes: share the rows of each layer.

    Attributes:
        report, processes: the same.
        solved_at_once: as in ``Placement``.
    """

    def __init__(
        self,
        recipe: Recipe,
        weights: Weights,
        targets: Mapping[str, Target],
        units: Mapping[str, str],
        report: Report,
        processes: Processes = ALONE,
    ) -> None:
        self._recipe = recipe
        self._weights = weights
        self._targets = targets
        self._masks = Masks(recipe, units)
        self.report = report
        self.processes = processes
        self.solved_at_once: int | None = None

    @property
    def needs_scores_first(self) -> bool:
        """Whether every layer must be scored before the first is solved."""
        return self._masks.needs_scores_first

    def score(self, members: Sequence[str], new: AnyMoments | None, old: AnyMoments | None) -> None:
        """Keep the score vector of a group until ``finish_scores``; None is salience alone."""
        weight = self._column_weight(members, new, old)
        for name in members:
            self._masks.add(name, weight)

    def finish_scores(self) -> None:
        """Find each unit's threshold."""
        with self.report.timed("scores"):
            self._masks.observe_all(self._targets, self._weights)

    def finished(self, members: Iterable[str]) -> bool:
        """Whether an earlier run patched all of these layers: ``solve`` needs no moments then."""
        targets = (self._targets[name] for name in members)
        return all(self._weights.patched_earlier(target) is not None for target in targets)

    def solve(
        self,
        members: Sequence[str],
        new: AnyMoments | None,
        old: AnyMoments | None,
        note: str = "",
    ) -> None:
        """Patch the layers of one group.

        Args:
            members: names of the layers, which share their inputs.
            new: moments of the new task; None selects by salience and decorates nothing.
            old: moments of old tasks; None without retention.
            note: goes into the report.
        """
        weight = None
        if not self.needs_scores_first and not self.finished(members):
            weight = self._column_weight(members, new, old)
        inputs = GroupInputs(tuple(members), new, old, weight, self.solved_at_once)
        shared: list[tuple[Target, Solved]] = []  # of several processes, until all have solved
        for name in members:
            target = self._targets[name]
            earlier = self._weights.patched_earlier(target)
            if earlier is not None:
                with self.report.timed("install"):
                    self._weights.install_again(target)
                self.report.linears.append(earlier)
                continue
            with self.report.timed("solve"), naming("solve", name):
                solved = solve_part(
                    target,
                    self._weights.pair(target),
                    inputs,
                    self._masks,
                    self._recipe.of(name),
                    self.processes,
                )
            solved.report.note = note
            self.report.linears.append(solved.report)
            if self.processes.count > 1:
                shared.append((target, solved))
            else:
                self._install(target, solved.weight, solved.report)
        if shared:
            with self.report.timed("solve"):
                weights = put_together([solved for _, solved in shared], self.processes)
            for (target, solved), patched in zip(shared, weights, strict=True):
                self._install(target, patched, solved.report)

    def _install(self, target: Target, weight: torch.Tensor, row: LinearReport) -> None:
        with self.report.timed("install"):
            self._weights.install(target, weight, row)

    def preview(self, names: Iterable[str]) -> None:
        """Let the patched model run with tuned weights until these layers are solved."""
        for name in names:
            self._weights.preview(self._targets[name])

    def leave(self, names: Iterable[str], why: str) -> None:
        """Leave layers at base, and say why."""
        for name in names:
            target = self._targets[name]
            row = left_at_base(target, self._weights.pair(target), f"left at base: {why}")
            self.report.linears.append(row)

    def _column_weight(
        self, members: Sequence[str], new: AnyMoments | None, old: AnyMoments | None
    ) -> torch.Tensor | None:
        recipe = self._recipe
        if new is None or recipe.salience_weight == 1.0 or recipe.decorate == "official":
            return None
        with self.report.timed("scores"), naming("scores", members[0]):
            return column_weight(
                recipe.sensitivity, new, old, recipe.percdamp, members[0], self.processes
            )


def units_of(recipe: Recipe, model: nn.Module | None, targets: Iterable[str]) -> dict[str, str]:
    """Unit of each layer for scopes that span layers; empty for scopes within one.

    A layer outside every block is a unit of its own under scope ``layer``, which alone looks at the
    model.
    """
    if recipe.scope == "global":
        return dict.fromkeys(targets, "model")
    if recipe.scope == "layer" and model is not None:
        return {name: block or name for name, block in blocks_of(model, targets).items()}
    return {}
