"""What a run holds on the device, stage by stage, and where things wait so that it fits.

A limit is met in a fixed order: first without any cost, then with copies over the bus, then with
fewer rows solved at once. None of it changes what is computed but for the order of sums. The walk
takes what the plan says: rows from ``solving.rows_at_once``, tokens from ``moments.CHUNK_TOKENS``,
and suspended lanes have the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tailor_fast._core.errors import UsageError
from tailor_fast.calibration.device import passing_bytes
from tailor_fast.calibration.placement import ON_DEVICE, Placement
from tailor_fast.calibration.token_buffer import TOKENS_AT_ONCE
from tailor_fast.calibration.tracing import Lane
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.solving import SOLVED_AT_ONCE, rows_at_once

_FP32 = 4
# Bytes per weight, measured under ``_core.meter``: while a right-hand side is formed; in the exact
# solve, its result included, on a GPU with copies of nearly all rows for a second round beside the
# 72 measured; in the ranking of a layer's scores; and for the other decorations.
_FORM = 28
_SOLVE = {"cpu": 32, "cuda": 96}
_CHOOSE = {"cpu": 6, "cuda": 6}
_PLAIN = 40
_OBS = {"cpu": (28, 1), "cuda": (40, 2)}  # and how many matrices of the Gram's size
_HALVES = {"cpu": 0, "cuda": 4}  # per element of the Gram: its float16 halves
_PANEL = {"cpu": 0, "cuda": 2048 * 10}  # per column: a panel of the Gram in float64, turned
_WAITING = {"cpu": 0, "cuda": 2 * 2048 * _FP32}  # per column: two panels of what waits elsewhere
_LEAST_SOLVED = 1 << 18


@dataclass(frozen=True)
class Walk:
    """What decides how much of the device a run takes.

    Attributes:
        recipe: as it is run.
        device: ``cpu`` or ``cuda``.
        word: bytes of one weight.
        weights: bytes of one block of every model whose passes are in flight.
        inputs: bytes of all batches.
        paired: whether the patched stream is compared with another.
        old_samples: whether old tasks have streams of their own.
        old: whether there is any old-task data.
        lanes: the longest pass by layer name; empty where no model runs.
        tokens: of all samples of one data file, padding included.
    """

    recipe: Recipe
    device: str
    word: int
    weights: int
    inputs: int
    paired: bool
    old_samples: bool
    old: bool
    lanes: Mapping[str, Lane]
    tokens: int


@dataclass(frozen=True)
class Stage:
    """The largest of the stages of one kind: where it is, and its bytes on the device."""

    name: str
    layer: str
    bytes: int


@dataclass(frozen=True)
class DevicePlan:
    """Memory of the device.

    Attributes:
        stages: the largest of each kind.
        placement: how it is kept that small.
        limit: bytes that the run may take.
        host: bytes of matrices that wait in the host's memory.
    """

    stages: tuple[Stage, ...]
    placement: Placement
    limit: int | None = None
    host: int = 0

    @property
    def largest(self) -> Stage:
        """The stage that takes most."""
        return max(self.stages, key=lambda stage: stage.bytes)

    @property
    def left(self) -> int | None:
        """Bytes that suspended passes may keep on the device; None without a limit."""
        return None if self.limit is None else self.limit - self.largest.bytes


Layers = Sequence[tuple[str, int, int]]  # name, rows, cols


def plan_device(walk: Walk, layers: Layers, limit: int | None) -> DevicePlan:
    """Choose the first placement that ``limit`` bytes allow.

    Raises:
        UsageError: there is none; the message says how much the least one takes.
    """
    for placement in _placements(walk.device):
        stages = tuple(_stages(walk, layers, placement))
        host = max(waiting_bytes(walk, cols, placement) for _, _, cols in layers)
        plan = DevicePlan(stages, placement, limit, host)
        if limit is None or plan.largest.bytes <= limit:
            return plan
    least = plan.largest
    raise UsageError(
        f"max_vram of {limit} bytes is too little: {least.name} of {least.layer} takes"
        f" {least.bytes}; expected at least that, a smaller batch_size, or fewer layers (`targets`)"
    )


def _placements(device: str) -> Iterator[Placement]:
    yield ON_DEVICE
    yield Placement(differences_on_host=True)
    at_once = SOLVED_AT_ONCE[device]
    while at_once >= _LEAST_SOLVED:
        yield Placement(differences_on_host=True, new_waits=True, solved_at_once=at_once)
        at_once //= 2


def _stages(walk: Walk, layers: Layers, placement: Placement) -> Iterator[Stage]:
    scored = walk.recipe.sensitivity in ("obs", "weight") and walk.recipe.salience_weight < 1.0
    if walk.lanes:
        sizes = ((n, statistics_bytes(walk, n, cols, placement)) for n, _, cols in layers)
        yield _largest("statistics", sizes)
    if scored:
        yield _largest(
            "scores", ((n, scores_bytes(walk, cols, placement)) for n, _, cols in layers)
        )
    sizes = ((n, solve_bytes(walk, rows, cols, placement)) for n, rows, cols in layers)
    yield _largest("solve", sizes)


def _largest(name: str, sizes: Iterator[tuple[str, int]]) -> Stage:
    layer, size = max(sizes, key=lambda pair: pair[1])
    return Stage(name, layer, size)


def held_matrices(walk: Walk, placement: Placement) -> int:
    """Matrices of the Gram's size on the device while a group is solved."""
    each = 3 if walk.paired and not placement.differences_on_host else 1
    return each * (2 if walk.old else 1)


