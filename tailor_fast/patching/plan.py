"""What a run will do and need, known from headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from tailor_fast._core.errors import UsageError
from tailor_fast._core.machine import check_device_memory, check_memory
from tailor_fast.calibration.options import RunOptions
from tailor_fast.calibration.streamed import run_dtype, skeleton_of
from tailor_fast.checkpoint import Layout
from tailor_fast.models import Residency
from tailor_fast.models.residency import output_head
from tailor_fast.ops.select import kept_count
from tailor_fast.patching.device import DevicePlan
from tailor_fast.patching.inputs import Given
from tailor_fast.patching.memory import FIXED_BYTES, divide_memory
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.solving import SOLVED_AT_ONCE
from tailor_fast.patching.sources import LayerOnDisk, Sources

_FP32 = 4
# Measured on layers of several shapes: bytes per weight at the peak, beside words and Grams, of a
# layer that is solved from one Gram; of one whose right-hand side is formed, in float64 for a
# moment; more of it with retention; and matrices of the Gram's size while scores are prepared. An
# exact solve takes them for the rows that it works on at once, and for the whole layer the mask.
_PLAIN_BYTES = 40
_SYSTEM_BYTES = 57
_RETAIN_BYTES = 16
_FACTORS = 4
_MASK_BYTES = 1


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
        ram_weights: resident weights: of blocks that run, or on their way between the files.
        ram_solve: statistics and working copies of the largest group.
        ram: the two together; activations come on top, up to ``--max-ram``.
        ram_peak: with fixed buffers.
        notes: what was decided, a sentence each.
        device: memory of the device, stage by stage; None where nothing bounds it.
        ahead: page-locked memory in which blocks wait for a GPU; 0 where they do not.
    """

    layers: tuple[PlannedLayer, ...]
    recipe: dict[str, Any]
    weights: int
    kept: int
    disk: int
    ram_weights: int
    ram_solve: int
    notes: tuple[str, ...]
    device: DevicePlan | None = None
    ahead: int = 0

    @property
    def ram(self) -> int:
        """Memory that does not depend on the data: what counts against ``--max-ram``."""
        return self.ram_weights + self.ram_solve

    @property
    def ram_peak(self) -> int:
        """The same with fixed buffers: the most that is resident beyond the loaded program."""
        return self.ram + FIXED_BYTES

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "ram": self.ram}


def make_plan(
    sources: Sources,
    layout: Layout,
    recipe: Recipe,
    *,
    given: Given,
    max_ram: int | None,
    device: str,
    notes: Sequence[str],
) -> PatchPlan:
    """Plan a run.

    Args:
        sources: the open pair.
        layout: the output's files.
        recipe: as resolved for the data at hand.
        given: the data at hand.
        max_ram: memory that the run may take, in bytes; None without a limit.
        device: where layers are solved, ``cpu`` or ``cuda``.
        notes: what was decided so far.
    """
    layers = tuple(
        PlannedLayer(layer.target.name, layer.tensor, *layer.shape, _kept(layer, recipe))
        for layer in sources.layers
    )
    if given.samples or given.statistics is not None:
        weights, solve = max(_phases(sources, layers, recipe, given, device), key=sum)
        solve += sources.tuned.checkpoint.reading_bytes
    else:
        memory = divide_memory(sources, recipe, max_ram)
        weights, solve = memory.ring, memory.beside
    return PatchPlan(
        layers,
        recipe.model_dump(),
        weights=sum(layer.rows * layer.cols for layer in layers),
        kept=sum(layer.kept for layer in layers),
        disk=layout.file_bytes,
        ram_weights=weights,
        ram_solve=solve,
        notes=(*sources.notes, *notes),
    )


