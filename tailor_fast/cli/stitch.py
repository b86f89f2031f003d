"""``tailor-fast stitch``: several fine-tunes of one base into one model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from tailor_fast._core.errors import UsageError
from tailor_fast.cli.options import BatchOptions, Quietable, RecipeOptions

if TYPE_CHECKING:
    from tailor_fast.patching.report import Report
    from tailor_fast.stitching import Task

_PATCH_ENDING = ".tailor.safetensors"

T = TypeVar("T")


class Support(StrEnum):
    """Which weights may change."""

    UNION = "union"
    BEST = "best"


@dataclass(frozen=True, kw_only=True)
class StitchOptions(RecipeOptions, BatchOptions, Quietable):
    """``BASE TUNED... -o OUT`` and data of each task, in the order of the models."""

    base: Annotated[Path, typer.Argument(metavar="BASE", help="Checkpoint before fine-tuning.")]
    tuned: Annotated[
        list[Path],
        typer.Argument(
            metavar="TUNED...", help="Its fine-tunes; with --from-patches: patch files."
        ),
    ]
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="OUT", help="Directory of the stitched model.")
    ]
    statistics: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="STATS", help="What `calibrate` wrote; once for each TUNED, in order."
        ),
    ] = None
    calibration: Annotated[
        list[Path] | None,
        typer.Option(metavar="DATA.jsonl", help="Samples instead; once for each TUNED, in order."),
    ] = None
    weight: Annotated[
        list[float] | None,
        typer.Option(
            metavar="W",
            help="How much a task counts; once for each TUNED, in order.",
            show_default="1 each",
        ),
    ] = None
    name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A task's name; once for each TUNED, in order.",
            show_default="the model's",
        ),
    ] = None
    retain: Annotated[
        Path | None,
        typer.Option(
            metavar="OLD.jsonl|STATS", help="Samples of old tasks, or statistics of BASE on them."
        ),
    ] = None
    support: Annotated[
        Support,
        typer.Option(
            help="Change what any task would keep, --density each, or what scores best in any,"
            " --density in all."
        ),
    ] = Support.UNION
    from_patches: Annotated[
        bool,
        typer.Option(
            "--from-patches",
            help="Surrogate without the fine-tunes: take each patch for the whole difference.",
        ),
    ] = False
    out_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Size of an output file.", show_default="5GB")
    ] = None


def stitch(options: StitchOptions) -> None:
    """Make one model of several fine-tunes of BASE: one patch, solved for all tasks at once."""
    from tailor_fast.checkpoint import parse_size
    from tailor_fast.cli.progress import shown
    from tailor_fast.cli.settings import recipe_of, run_options
    from tailor_fast.stitching import stitch_checkpoints

    tasks = _tasks(options)
    settings = run_options(options)
    if options.out_shard_size is not None:
        settings = replace(settings, max_shard_bytes=parse_size(options.out_shard_size))
    recipe = recipe_of(options)
    with shown(options.quiet) as progress:
        report = stitch_checkpoints(
            options.base,
            tasks,
            options.out,
            recipe,
            support=options.support.value,
            retain=options.retain,
            options=settings,
            progress=progress,
        )
    if not options.quiet:
        _show(report, options.out)


def _tasks(options: StitchOptions) -> dict[str, Task]:
    """The tasks, each with what was given for it."""
    from tailor_fast.stitching import Task

    models = options.tuned
    if bool(options.statistics) == bool(options.calibration):
        raise UsageError("expected --statistics or --calibration, one of them, once for each TUNED")
    statistics = _each("statistics", options.statistics, models)
    calibration = _each("calibration", options.calibration, models)
    weights = _each("weight", options.weight, models)
    names = [
        given or model.name.removesuffix(_PATCH_ENDING)
        for given, model in zip(_each("name", options.name, models), models, strict=True)
    ]
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise UsageError(f"{count} tasks are called {name!r}; tell them apart with --name")
    tasks = {}
    for name, model, sums, data, weight in zip(
        names, models, statistics, calibration, weights, strict=True
    ):
        tasks[name] = Task(
            tuned=None if options.from_patches else model,
            patch=model if options.from_patches else None,
            statistics=sums,
            calibration=data,
            weight=1.0 if weight is None else weight,
        )
    return tasks


def _each(option: str, given: Sequence[T] | None, models: Sequence[Path]) -> list[T | None]:
    """One value for each model; None for all where the option was not given."""
    if not given:
        return [None] * len(models)
    if len(given) != len(models):
        raise UsageError(
            f"--{option} is given {len(given)} times for {len(models)} models; expected one each,"
            " in the same order"
        )
    return list(given)


def _show(report: Report, out: Path) -> None:
    from tailor_fast.checkpoint import REPORT_NAME
    from tailor_fast.cli.tables import facts, share, show, table
    from tailor_fast.stitching.report import relative_losses

    losses = relative_losses(report.linears)
    weights = report.recipe["weights"]
    show(
        table(
            ("task", "weight", "error left"),
            [(name, f"{weights[name]:g}", f"{loss:.3f}") for name, loss in losses.items()],
        )
    )
    show("\nerror left: of the layers' answers, relative to the base model's; median over layers\n")
    kept = f"{share(report.kept, report.targeted)}, {report.kept:,} of {report.targeted:,} weights"
    show(
        facts(
            {
                "out": out,
                "kept": kept,
                "time": f"{report.seconds['total']:.1f} s",
                "report": out / REPORT_NAME,
                "notes": "\n".join(report.notes) or None,
            }
        )
    )