def waiting_bytes(walk: Walk, cols: int, placement: Placement) -> int:
    """Matrices of one group that wait in page-locked memory, which comes in powers of two."""
    each = 1 << max(0, cols * cols * _FP32 - 1).bit_length()
    differences = 2 if walk.paired and placement.differences_on_host else 0
    sets = 2 if walk.old_samples else 1
    return each * (differences * sets + (placement.new_waits and walk.old_samples))


def statistics_bytes(
    walk: Walk, name: str, cols: int, placement: Placement, waiting: int = TOKENS_AT_ONCE
) -> int:
    """Weights, sums and a batch, while a group's statistics are taken.

    ``waiting`` tokens are put aside until there are enough of them.
    """
    square, lane = cols * cols * _FP32, walk.lanes.get(name, Lane(0, 0, 0))
    taken = 3 if walk.paired else 1
    if walk.old_samples and not placement.new_waits:
        taken += 1 + (2 if walk.paired and not placement.differences_on_host else 0)
    paired = walk.tokens if walk.paired else None
    passing = passing_bytes(lane, cols, walk.word, waiting, paired)
    return walk.weights + walk.inputs + taken * square + passing


def scores_bytes(walk: Walk, cols: int, placement: Placement) -> int:
    """Weights, what is held of the statistics, and the factor of a Gram with its copy."""
    factors = 3 if walk.recipe.sensitivity == "weight" else 2
    squares = held_matrices(walk, placement) + factors
    return walk.weights + walk.inputs + squares * cols * cols * _FP32


def solve_bytes(walk: Walk, rows: int, cols: int, placement: Placement) -> int:
    """Weights, what is held of the statistics, and the working copies of one layer."""
    recipe, square, size = walk.recipe, cols * cols * _FP32, rows * cols
    before = walk.weights + walk.inputs + held_matrices(walk, placement) * square
    before += size * (2 * walk.word + 1)  # both weights and the mask
    if recipe.decorate == "obs":
        each, squares = _OBS[walk.device]
        return before + size * each + squares * square
    if recipe.decorate != "exact":
        return before + size * _PLAIN + (2 * square if recipe.decorate != "none" else 0)
    tile = min(rows, rows_at_once(cols, walk.device, placement.solved_at_once)) * cols
    solving = tile * _SOLVE[walk.device] + _HALVES[walk.device] * cols * cols
    solving += _PANEL[walk.device] * cols
    if not recipe.refits:
        forming = tile * _FORM
        if walk.paired and placement.differences_on_host:
            forming += _WAITING[walk.device] * cols
        return before + size * walk.word + max(forming, 2 * _FP32 * tile + solving)
    before += 2 * _FP32 * size  # delta and right-hand side in all steps
    ranking = _FP32 * size + size  # scores, and the mask of the step before
    return before + max(
        2 * square + ranking + 3 * _FP32 * tile,  # the factor that the first step solves with
        ranking + solving,
        ranking + size * _CHOOSE[walk.device],
        size * walk.word + solving,
    )
