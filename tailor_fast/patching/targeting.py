"""``target_old``: the recipe that keeps most of the new task within a loss budget on old ones.

Samples of both are cut in two. Statistics of those that are fitted on tell, for every recipe of a
grid, the output error that it leaves on the new task and the one that it causes on old ones, and
recipes that another one beats in both are dropped. Along the rest, from the gentlest on, models are
made by bisection and measured on the samples that are held back.

A measure on few samples flatters: with 16 a recipe that kept 0.976 of old tasks seemed to keep
0.997. So at least ``HELD_LEAST`` are held back, and a recipe counts as within the budget only where
its kept share less one standard error is (the rule of Breiman, Friedman, Olshen and Stone,
Classification and Regression Trees, 1984, section 3.4.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from tailor_fast._core.errors import InputError, UsageError
from tailor_fast._core.processes import Processes
from tailor_fast._core.progress import Progress, Silent
from tailor_fast.calibration.statfile import is_statistics
from tailor_fast.calibration.streamed import StreamedModel
from tailor_fast.checkpoint import Hashed, Layout, StagedCheckpoint, open_checkpoint
from tailor_fast.checkpoint.leftovers import remove
from tailor_fast.checkpoint.staging import Staging
from tailor_fast.patching.grid import GridJob, choices_of, front_of
from tailor_fast.patching.held_out import Answers, HeldOut
from tailor_fast.patching.job import Request
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.report import Found, Point, Report, Tried
from tailor_fast.patching.sources import Sources

Build = Callable[..., Report]  # ``patch_checkpoint``


def check_target(target: float, request: Request, processes: Processes) -> None:
    """Refuse a search that cannot be made.

    Raises:
        UsageError: the target is none, or does not go with the data, the recipe or the options.
    """
    if not 0.0 < target < 1.0:
        raise UsageError(f"target_old must be more than 0 and less than 1; got {target}")
    retain, recipe, options = request.retain, request.recipe, request.options
    if request.calibration is None or retain is None or is_statistics(retain):
        raise UsageError(
            "target_old measures on samples; expected samples of the new task and of old ones; give"
            " calibration and retain samples"
        )
    if recipe.decorate != "exact" or recipe.scope in ("layer", "global"):
        raise UsageError(
            "target_old searches with exact solves of one layer at a time; expected decorate"
            f" 'exact' and a scope within a layer; got {recipe.decorate!r} and {recipe.scope!r}"
        )
    if len(choices_of(recipe)) == 1:
        raise UsageError(
            "target_old searches density and retain_weight; both are chosen; leave one out"
        )
    if processes.count > 1:
        raise UsageError(
            f"target_old is the work of one process; got {processes.count}; start it without"
            " torchrun"
        )
    if options.resume == "required":
        raise UsageError(
            "resume 'required' with target_old: the search itself is always made anew; expected"
            " 'auto', which goes on behind it, or 'never'"
        )
    options.refuse_max_vram("target_old")


def plan_target(target: float, request: Request, processes: Processes) -> tuple[Request, str]:
    """Check a search as far as headers and data tell.

    Args:
        target: share of the base model's score on old tasks that is to be kept.
        request: what is asked for.
        processes: that would do it.

    Returns:
        The largest run that the search makes, and a sentence about all of them.

    Raises:
        TailorError: what the search would refuse.
    """
    check_target(target, request, processes)
    with _Search.opened(request, Silent()) as search:
        choices = search.job.choices
        count, largest = len(choices), max(choices, key=lambda choice: choice["density"])
        steps = count.bit_length()
        note = (
            f"target_old {target:g}: {count} recipes by statistics, one pass over each model; then"
            f" at most {steps} are made in turn, each as long a run as the last one and two passes"
            f" more, and measured on {search.old.samples} samples of old tasks and"
            f" {search.new.samples} of the new one; beside OUT as much disk as OUT takes"
        )
    return _fitted(request, request.recipe.model_copy(update=largest)), note


def search_target(
    target: float, request: Request, processes: Processes, progress: Progress | None, build: Build
) -> tuple[Request, Found]:
    """Search for a recipe.

    Args:
        target: share of the base model's score on old tasks that is to be kept.
        request: what is asked for.
        processes: that do it.
        progress: told about each step.
        build: ``patch_checkpoint``, which makes each model that is measured.

    Returns:
        The same request with the recipe that was found, and what was found.

    Raises:
        InputError: no recipe keeps enough, or the data is not usable.
        TailorError: as ``patch_checkpoint``.
    """
    check_target(target, request, processes)
    told = _Steps(progress or Silent())
    with _Search.opened(request, told) as search:
        front = front_of(search.grid())
        told.note(f"{len(front)} of {len(search.points)} recipes are not beaten by another")
        tried = bisect(front, target, search.measured(build))
        best = best_of(tried, target)
        point = best.point
        found = Found(
            target, best, tried, tuple(search.points), search.old.samples, search.new.samples
        )
    told.note(str(found))
    chosen = {"density": point.density, "retain_weight": point.retain_weight}
    return _fitted(request, request.recipe.model_copy(update=chosen)), found


def bisect(
    front: Sequence[Point], target: float, measure: Callable[[Point], Tried]
) -> tuple[Tried, ...]:
    """Measure points of a front by bisection, as if what they keep of old tasks fell along it."""
    tried: list[Tried] = []
    low, high = 0, len(front)
    while low < high:
        middle = (low + high) // 2
        tried.append(measure(front[middle]))
        if is_within(tried[-1], target):
            low = middle + 1
        else:
            high = middle
    return tuple(tried)


def is_within(tried: Tried, target: float) -> bool:
    """Whether a recipe keeps ``target`` of old tasks, its standard error taken off."""
    return tried.old - tried.old_error >= target


def best_of(tried: Sequence[Tried], target: float) -> Tried:
    """The recipe within the budget that keeps most of the new task.

    Raises:
        InputError: there is none.
    """
    within = [one for one in tried if is_within(one, target)]
    if within:
        return max(within, key=lambda one: (one.new, one.old))
    best = max(tried, key=lambda one: one.old - one.old_error)
    raise InputError(
        f"no recipe keeps {target:g} of the old tasks on held-back samples, one standard error"
        f" taken off; expected one; the best of {len(tried)} keeps {best.old:.4f} ±"
        f" {best.old_error:.4f}; lower target_old, choose a smaller density, or give more"
        " samples of old tasks"
    )


def _fitted(request: Request, recipe: Recipe) -> Request:
    return replace(request, recipe=recipe, options=replace(request.options, part="fitted"))


class _Steps:
    """Progress of one run that is made of several."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.start, self.group, self.note = progress.start, progress.group, progress.note

    def finish(self) -> None:
        """Do nothing: more is to come."""


