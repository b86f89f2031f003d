"""What stitching adds to a report: each task's error at each layer, before and after."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

from tailor_fast.patching.report import LinearReport


@dataclass
class TaskLoss:
    """One task at one layer: mean squared errors against its own tuned layer, over its inputs.

    Attributes:
        base: error of the base layer; that of the tuned layer is 0.
        stitched: error of the layer that was written.
        old: with old tasks: how far the tuned layer is from the base layer on their inputs.
    """

    base: float
    stitched: float
    old: float | None = None


@dataclass
class StitchedLinear(LinearReport):
    """One stitched layer.

    ``loss``, ``loss_undecorated`` and ``loss_reverted`` are the joint objective: of the patch, of
    the mean of the tasks' differences on the same mask, and of the base layer.

    Attributes:
        tasks: by name; tasks whose data do not reach the layer are not in it.
        old: with old tasks: how far the written layer is from the base layer on their inputs.
    """

    tasks: dict[str, TaskLoss] = field(default_factory=dict)
    old: float | None = None


def relative_losses(linears: Iterable[LinearReport]) -> dict[str, float]:
    """Median over the layers of each task's error, relative to that of the base model."""
    shares: dict[str, list[float]] = {}
    for linear in linears:
        for name, loss in getattr(linear, "tasks", {}).items():
            if loss.base > 0.0:
                shares.setdefault(name, []).append(loss.stitched / loss.base)
    return {name: median(values) for name, values in shares.items()}
