"""The walk over the jobs. One that fails is written down, and the next one starts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from tailor_fast._core.errors import OutputError, TailorError
from tailor_fast._core.progress import Progress, Silent
from tailor_fast.batch.cluster import Cluster, check_devices
from tailor_fast.batch.manifest import JobSpec
from tailor_fast.batch.page import PAGE_NAME, TABLE_NAME, make_page, make_table
from tailor_fast.batch.state import (
    JobState,
    fingerprint,
    finished,
    ordered,
    output_digest,
    read_states,
    write_states,
    write_text,
)
from tailor_fast.checkpoint import Held, open_checkpoint
from tailor_fast.patching.base_in_memory import kept, room_for_base, too_large
from tailor_fast.patching.checkpoints import patch_checkpoint, plan_patch
from tailor_fast.patching.plan import PatchPlan

_log = logging.getLogger("tailor_fast")
_UNEXPECTED = 1

Shown = Callable[[], AbstractContextManager[Progress]]


def _silent() -> AbstractContextManager[Progress]:
    return nullcontext(Silent())


def run_batch(
    jobs: Sequence[JobSpec],
    folder: Path,
    *,
    overwrite: bool = False,
    shown: Shown = _silent,
    cluster: Cluster | None = None,
) -> list[JobState]:
    """Patch all jobs, in order, and write a table, a page and the state into ``folder``.

    A job that an earlier run has done is not done again, as long as its settings, the sizes and
    times of its files, and its output are what they were.

    Jobs that follow each other and have one base read it from disk once, where it fits into memory
    beside them (``room_for_base``); on a cluster each job reads its own.

    Args:
        jobs: from ``read_manifest``.
        folder: of the tables; made if need be.
        overwrite: replace outputs that exist, of jobs that are not done.
        shown: makes the progress of one job; of all, on a cluster.
        cluster: runs the jobs side by side on its workers; None runs them here, one by one.

    Returns:
        A line for each job.

    Raises:
        InputError: ``folder`` holds something else under a table's name.
        OutputError: ``folder`` cannot be written.
        UsageError: a job for a cluster names a card by number.
    """
    if cluster is not None:
        check_devices(jobs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made: {error.strerror}") from error
    states = read_states(folder)
    states = {job.label: states[job.label] for job in jobs if job.label in states}
    ran = _here(jobs, states, overwrite, shown)
    if cluster is not None:
        ran = _there(jobs, states, overwrite, shown, cluster)
    with closing(ran):
        for state in ran:
            states[state.name] = state
            _write(folder, ordered(states, jobs))
    _write(folder, ordered(states, jobs))
    return ordered(states, jobs)


def _here(
    jobs: Sequence[JobSpec], states: Mapping[str, JobState], overwrite: bool, shown: Shown
) -> Generator[JobState]:
    for number, (job, held) in enumerate(_with_bases(jobs), 1):
        with shown() as progress:
            place = f"job {number} of {len(jobs)}, {job.label}"
            if _stands(job, states.get(job.label)):
                progress.note(f"{place}: done before")
                continue
            progress.note(place)
            state = _run(job, overwrite, progress, held)
            if state.error:
                progress.note(f"{place}: {state.error}")
        yield state


def _with_bases(jobs: Sequence[JobSpec]) -> Iterator[tuple[JobSpec, Held | None]]:
    for _, group in groupby(jobs, key=lambda job: job.base):
        same = list(group)
        held = Held() if len(same) > 1 else None
        for job in same:
            yield job, held


def _there(
    jobs: Sequence[JobSpec],
    states: Mapping[str, JobState],
    overwrite: bool,
    shown: Shown,
    cluster: Cluster,
) -> Generator[JobState]:
    with shown() as progress:
        todo = [job for job in jobs if not _stands(job, states.get(job.label))]
        progress.note(f"{len(todo)} jobs, {len(jobs) - len(todo)} done before")
        results = cluster.results(todo, _run_silently, overwrite=overwrite)
        with closing(results):
            for number, (job, state) in enumerate(results, 1):
                told = state.error or f"done in {state.seconds:.1f} s"
                progress.note(f"{number} of {len(todo)}, {job.label}: {told}")
                yield state


def _run_silently(job: JobSpec, overwrite: bool) -> JobState:
    """On a worker."""
    return _run(job, overwrite, Silent())


def plan_batch(
    jobs: Sequence[JobSpec], *, overwrite: bool = False, cluster: bool = False
) -> Iterator[tuple[JobSpec, PatchPlan | TailorError]]:
    """Yield each job with what it would do, or with what it would fail of; no weight is read.

    Args:
        jobs: from ``read_manifest``.
        overwrite: as for ``run_batch``.
        cluster: whether a cluster would run them.
    """
    for _, group in groupby(jobs, key=lambda job: job.base):
        same = list(group)
        for job in same:
            try:
                plan = _plan(job, overwrite)
                yield job, plan if cluster else _with_base(job, plan, len(same))
            except TailorError as error:
                yield job, error


def _plan(job: JobSpec, overwrite: bool) -> PatchPlan:
    return plan_patch(
        job.base,
        job.tuned,
        job.out,
        job.recipe,
        calibration=job.calibration,
        statistics=job.statistics,
        retain=job.retain,
        options=job.options(overwrite=overwrite),
    )


def _with_base(job: JobSpec, plan: PatchPlan, jobs: int) -> PatchPlan:
    """The plan with the memory of a base that several jobs share, or the note that none is kept."""
    if jobs == 1:
        return plan
    with open_checkpoint(job.base) as base:
        size = base.total_bytes
    room = room_for_base(plan, job.options(overwrite=False))
    if size > room:
        return replace(plan, notes=(*plan.notes, too_large(size, room)))
    notes = (*plan.notes, kept(size, jobs))
    return replace(plan, ram_weights=plan.ram_weights + size, notes=notes)


def _stands(job: JobSpec, state: JobState | None) -> bool:
    """Whether a job was done and nothing has changed since."""
    if state is None or state.status != "done" or not state.manifest:
        return False
    try:
        return state.fingerprint == fingerprint(job) and state.manifest == output_digest(job.out)
    except TailorError:
        return False  # the run itself will say what is missing


def _run(job: JobSpec, overwrite: bool, progress: Progress, held: Held | None = None) -> JobState:
    start = time.perf_counter()
    try:
        key = fingerprint(job)
        report = patch_checkpoint(
            job.base,
            job.tuned,
            job.out,
            job.recipe,
            calibration=job.calibration,
            statistics=job.statistics,
            retain=job.retain,
            options=job.options(overwrite=overwrite),
            progress=progress,
            held=held,
        )
        return finished(job, report, key, time.perf_counter() - start)
    except KeyboardInterrupt:  # also what says that it can be resumed
        raise
    except Exception as error:  # noqa: BLE001  the boundary of a job: the others go on
        _log.debug("job %s", job.label, exc_info=True)
        known = isinstance(error, TailorError)
        text = str(error) if known else f"unexpected {type(error).__name__}: {error}"
        return JobState(
            job.label,
            str(job.out),
            "failed",
            seconds=round(time.perf_counter() - start, 3),
            error=" ".join(text.split()),
            exit_code=error.exit_code if isinstance(error, TailorError) else _UNEXPECTED,
        )


def _write(folder: Path, states: Sequence[JobState]) -> None:
    write_states(folder, states)
    write_text(folder / TABLE_NAME, make_table(states))
    write_text(folder / PAGE_NAME, make_page(states))
