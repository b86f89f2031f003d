"""``tailor-fast batch``: many models in one run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tailor_fast.cli.options import Quietable

if TYPE_CHECKING:
    from tailor_fast.batch import JobSpec, JobState
    from tailor_fast.batch.cluster import Cluster

FAILED = 1


@dataclass(frozen=True, kw_only=True)
class BatchCommandOptions(Quietable):
    """The manifest, and where the tables go."""

    manifest: Annotated[
        Path, typer.Argument(metavar="MANIFEST.yaml", help="Jobs, and defaults for all of them.")
    ]
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of batch.html, batch.csv and batch.json.",
            show_default="MANIFEST-report",
        ),
    ] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace outputs that exist.")] = (
        False
    )
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Run the jobs side by side on a Ray cluster: HOST:PORT, auto, or local.",
        ),
    ] = None
    ray_cpus: Annotated[
        int, typer.Option(min=1, metavar="N", help="Cores that --ray gives a job.")
    ] = 1
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be done, from headers.")
    ] = False


def batch(options: BatchCommandOptions) -> int:
    """Patch all models of a manifest; what was done before and still stands is not done again.

    A job that fails does not stop the others. Exit code 1 when any failed.
    """
    from tailor_fast.batch import read_manifest, run_batch
    from tailor_fast.cli.progress import shown

    jobs = read_manifest(options.manifest)
    if options.dry_run:
        return _show_plans(jobs, options)
    folder = options.report or options.manifest.with_name(f"{options.manifest.stem}-report")
    with _cluster(options) as cluster:
        states = run_batch(
            jobs,
            folder,
            overwrite=options.overwrite,
            shown=lambda: shown(options.quiet),
            cluster=cluster,
        )
    if not options.quiet:
        _show(states, folder)
    return FAILED if any(state.status == "failed" for state in states) else 0


def _cluster(options: BatchCommandOptions) -> AbstractContextManager[Cluster | None]:
    if options.ray is None:
        return nullcontext()
    from tailor_fast.batch.cluster import Cluster

    return Cluster(options.ray, cpus=options.ray_cpus)


def _show_plans(jobs: Sequence[JobSpec], options: BatchCommandOptions) -> int:
    from tailor_fast._core.errors import TailorError
    from tailor_fast.batch import plan_batch
    from tailor_fast.cli.tables import share, show, shown_size, table

    rows: list[tuple[object, ...]] = []
    problems, disk, notes = [], 0, Counter[str]()
    plans = plan_batch(jobs, overwrite=options.overwrite, cluster=options.ray is not None)
    for job, found in plans:
        if isinstance(found, TailorError):
            rows.append((job.label, "fails", "-", "-", "-", "-"))
            problems.append(f"{job.label}: {found}")
            continue
        disk += found.disk
        notes.update(found.notes)
        kept = share(found.kept, found.weights)
        sizes = (shown_size(found.ram), shown_size(found.disk))
        rows.append((job.label, "ready", len(found.layers), kept, *sizes))
    show(table(("model", "state", "layers", "kept", "memory", "disk"), rows))
    show(f"\n{len(jobs) - len(problems)} of {len(jobs)} ready, {shown_size(disk)} of disk")
    for note, count in notes.items():
        show(f"{count} job{'s' if count > 1 else ''}: {note}")
    for problem in problems:
        show(problem)
    return FAILED if problems else 0


def _show(states: Sequence[JobState], folder: Path) -> None:
    from tailor_fast.batch.page import PAGE_NAME
    from tailor_fast.cli.tables import share, show, table

    rows = [
        (
            state.name,
            state.status,
            share(state.kept, state.targeted),
            f"{state.loss[1]:.3f}" if state.loss else "-",
            f"{state.seconds:.1f}",
            state.error,
        )
        for state in states
    ]
    show(table(("model", "status", "kept", "loss", "seconds", "error"), rows))
    show(f"\nreport  {folder / PAGE_NAME}")
