"""``tailor-fast patch``: two checkpoints in, one out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tailor_fast._core.errors import UsageError
from tailor_fast.cli.plan import PlanOptions, plan

if TYPE_CHECKING:
    from tailor_fast._core.processes import Processes
    from tailor_fast.patching.report import Found, Report


class ResumeMode(StrEnum):
    """What becomes of what an earlier run finished."""

    AUTO = "auto"
    REQUIRED = "required"
    NEVER = "never"


@dataclass(frozen=True, kw_only=True)
class PatchOptions(PlanOptions):
    """The options of ``plan``, which ``--dry-run`` runs."""

    save_patch: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write what turns BASE into OUT: NAME.tailor.safetensors"
        ),
    ] = None
    no_checkpoint: Annotated[
        bool, typer.Option("--no-checkpoint", help="Write the patch only; OUT is but a name in it.")
    ] = False
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="REPO", help="Send OUT to this model repository when it is complete."),
    ] = None
    private: Annotated[
        bool, typer.Option("--private", help="Make REPO private, if it has to be made.")
    ] = False
    resume: Annotated[
        ResumeMode,
        typer.Option(help="Go on from what an earlier run finished; never: start, leave nothing."),
    ] = ResumeMode.AUTO
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be done, as `plan` does.")
    ] = False


def patch(options: PatchOptions) -> None:
    """Keep the best few of TUNED's weights, adjusted, on BASE, and write the model to OUT."""
    from tailor_fast.cli.settings import processes_of

    with processes_of(options) as processes:
        _refuse(options)
        if options.dry_run:
            if processes.rank == 0:
                plan(options)
            return
        push = None
        if options.push_to_hub is not None and processes.rank == 0:
            from tailor_fast.integrations.hub import Push

            push = Push(options.push_to_hub, private=options.private)
        report = _run(options, processes)
        if not options.quiet and processes.rank == 0:
            _show(report, options)
        if push is not None:
            address = push.send(options.out)
            if not options.quiet:
                typer.echo(f"sent to {address}")


def _refuse(options: PatchOptions) -> None:
    """Refuse options that leave nothing to do."""
    if options.no_checkpoint and options.save_patch is None:
        raise UsageError("--no-checkpoint leaves nothing to write; expected --save-patch with it")
    if options.push_to_hub is not None and options.no_checkpoint:
        raise UsageError("--no-checkpoint leaves no model for --push-to-hub; leave one of them out")
    if options.private and options.push_to_hub is None:
        raise UsageError("--private is of use with --push-to-hub only")


def _run(options: PatchOptions, processes: Processes) -> Report:
    from contextlib import nullcontext
    from functools import partial

    from tailor_fast.cli.progress import shown
    from tailor_fast.cli.settings import recipe_of, run_options
    from tailor_fast.cli.stopping import stopped_between_groups
    from tailor_fast.patching import checkpoints, saving

    run = checkpoints.patch_checkpoint
    if options.save_patch is not None:
        run = partial(
            saving.patch_to_file,
            save_patch=options.save_patch,
            checkpoint=not options.no_checkpoint,
        )
    recipe = recipe_of(options)
    settings = replace(run_options(options, processes), resume=options.resume.value)
    follows = processes.rank > 0  # silent, and stopped by process 0
    stops = options.resume is not ResumeMode.NEVER and not follows
    holding = stopped_between_groups if stops else nullcontext
    with shown(options.quiet or follows) as shower, holding(shower) as progress:
        return run(
            options.base,
            options.tuned,
            options.out,
            recipe,
            calibration=options.calibration,
            retain=options.retain,
            statistics=options.statistics,
            target_old=options.target_old,
            options=settings,
            progress=progress,
            processes=processes,
        )


def _show(report: Report, options: PatchOptions) -> None:
    from tailor_fast.checkpoint import REPORT_NAME
    from tailor_fast.cli.tables import facts, share, show, shown_size
    from tailor_fast.patching.records import PICTURE_NAME

    out, patch = None if options.no_checkpoint else options.out, options.save_patch
    kept = (
        f"{share(report.kept, report.targeted)}, {report.kept:,} of {report.targeted:,} weights in"
        f" {len(report.linears)} layers"
    )
    seconds = ", ".join(f"{stage} {spent:.1f} s" for stage, spent in report.seconds.items())
    if report.target_old is not None:
        show(_tried(report.target_old) + "\n")
    show(
        facts(
            {
                "out": out,
                "patch": patch and f"{patch}, {shown_size(patch.stat().st_size)}",
                "kept": kept,
                "loss": _losses(report),
                "time": seconds,
                "report": out and out / REPORT_NAME,
                "picture": out and out / PICTURE_NAME,
                "notes": "\n".join(report.notes) or None,
            }
        )
    )


def _tried(found: Found) -> str:
    """The recipes whose models were made, as a table; the one that was taken has a star."""
    from tailor_fast.cli.tables import table

    return table(
        ("tried", "density", "retain weight", "old kept", "±", "new kept", "±"),
        [
            (
                f"{number}{'*' if one == found.chosen else ''}",
                f"{one.point.density:g}",
                f"{one.point.retain_weight:g}",
                *(f"{100 * value:.2f}%" for value in (one.old, one.old_error)),
                *(f"{100 * value:.2f}%" for value in (one.new, one.new_error)),
            )
            for number, one in enumerate(found.tried, 1)
        ],
    )


def _losses(report: Report) -> str | None:
    from statistics import median

    rows = [row for row in report.linears if row.loss_reverted]
    if not rows:
        return None
    patch_loss, bare = (
        median(getattr(row, name) / row.loss_reverted for row in rows)
        for name in ("loss", "loss_undecorated")
    )
    return f"median over layers {patch_loss:.3f} of reverting to base; bare mask {bare:.3f}"
