"""Layers solved from what ``calibrate`` gathered: no model runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tailor_fast._core.progress import Progress
from tailor_fast.calibration.moments import DiagonalMoments, Moments
from tailor_fast.calibration.statfile import Statistics
from tailor_fast.patching.solver import Solver
from tailor_fast.patching.streamed import StreamedWeights


def solve_from_statistics(
    weights: StreamedWeights,
    solver: Solver,
    statistics: Statistics,
    old_moments: Callable[[Sequence[str]], Moments | DiagonalMoments | None],
    progress: Progress,
    told: Callable[[str, int, int], None],
) -> None:
    """Solve every layer from statistics of the new task.

    Args:
        weights: the layers.
        solver: solves them.
        statistics: of the new task.
        old_moments: gives those of old tasks for a group of layers.
        progress: told how many groups there are.
        told: told about each group that is solved.
    """
    names = list(weights.layers)
    device = weights.device
    groups = statistics.grouped(names)
    solver.leave([n for n in names if n not in statistics], "the statistics have no entry")
    if solver.needs_scores_first:
        for group in groups:
            new, old = statistics.moments(group[0], device), old_moments(group)
            if new is not None:
                solver.score(group, new, old)
        solver.finish_scores()
    progress.start(len(groups))
    for done, group in enumerate(groups, 1):
        if solver.finished(group):
            solver.solve(group, None, None)
        elif (new := statistics.moments(group[0], device)) is None:
            solver.leave(group, "no counted token reaches it")
        else:
            solver.solve(group, new, old_moments(group))
        told(group[0], done, len(groups))
