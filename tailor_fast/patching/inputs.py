"""What runs for which input: the recipe settled with the data at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tailor_fast._core.errors import UsageError
from tailor_fast.patching.recipe import DEFAULT_REFITS, DEFAULT_RETAIN, SCORE, Recipe
from tailor_fast.patching.report import Report


@dataclass(frozen=True)
class Given:
    """The data that a run was given.

    Attributes:
        samples: samples of the new task.
        statistics: kind of the new task's statistics file; None without one.
        old_samples: samples of old tasks.
        old_statistics: kind of the old tasks' statistics file; None without one.
    """

    samples: bool = False
    statistics: str | None = None
    old_samples: bool = False
    old_statistics: str | None = None

    @property
    def old(self) -> bool:
        """Whether there is any old-task data."""
        return self.old_samples or self.old_statistics is not None


def resolve(recipe: Recipe, given: Given, report: Report) -> Recipe:
    """Return the recipe as it will be run; say in the report what that changes.

    ``retain_weight`` stays open where there are samples to measure it by.

    Raises:
        UsageError: the recipe asks for what the data cannot give, or data has no use.
    """
    recipe = _resolved(recipe, given, report)
    if recipe.retain_weight is not None or (given.old_samples and recipe.decorate == "exact"):
        return recipe
    if given.old and recipe.decorate == "exact":
        report.notes.append(
            f"retain statistics: retain_weight {DEFAULT_RETAIN:g}, without samples to measure it by"
        )
    return recipe.model_copy(update={"retain_weight": DEFAULT_RETAIN})


def _resolved(recipe: Recipe, given: Given, report: Report) -> Recipe:
    if given.samples and given.statistics is not None:
        raise UsageError(
            "calibration samples and statistics are given; expected one of the two; leave one out"
        )
    if given.statistics is not None:
        recipe = _with_statistics(recipe, given, report)
    elif not given.samples:
        return _without_data(recipe, given, report)
    if recipe.sensitivity == "ratio" and not given.old:
        raise UsageError(
            "sensitivity 'ratio' compares with old tasks; got no old-task data; give retain data"
        )
    if given.old and recipe.decorate != "exact" and recipe.sensitivity != "ratio":
        raise UsageError(
            f"decorate {recipe.decorate!r} has no retention term; got old-task data; leave it out,"
            " or use decorate 'exact'"
        )
    if recipe.decorate == "exact" and given.old_statistics == "diag":
        raise UsageError(
            "retain statistics are of kind 'diag'; decorate 'exact' needs the whole Gram; calibrate"
            " with kind 'full'"
        )
    recipe = with_refits(recipe, report, old=given.old)
    if given.samples and given.old_statistics is not None and recipe.propagate == "asymmetric":
        report.notes.append(
            "retain statistics: the patched model's inputs on old tasks are taken to be the base"
            " model's"
        )
    if recipe.propagate == "asymmetric" and recipe.decorate != "exact":
        report.notes.append(
            f"propagate 'asymmetric' is 'sequential' for decorate {recipe.decorate!r}: it uses one"
            " Gram only"
        )
    return recipe


def with_refits(recipe: Recipe, report: Report, *, old: bool) -> Recipe:
    """Settle the number of refits by whether there is old-task data; say so in the report."""
    if recipe.refits is not None:
        return recipe
    refits = 0
    if recipe.decorate == "exact" and old and not SCORE & recipe.model_fields_set:
        refits = DEFAULT_REFITS
        report.notes.append(f"old-task data: the mask is chosen in {refits} refits, not by a score")
    return recipe.model_copy(update={"refits": refits})


def _with_statistics(recipe: Recipe, given: Given, report: Report) -> Recipe:
    explicit = recipe.model_fields_set
    if given.old_samples:
        raise UsageError(
            "retain samples are given with statistics, for which no model runs; expected retain"
            " statistics; calibrate BASE on the old tasks"
        )
    if recipe.propagate != "none":
        if "propagate" in explicit:
            raise UsageError(
                f"propagate {recipe.propagate!r} needs samples; got statistics; give calibration"
                " samples, or use propagate 'none'"
            )
        report.notes.append("statistics: propagate 'none'")
    changes: dict[str, Any] = {"propagate": "none"}
    if given.statistics == "diag":
        changes |= _with_diagonal(recipe, explicit, report)
    return recipe.model_copy(update=changes)


def _with_diagonal(recipe: Recipe, explicit: set[str], report: Report) -> dict[str, Any]:
    if recipe.decorate != "none" and "decorate" in explicit:
        raise UsageError(
            f"decorate {recipe.decorate!r} needs Grams; the statistics are of kind 'diag';"
            " calibrate with kind 'full', or use decorate 'none'"
        )
    if recipe.sensitivity in ("obs", "weight") and "sensitivity" in explicit:
        raise UsageError(
            f"sensitivity {recipe.sensitivity!r} needs Grams; the statistics are of kind 'diag';"
            " use 'diag' or 'ratio'"
        )
    if recipe.refits:
        raise UsageError(
            f"refits {recipe.refits} need Grams; the statistics are of kind 'diag'; calibrate with"
            " kind 'full', or leave refits out"
        )
    sensitivity = "diag" if recipe.sensitivity in ("obs", "weight") else recipe.sensitivity
    report.notes.append(
        f"statistics of kind 'diag': sensitivity {sensitivity!r}, nothing decorated"
    )
    return {"decorate": "none", "sensitivity": sensitivity}


def _without_data(recipe: Recipe, given: Given, report: Report) -> Recipe:
    if given.old:
        raise UsageError(
            "old-task data is given without data of the new task; expected both; give calibration"
            " data"
        )
    wanted = {"sensitivity", "propagate"} & recipe.model_fields_set
    if recipe.decorate in ("obs", "official"):
        wanted.add("decorate")
    if "decorate" in recipe.model_fields_set and recipe.decorate != "none":
        wanted.add("decorate")
    if "propagate" in wanted and recipe.propagate == "none":
        wanted.discard("propagate")
    if recipe.refits:
        wanted.add("refits")
    for what in sorted(wanted):
        raise UsageError(
            f"{what} {getattr(recipe, what)!r} needs data of the new task; got none; give"
            " calibration data"
        )
    report.notes.append("no data: salience only, nothing decorated")
    return recipe.model_copy(
        update={"salience_weight": 1.0, "decorate": "none", "propagate": "none", "refits": 0}
    )