def check_plan(plan: PatchPlan, options: RunOptions, *, with_data: bool) -> PatchPlan:
    """Check a plan against the memory that it may take and that there is.

    Args:
        plan: of the run.
        options: of the run.
        with_data: whether statistics or samples are read; then all is where layers are solved.

    Returns:
        The plan, with a note where less is free at the moment than it takes.

    Raises:
        UsageError: more than ``options.max_ram``, ``options.max_vram``, the machine's memory, or
            the GPU's.
    """
    limit, device = options.max_ram, torch.device(options.device)
    taken = host_bytes(plan, device)
    if limit is not None and taken > limit:
        raise UsageError(
            f"max_ram of {limit} bytes is too little: the largest block and its statistics take"
            f" {taken}; expected more, or fewer layers (`targets`), or propagate 'none'"
        )
    told = check_memory(taken + FIXED_BYTES, limit)
    on_device = plan.ram if with_data else plan.ram_solve
    if plan.device is not None:
        on_device = plan.device.largest.bytes
    if options.max_vram is not None and on_device > options.max_vram:
        raise UsageError(
            f"max_vram of {options.max_vram} bytes is too little: the largest layer takes"
            f" {on_device}; expected more, or fewer layers (`targets`)"
        )
    told += check_device_memory(on_device, device)
    return replace(plan, notes=(*plan.notes, *told))


def host_bytes(plan: PatchPlan, device: torch.device) -> int:
    """Bytes of the machine's memory that do not depend on the data, without fixed buffers.

    Blocks pass through it on their way to a GPU, and what is solved there waits in it.
    """
    if device.type == "cpu":
        return plan.ram
    return plan.ram_weights + plan.ahead + (0 if plan.device is None else plan.device.host)


def _kept(layer: LayerOnDisk, recipe: Recipe) -> int:
    weights = layer.shape[0] * layer.shape[1]
    density = recipe.of(layer.target.name).density
    return layer.slices * kept_count(weights // layer.slices, density)


def _phases(
    sources: Sources,
    layers: Sequence[PlannedLayer],
    recipe: Recipe,
    given: Given,
    device: str,
) -> Iterator[tuple[int, int]]:
    """Resident weights, and what is beside them, while each layer is solved and before."""
    resident = dict.fromkeys((layer.name for layer in layers), 0)
    if given.samples:
        model = skeleton_of(sources.tuned)
        paired = recipe.propagate == "asymmetric" and recipe.decorate == "exact"
        words = run_dtype(model).itemsize * (1 + paired + given.old)
        most = Residency.most_resident(model, resident)
        resident = {name: words * count for name, count in most.items()}
        yield words * max(Residency.unit_sizes(model).values(), default=0), 0
        if recipe.retain_weight is None and (head := output_head(model)) is not None:
            answering = sum(parameter.numel() for parameter in head.parameters())
            answering += max(most.values(), default=0)
            yield run_dtype(model).itemsize * answering, 0
    for layer in layers:
        yield resident[layer.name], _solve_bytes(sources, layer, recipe, given, device)


def _solve_bytes(
    sources: Sources, layer: PlannedLayer, recipe: Recipe, given: Given, device: str
) -> int:
    """Working set of one layer: words of both inputs, fp32 copies, matrices of its inputs' size."""
    matrix, square = layer.rows * layer.cols, layer.cols * layer.cols * _FP32
    nbytes = sources.tuned.checkpoint.tensors[layer.tensor].nbytes
    words = 2 * nbytes
    if given.statistics == "diag":
        return words + matrix * _PLAIN_BYTES
    exact = recipe.decorate == "exact"
    if exact and not recipe.refits:
        solved = min(matrix, max(layer.cols, SOLVED_AT_ONCE[device]))
        words += (matrix - solved) * (_MASK_BYTES + nbytes // max(1, matrix))
        matrix = solved
    paired = recipe.propagate == "asymmetric" and exact
    grams = (3 if paired else 1) + (3 if given.old and exact else 0)
    scoring = _FACTORS if recipe.sensitivity in ("obs", "weight") else 0
    if grams == 1:
        solving = matrix * _PLAIN_BYTES + square
        return words + square + max(square * scoring, solving)
    copies = _SYSTEM_BYTES + (_RETAIN_BYTES if given.old else 0)
    return words + square * grams + max(square * scoring, matrix * copies)
