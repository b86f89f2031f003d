"""One layer from statistics to the weight that is written: mask, decorate, round."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import torch

from tailor_fast._core.processes import ALONE, Processes
from tailor_fast.calibration.moments import DiagonalMoments, Moments
from tailor_fast.models import Target
from tailor_fast.ops.decorate import (
    Decorated,
    ObsFactor,
    decorate_obs,
    decorate_official,
    factor_obs,
)
from tailor_fast.patching.equations import Equations, Layer
from tailor_fast.patching.layers import LayerPair
from tailor_fast.patching.masks import Masks
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.refit import Exact, refit_mask
from tailor_fast.patching.report import LinearReport

# Elements that are merged at once: on a CPU they stay in the cache, on a GPU they keep it busy.
_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 24}
_WORDS = {2: torch.int16, 4: torch.int32}
# Elements of the rows that are solved exactly at once, so that the working copies, some 80 bytes
# for each, do not grow with the layer: 2048 rows of 4096 columns on a CPU.
SOLVED_AT_ONCE = {"cpu": 1 << 23, "cuda": 1 << 24}
LOSSES = ("loss", "loss_undecorated", "loss_reverted")


@dataclass(frozen=True)
class GroupInputs:
    """What is known about a group's inputs when its layers are solved.

    ``old.gram`` is overwritten by the first exact solve. ``solved_at_once`` as in ``Placement``.
    """

    members: tuple[str, ...]
    new: Moments | DiagonalMoments | None
    old: Moments | DiagonalMoments | None
    column_weight: torch.Tensor | None
    solved_at_once: int | None = None
    _made: dict[tuple[float, float], Equations] = field(default_factory=dict)
    _factors: dict[float, ObsFactor] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def equations(self, recipe: Recipe) -> Equations | None:
        """What all rows of an exact solve share, made once; None for the other decorations."""
        if not isinstance(self.new, Moments) or recipe.decorate != "exact":
            return None
        options = (recipe.percdamp, recipe.settled_retain_weight)
        with self._lock:  # layers may be solved in threads
            if options not in self._made:
                if self._made:
                    raise RuntimeError("layers of a group have one percdamp and one retain_weight")
                old = self.old if isinstance(self.old, Moments) else None
                self._made[options] = Equations(self.new, old, *options, over_old=True)
            return self._made[options]

    def factor(self, gram: torch.Tensor, percdamp: float) -> ObsFactor:
        """What the sweeps over all rows share, made once; each would hold as much by itself."""
        with self._lock:
            if percdamp not in self._factors:
                self._factors.clear()  # one is held
                self._factors[percdamp] = factor_obs(gram, percdamp=percdamp)
            return self._factors[percdamp]


@dataclass(frozen=True)
class Solved:
    """The rows of a layer that one process solved.

    Attributes:
        weight: their patched weights, in the models' dtype; of a process without rows, any.
        report: what was done with them.
        parts: the rows of each process.
    """

    weight: torch.Tensor
    report: LinearReport
    parts: Sequence[slice]


def solve_layer(
    target: Target, pair: LayerPair, inputs: GroupInputs, masks: Masks, recipe: Recipe
) -> tuple[torch.Tensor, LinearReport]:
    """Return the patched weight ``[rows, cols]`` in the models' dtype, and what was done."""
    solved = solve_part(target, pair, inputs, masks, recipe, ALONE)
    return solved.weight, solved.report


def solve_part(
    target: Target,
    pair: LayerPair,
    inputs: GroupInputs,
    masks: Masks,
    recipe: Recipe,
    processes: Processes,
) -> Solved:
    """Solve this process's rows of a layer.

    The rows do not depend on each other once the mask is known; the authors' code makes its masks
    on the way, so that one process solves the layer whole.
    """
    start = time.perf_counter()
    rows, cols = pair.base.shape
    report = LinearReport(target.name, rows, cols, kept=0, group=inputs.members)
    if recipe.decorate == "official" and isinstance(inputs.new, Moments):
        owner = inputs.members.index(target.name) % processes.count
        parts = [slice(0, rows if rank == owner else 0) for rank in range(processes.count)]
        weight = pair.base
        if processes.rank == owner:
            weight, mask, decorated = _official(pair, inputs.new, recipe)
            report.kept, report.loss = int(mask.count_nonzero()), float(decorated)
    else:
        mask = masks.mask(target.name, pair, inputs.column_weight)
        parts = [processes.share_of(rank, rows) for rank in range(processes.count)]
        own = parts[processes.rank]
        part = pair.rows(own)
        equations = inputs.equations(recipe)
        if equations is None:
            patch, result = _decorate(part, mask[own], inputs, recipe)
            weight = write_patch(part.base, patch, mask[own])
            _record(report, result)
        else:
            report.damping, report.retain_scale = equations.damping, equations.retain_scale
            tiles = _tiles(part, equations, recipe, inputs.solved_at_once)
            if recipe.refits:
                held = tuple(tiles)  # their right-hand sides serve in every step
                mask = refit_mask(mask, held, recipe, (parts, processes), target.name)
                tiles = iter(held)
            weight = solve_tiles(part, mask[own], tiles, report)
        report.kept = int(mask[own].count_nonzero())
    report.tokens = 0 if inputs.new is None else inputs.new.tokens
    report.seconds = time.perf_counter() - start
    return Solved(weight, report, parts)


