"""One layer of all tasks: support, joint solve, what is written, and each task's error with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from tailor_fast._core.processes import ALONE
from tailor_fast.calibration.moments import Moments
from tailor_fast.patching.layers import LayerPair
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.refit import refit_mask
from tailor_fast.patching.scores import column_weight
from tailor_fast.patching.solving import rows_at_once, solve_tiles
from tailor_fast.patching.sources import LayerOnDisk
from tailor_fast.stitching.joint import Answer, JointSums
from tailor_fast.stitching.report import StitchedLinear, TaskLoss
from tailor_fast.stitching.support import Support, SupportSums
from tailor_fast.stitching.tasks import OpenTask

GetMoments = Callable[[str, torch.device], Moments | None]


class LayerSolver:
    """Solves layer after layer; one Gram of one task is in memory at a time.

    Args:
        recipe: as settled.
        support: which weights may change.
        tasks: open, with their statistics.
        old: gives moments of old tasks; None without retention.
        device: where layers are solved.
    """

    def __init__(
        self,
        recipe: Recipe,
        support: Support,
        tasks: Sequence[OpenTask],
        old: GetMoments | None,
        device: torch.device,
    ) -> None:
        self._recipe = recipe
        self._support = support
        self._tasks = tasks
        self._old = old
        self._device = device
        # Layers with one input have one score vector, and follow each other.
        self._scores: dict[str, tuple[tuple[str, ...], torch.Tensor | None]] = {}

    def solve(self, layer: LayerOnDisk) -> tuple[torch.Tensor | None, StitchedLinear]:
        """Return the weight to write ``[rows, cols]``, and what was done.

        The weight is None where no task's data reach the layer: it stays as it is in the base.

        Raises:
            InputError: statistics are damaged, or a Gram cannot be factored.
        """
        start = time.perf_counter()
        old = None if self._old is None else self._old(layer.target.name, self._device)
        row = StitchedLinear(layer.target.name, 0, 0, kept=0, group=(layer.target.name,))
        base, weight = self._solve_jointly(layer, row, old)
        row.rows, row.cols = base.base.shape
        if weight is None:
            row.note = "left at base: no token of a task that changes it reaches it"
        else:
            self._measure(layer, row, base, weight, old)
        row.seconds = time.perf_counter() - start
        return weight, row

    def _solve_jointly(
        self, layer: LayerOnDisk, row: StitchedLinear, old: Moments | None
    ) -> tuple[LayerPair, torch.Tensor | None]:
        recipe = self._recipe
        support = SupportSums(recipe, self._support, layer.target.name)
        sums, base = self._gather(layer, row, support, old)
        mask = support.finish()
        if sums is None or mask is None:
            return base, None
        system = sums.finish(old, recipe.percdamp, recipe.settled_retain_weight)
        del sums
        rows, cols = mask.shape
        tiles = system.tiles(rows_at_once(cols, mask.device.type), recipe)
        if recipe.refits:
            mask = refit_mask(mask, tiles, recipe, ([slice(0, rows)], ALONE), layer.target.name)
        row.kept = int(mask.count_nonzero())
        row.damping, row.retain_scale = system.damping, system.retain_scale
        return base, solve_tiles(base, mask, tiles, row)

    def _gather(
        self, layer: LayerOnDisk, row: StitchedLinear, support: SupportSums, old: Moments | None
    ) -> tuple[JointSums | None, LayerPair]:
        """Add every task's terms and support; returns them and the base layer."""
        sums, missing = None, []
        for task in self._tasks:
            pair = task.pair(layer, self._device)
            moments = task.moments(layer.target.name, self._device)
            if moments is None:
                missing.append(task.name)
                continue
            if sums is None:
                sums = JointSums(pair.base.float(), _float(pair.base_bias))
            changed = _differs(pair.base, pair.tuned)
            if task.is_surrogate and self._support == "union":
                support.add_mask(changed)
            elif bool(changed.any()):  # else all scores are equal, and say nothing
                weight = self._column_weight(task, layer.target.name, moments, old)
                support.add(pair.base, pair.tuned, weight)
            answer = Answer(pair.tuned.float(), _float(pair.tuned_bias), moments)
            error = sums.add(answer, task.weight)
            row.tasks[task.name] = TaskLoss(base=error, stitched=error)
            row.tokens += moments.tokens
        if missing and sums is not None:
            row.note = f"no token reaches it in {', '.join(missing)}"
        return sums, pair

    def _column_weight(
        self, task: OpenTask, name: str, moments: Moments, old: Moments | None
    ) -> torch.Tensor | None:
        recipe = self._recipe
        if recipe.salience_weight == 1.0:
            return None
        members = task.group_of(name)
        known = self._scores.get(task.name)
        if known is None or known[0] != members:
            scores = column_weight(recipe.sensitivity, moments, old, recipe.percdamp, name)
            self._scores[task.name] = known = members, scores
        return known[1]

    def _measure(
        self,
        layer: LayerOnDisk,
        row: StitchedLinear,
        base: LayerPair,
        written: torch.Tensor,
        old: Moments | None,
    ) -> None:
        """Fill in the errors of what was written, on every task."""
        weight, bias = written.float(), _float(base.base_bias)
        before = base.base.float()
        for task in self._tasks:
            loss = row.tasks.get(task.name)
            moments = task.moments(layer.target.name, self._device)
            if loss is None or moments is None:
                continue
            pair = task.pair(layer, self._device)
            tuned, tuned_bias = pair.tuned.float(), _float(pair.tuned_bias)
            loss.stitched = Answer(tuned, tuned_bias, moments).error(weight, bias)
            if old is not None:
                loss.old = Answer(tuned, tuned_bias, old).error(before, bias)
        if old is not None:
            row.old = Answer(weight, bias, old).error(before, bias)


def _differs(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Bool, True where two tensors differ in a bit, -0 and NaN included."""
    words = {2: torch.int16, 4: torch.int32}[ours.element_size()]
    return ours.view(words) != theirs.view(words)


def _float(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.float()