@dataclass
class _Search:
    """A search whose inputs are open."""

    request: Request  # for what is fitted on
    job: GridJob
    sources: Sources
    layout: Layout
    tuned: StreamedModel
    base: StreamedModel
    new: HeldOut
    old: HeldOut
    told: Progress
    scratch: Path  # where models are made
    points: list[Point] = field(default_factory=list)

    @staticmethod
    @contextmanager
    def opened(request: Request, told: Progress) -> Iterator[_Search]:
        """Open everything, and refuse what cannot work; no weight is read."""
        fitted = _fitted(request, request.recipe)
        job = GridJob(fitted, told)
        with job.opened() as (sources, layout), ExitStack() as stack:
            inputs = (*sources.base.checkpoint.input_paths, *sources.tuned.checkpoint.input_paths)
            overwrite = request.options.overwrite
            StagedCheckpoint.check(request.out, layout, overwrite=overwrite, inputs=inputs)
            job.plan(sources, layout)
            beside, name = request.out.absolute().parent, f".{request.out.name}.target"
            # Its lock keeps a second search away; what a killed one left goes when it is made.
            scratch = Staging(beside / name, directory=True, overwrite=False, inputs=inputs)
            stack.callback(scratch.discard)
            device = torch.device(request.options.device)
            tuned = StreamedModel(sources.tuned, sources.keys, device)
            base = StreamedModel(sources.base, sources.keys, device)
            processor = sources.tuned.checkpoint.processor_directory or request.tuned
            new, old = (
                HeldOut(Path(str(path)), processor, model, request.options, beside)
                for path, model in ((request.calibration, tuned), (request.retain, base))
            )
            yield _Search(fitted, job, sources, layout, tuned, base, new, old, told, scratch.path)

    def grid(self) -> list[Point]:
        """What statistics tell of every recipe."""
        self.told.note("taking statistics of both models for every recipe")
        self.job.follow(self.sources, self.layout)
        self.points = self.job.points()
        return self.points

    def measured(self, build: Build) -> Callable[[Point], Tried]:
        """How a recipe's model is made, measured, and removed again."""
        self.told.note("measuring both models on what is held back")
        old, new = self.old.ask(self.base), self.new.ask(self.tuned)
        request = self.request

        def measure(point: Point) -> Tried:
            chosen = {"density": point.density, "retain_weight": point.retain_weight}
            self.told.note(
                f"trying density {point.density:g}, retain_weight {point.retain_weight:g}"
            )
            place = self.scratch / "model"
            try:
                build(
                    request.base,
                    request.tuned,
                    place,
                    request.recipe.model_copy(update=chosen),
                    calibration=request.calibration,
                    retain=request.retain,
                    options=replace(request.options, resume="never"),
                    progress=self.told,
                )
                kept_old, kept_new = self._ask(place, old, new)
            finally:
                remove(place)
            self.told.note(f"it keeps {kept_old[0]:.4f} of old tasks, {kept_new[0]:.4f} of the new")
            return Tried(point, *kept_old, *kept_new)

        return measure

    def _ask(
        self, place: Path, old: Answers, new: Answers
    ) -> tuple[tuple[float, float], tuple[float, float]]:
        device = torch.device(self.request.options.device)
        with open_checkpoint(place) as made:
            model = StreamedModel(Hashed(made), self.sources.keys, device)
            return self.old.ask(model).over(old), self.new.ask(model).over(new)