def write_patch(base: torch.Tensor, patch: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``base + patch`` on the mask, rounded to ``base``'s dtype; ``base`` bit for bit elsewhere."""
    return torch.where(mask, (base.float() + patch).to(base.dtype), base)


def keep_(base: torch.Tensor, tuned: torch.Tensor, mask: torch.Tensor) -> None:
    """``write_patch`` of the bare delta, in place of ``base``, without copies of a whole tensor."""
    kept, chosen = tuned.view(-1), mask.view(-1).view(torch.int8)
    step = max(1, min(_CHUNK[base.device.type], len(kept)))
    new, delta = (torch.empty(step, device=base.device) for _ in range(2))
    rounded = torch.empty(step, dtype=base.dtype, device=base.device)
    word = _WORDS[base.element_size()]
    ones = torch.empty(step, dtype=word, device=base.device)
    for old, after, flags in zip(
        base.view(-1).split(step), kept.split(step), chosen.split(step), strict=True
    ):
        size = len(old)
        new[:size].copy_(old)
        delta[:size].copy_(after).sub_(new[:size])
        rounded[:size].copy_(new[:size].add_(delta[:size]))
        # A select by bits, three times as fast as ``torch.where``: old ^ ((old ^ new) & mask).
        words, changed = old.view(word), rounded[:size].view(word).bitwise_xor_(old.view(word))
        words.bitwise_xor_(changed.bitwise_and_(ones[:size].copy_(flags).neg_()))


def _decorate(
    pair: LayerPair, mask: torch.Tensor, inputs: GroupInputs, recipe: Recipe
) -> tuple[torch.Tensor, Decorated | None]:
    new, factor = inputs.new, None
    if isinstance(new, Moments) and recipe.decorate != "none":
        factor = inputs.factor(new.gram, recipe.percdamp)  # before the delta takes its memory
    delta = pair.tuned.float() - pair.base.float()
    if factor is None or not isinstance(new, Moments):
        return torch.where(mask, delta, torch.zeros_like(delta)), None
    result = decorate_obs(delta, mask, new.gram, factor=factor)
    return result.patch, result


def _tiles(
    pair: LayerPair, equations: Equations, recipe: Recipe, elements: int | None
) -> Iterator[Exact]:
    """The exact problem, some rows at a time: each row's problem is its own."""
    rows, cols = pair.base.shape
    step = rows_at_once(cols, pair.base.device.type, elements)
    for begin in range(0, max(1, rows), step):  # one tile where a process has no rows
        yield _exact(pair.rows(slice(begin, min(begin + step, rows))), equations, recipe)


def rows_at_once(cols: int, device: str, elements: int | None = None) -> int:
    """How many rows of ``cols`` weights are solved exactly at once."""
    return max(1, (elements or SOLVED_AT_ONCE[device]) // max(1, cols))


def solve_tiles(
    pair: LayerPair, mask: torch.Tensor, tiles: Iterable[Exact], report: LinearReport
) -> torch.Tensor:
    """The patched weight ``[rows, cols]``, from the problems of its rows in their order."""
    weight, begin = torch.empty_like(pair.base), 0
    for exact in tiles:
        tile = slice(begin, begin := begin + len(exact.delta))
        result = exact.solve(mask[tile])
        _record(report, result)
        weight[tile] = write_patch(pair.base[tile], result.patch, mask[tile])
    return weight


def _exact(pair: LayerPair, equations: Equations, recipe: Recipe) -> Exact:
    """The problem of an exact solve of some rows."""
    base, tuned = pair.base.float(), pair.tuned.float()
    biases = [None if b is None else b.float() for b in (pair.base_bias, pair.tuned_bias)]
    out_bias = biases[0] if recipe.untouched == "base" else biases[1]
    system = equations.system(Layer(base, tuned, biases[0], biases[1], out_bias))
    return Exact(tuned - base, system, recipe.tol, recipe.max_iterations)


def _official(
    pair: LayerPair, new: Moments, recipe: Recipe
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    result = decorate_official(
        pair.base,
        pair.tuned,
        new.gram,
        sparsity=float(1 - Fraction(repr(recipe.density))),
        score_weights=(recipe.salience_weight, 1.0 - recipe.salience_weight),
        percdamp=recipe.percdamp,
    )
    return result.weight, result.mask, result.loss


def _record(report: LinearReport, result: Decorated | None) -> None:
    """Add what some rows' solve tells to the layer's."""
    if result is None:
        return
    for name in LOSSES:
        before = getattr(report, name) or 0.0
        setattr(report, name, before + float(getattr(result, name)))
    report.iterations = max(report.iterations or 0, int(result.iterations))


def left_at_base(target: Target, pair: LayerPair, note: str) -> LinearReport:
    """The report of a layer for which nothing is known, so that nothing is kept."""
    rows, cols = pair.base.shape
    return LinearReport(target.name, rows, cols, kept=0, note=note)
