"""What a run did, layer by layer; written beside the output as ``tailor_report.json``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class LinearReport:
    """One patched layer.

    Losses are the damped objective of equation (6) summed over the rows: with the patch, with the
    bare mask, and with everything reverted to base. They are None where no statistics were used.
    """

    name: str  # module
    rows: int
    cols: int
    kept: int
    tensor: str = ""  # name in the file, where there is one
    group: tuple[str, ...] = ()
    loss: float | None = None
    loss_undecorated: float | None = None
    loss_reverted: float | None = None
    damping: float | None = None
    retain_scale: float | None = None
    iterations: int | None = None
    tokens: int = 0
    seconds: float = 0.0
    note: str = ""

    @property
    def density(self) -> float:
        """Share of the layer's weights that was kept."""
        return self.kept / max(1, self.rows * self.cols)


@dataclass(frozen=True)
class Point:
    """A recipe as the statistics see it; errors are means over layers.

    Attributes:
        density: as in ``Recipe``.
        retain_weight: likewise.
        left: output error that the patch leaves on the new task, over the base model's.
        caused: output error that it causes on old tasks, over the tuned model's.
    """

    density: float
    retain_weight: float
    left: float
    caused: float


@dataclass(frozen=True)
class Tried:
    """A recipe whose model was made, and what it keeps on samples that were held back.

    Attributes:
        point: the recipe.
        old: score on old tasks, over that of the base model.
        old_error: standard error of ``old``.
        new: score on the new task, over that of the tuned model.
        new_error: standard error of ``new``.
    """

    point: Point
    old: float
    old_error: float
    new: float
    new_error: float


@dataclass(frozen=True)
class Found:
    """What a search for a recipe found.

    Attributes:
        target_old: share of the base model's score on old tasks that was to be kept.
        chosen: the recipe that was taken.
        tried: every recipe whose model was made, in this order.
        grid: every recipe that the statistics told of.
        held_old: samples of old tasks that were held back and measured on.
        held_new: those of the new task.
    """

    target_old: float
    chosen: Tried
    tried: tuple[Tried, ...]
    grid: tuple[Point, ...]
    held_old: int
    held_new: int

    def __str__(self) -> str:
        point, best = self.chosen.point, self.chosen
        return (
            f"target_old {self.target_old:g}: density {point.density:g} and retain_weight"
            f" {point.retain_weight:g} keep {best.old:.4f} ± {best.old_error:.4f} of old tasks and"
            f" {best.new:.4f} ± {best.new_error:.4f} of the new one on {self.held_old} and"
            f" {self.held_new} samples that were held back"
        )


@dataclass
class Report:
    """A whole run: the recipe, each layer, seconds per stage, and what was done differently.

    ``target_old`` says how the recipe was found, where one was searched for.
    """

    recipe: dict[str, Any]
    linears: list[LinearReport] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    processes: int = 1  # that did the run together
    target_old: Found | None = None

    def __repr__(self) -> str:
        """The totals: a line a layer would fill pages."""
        return (
            f"Report(kept {self.kept} of {self.targeted} weights in {len(self.linears)} layers,"
            f" seconds={self.seconds.get('total', 0.0):.3g}, notes={self.notes})"
        )

    @property
    def targeted(self) -> int:
        """Weights in the patched layers."""
        return sum(linear.rows * linear.cols for linear in self.linears)

    @property
    def kept(self) -> int:
        """Weights whose value may differ from base."""
        return sum(linear.kept for linear in self.linears)

    def note_equal(self, same: int, layers: int) -> None:
        """Note how many of the targeted layers did not change in fine-tuning."""
        if same:
            self.notes.append(f"{same} of {layers} layers are equal in both: left as is")

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time spent to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        body = asdict(self)
        for row, linear in zip(body["linears"], self.linears, strict=True):
            row["density"] = linear.density
        body["targeted"] = self.targeted
        body["kept"] = self.kept
        body["density"] = self.kept / max(1, self.targeted)
        return body
