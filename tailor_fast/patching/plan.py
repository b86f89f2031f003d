"""What a run will do and need, known from headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tailor_fast.calibration.streamed import run_dtype, skeleton_of
from tailor_fast.checkpoint import Layout
from tailor_fast.models import Residency
from tailor_fast.ops.select import kept_count
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.sources import BLOCK_BYTES, Sources

_FP32 = 4


@dataclass(frozen=True)
class PlannedLayer:
    """One layer that will be patched, unless it is equal in both checkpoints."""

    name: str
    tensor: str
    rows: int
    cols: int
    kept: int


@dataclass(frozen=True)
class PatchPlan:
    """A run before it starts; sizes in bytes.

    Attributes:
        layers: what will be patched.
        recipe: the recipe as it will be run.
        weights: weights in all targeted layers.
        kept: most of them that may differ from base.
        disk: size of the output's weight files.
        ram_weights: resident model weights.
        ram_solve: statistics and working copies of the largest group.
        ram: the two together; activations come on top, up to ``--max-ram``.
        notes: what was decided, a sentence each.
    """

    layers: tuple[PlannedLayer, ...]
    recipe: dict[str, Any]
    weights: int
    kept: int
    disk: int
    ram_weights: int
    ram_solve: int
    notes: tuple[str, ...]

    @property
    def ram(self) -> int:
        """Memory that does not depend on the data."""
        return self.ram_weights + self.ram_solve

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "ram": self.ram}


def make_plan(
    sources: Sources,
    layout: Layout,
    recipe: Recipe,
    *,
    runs_model: bool,
    retains: bool,
    notes: Sequence[str],
) -> PatchPlan:
    """Plan a run.

    Args:
        sources: the open pair.
        layout: the output's files.
        recipe: as resolved for the data at hand.
        runs_model: whether forward passes are made.
        retains: whether old-task data is used.
        notes: what was decided so far.
    """
    layers = tuple(
        PlannedLayer(layer.target.name, layer.tensor, *layer.shape, _kept(layer.shape, recipe))
        for layer in sources.layers
    )
    return PatchPlan(
        layers,
        recipe.model_dump(),
        weights=sum(layer.rows * layer.cols for layer in layers),
        kept=sum(layer.kept for layer in layers),
        disk=layout.file_bytes,
        ram_weights=_resident_weights(sources, recipe, retains) if runs_model else BLOCK_BYTES,
        ram_solve=max(_solve_bytes(layer, recipe, runs_model, retains) for layer in layers),
        notes=(*sources.notes, *notes),
    )


def _kept(shape: tuple[int, int], recipe: Recipe) -> int:
    return kept_count(shape[0] * shape[1], recipe.density)


def _resident_weights(sources: Sources, recipe: Recipe, retains: bool) -> int:
    """The largest unit that is resident, once per model whose passes are in flight."""
    model = skeleton_of(sources.tuned)
    size = run_dtype(model).itemsize
    largest = max(Residency.unit_sizes(model).values(), default=0)
    paired = recipe.propagate == "asymmetric" and recipe.decorate == "exact"
    models = 1 + paired + retains
    return largest * size * models


def _solve_bytes(layer: PlannedLayer, recipe: Recipe, runs_model: bool, retains: bool) -> int:
    """Working set of one layer: words of both checkpoints, fp32 copies, Grams of its inputs."""
    matrix = layer.rows * layer.cols * _FP32
    if not runs_model:
        return 4 * matrix
    square = layer.cols * layer.cols * _FP32
    asymmetric = recipe.propagate == "asymmetric" and recipe.decorate == "exact"
    grams = 1 + (2 if asymmetric else 0) + (3 if retains else 0)
    factor = 2 if recipe.sensitivity in ("obs", "weight") else 0
    return matrix * 8 + square * (grams + max(factor, 1))
