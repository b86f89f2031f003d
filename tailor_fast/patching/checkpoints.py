"""``patch_checkpoint``: two checkpoints on disk in, one out, shard by shard in bounded memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from tailor_fast._core.errors import StoppedError
from tailor_fast._core.processes import ALONE, Processes
from tailor_fast._core.progress import Progress
from tailor_fast.calibration.data import read_data
from tailor_fast.calibration.options import RunOptions
from tailor_fast.calibration.statfile import is_statistics
from tailor_fast.calibration.streamed import skeleton_of
from tailor_fast.checkpoint import Held, StagedCheckpoint, input_record, local_path
from tailor_fast.checkpoint.errors import shown_path
from tailor_fast.patching.job import Job, PathLike, Request
from tailor_fast.patching.picture import draw_report
from tailor_fast.patching.pipeline import Worker, Writer
from tailor_fast.patching.plan import PatchPlan
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.records import add_records
from tailor_fast.patching.report import Report
from tailor_fast.patching.resuming import Ledger
from tailor_fast.patching.sources import BLOCK_BYTES, Sources
from tailor_fast.patching.targeting import plan_target, search_target


def patch_checkpoint(
    base: PathLike,
    tuned: PathLike,
    out: PathLike,
    recipe: Recipe | None = None,
    *,
    calibration: PathLike | None = None,
    statistics: PathLike | None = None,
    retain: PathLike | None = None,
    target_old: float | None = None,
    options: RunOptions | None = None,
    progress: Progress | None = None,
    processes: Processes = ALONE,
    held: Held | None = None,
) -> Report:
    """Patch ``base`` with the best part of ``tuned`` and write the model to ``out``.

    One block of each model is in memory at a time. ``out`` is absent, or its old self, until it is
    complete. A run that was killed, stopped or out of room goes on where it was, in the next one
    with the same arguments (``options.resume``); the bytes are those of a run without a break.

    Args:
        base: checkpoint before fine-tuning: a model directory, one ``.safetensors`` file, or the
            hub name of a model in the local cache.
        tuned: the same after fine-tuning.
        out: directory to make.
        recipe: every choice of the method; None takes the defaults.
        calibration: samples of the new task, JSON lines (``tailor_fast.models.inputs``). None
            selects by salience alone and decorates nothing.
        statistics: what ``calibrate`` wrote for ``tuned`` on the new task, instead of samples.
        retain: samples of old tasks, or what ``calibrate`` wrote for ``base`` on them.
        target_old: share of the base model's score on old tasks that is to be kept, such as 0.99:
            density and retention weight, where ``recipe`` leaves them open, are those that keep
            most of the new task within it, as measured on samples of both that are held back; the
            report says what was found. Without it, ``recipe`` is run as it is.
        options: device, memory and the like.
        progress: told about each step.
        processes: what ``join_processes`` yields, to do it together with others: all give the same
            arguments (``options.device`` may differ), process 0 writes.
        held: keeps what is read of ``base`` for the next call, where there is memory for it.

    Returns:
        The report that is also written to ``out``.

    Raises:
        InputError: a file is missing, malformed, or does not fit the others; or no recipe keeps
            ``target_old``.
        UsageError: the recipe and the data at hand contradict each other.
        OutputError: ``out`` exists, is locked, or may not be written.
        PeerError: another process failed.
        StorageError: reading or writing failed half way.
        StoppedError: stopped by Ctrl-C when something was finished, which is kept.
    """
    start = time.perf_counter()
    request = _request(base, tuned, out, recipe, calibration, statistics, retain, options)
    found = None
    if target_old is not None:
        request, found = search_target(target_old, request, processes, progress, patch_checkpoint)
    job = Job(request, progress, held)
    if found is not None:
        job.report.target_old = found
        job.report.notes.append(str(found))
        job.report.seconds["search"] = time.perf_counter() - start
    job.join(processes)
    with job.opened() as (sources, layout):
        if processes.rank > 0:
            job.follow(sources, layout)
            processes.wait()  # for the output to be complete
            return job.report
        inputs = (*sources.base.checkpoint.input_paths, *sources.tuned.checkpoint.input_paths)
        staged = StagedCheckpoint(
            out,
            layout,
            overwrite=job.request.options.overwrite,
            inputs=inputs,
            resume=job.resume(sources, layout),
        )
        with _told_of_what_is_kept(staged), staged:
            ledger = Ledger(sources, staged)
            with Writer(staged, ledger.facts) as writer, Worker("picture") as artist:
                job.run(sources, staged, writer, ledger)
                drawn = artist.submit(partial(draw_report, job.report.to_dict()))
                with job.report.timed("write"):
                    job.write_rest(sources, staged, writer, ledger)
                    writer.drain()
                picture = drawn.result()
            job.report.seconds["total"] = time.perf_counter() - start
            _describe(sources, staged, job, picture)
            for source in (sources.base, sources.tuned):
                source.checkpoint.check_unchanged()
            staged.commit()
    processes.wait()
    job.progress.finish()
    return job.report


@contextmanager
def _told_of_what_is_kept(staged: StagedCheckpoint) -> Iterator[None]:
    """Say, when a run ends early, from where another can go on."""
    try:
        yield
    except BaseException as error:
        if not staged.kept:
            raise
        count = f"{len(staged.finished)} of {len(staged.layout.tensors)} tensors"
        again = "run the same again to go on from there, with resume 'never' to start over"
        sentence = f"{count} of {shown_path(staged.out)} are finished and kept; {again}"
        if isinstance(error, KeyboardInterrupt):
            raise StoppedError(f"stopped; {sentence}") from error
        error.add_note(sentence)
        raise


def plan_patch(
    base: PathLike,
    tuned: PathLike,
    out: PathLike,
    recipe: Recipe | None = None,
    *,
    calibration: PathLike | None = None,
    statistics: PathLike | None = None,
    retain: PathLike | None = None,
    target_old: float | None = None,
    options: RunOptions | None = None,
    progress: Progress | None = None,
) -> PatchPlan:
    """Say what ``patch_checkpoint`` would do with the same arguments; no weight is read.

    Raises:
        TailorError: what the run would refuse, as far as headers and data show it.
    """
    request = _request(base, tuned, out, recipe, calibration, statistics, retain, options)
    notes: tuple[str, ...] = ()
    if target_old is not None:
        request, sentence = plan_target(target_old, request, ALONE)
        notes = (sentence,)
    job = Job(request, progress)
    with job.opened() as (sources, layout):
        inputs = (*sources.base.checkpoint.input_paths, *sources.tuned.checkpoint.input_paths)
        overwrite = job.request.options.overwrite
        StagedCheckpoint.check(out, layout, overwrite=overwrite, inputs=inputs)
        plan = job.plan(sources, layout)
        _check_data(sources, job.request)
        return replace(plan, notes=(*plan.notes, *notes))


def _check_data(sources: Sources, request: Request) -> None:
    """Read all samples as the run would, for what is wrong with them."""
    if request.calibration is None:
        return
    model = skeleton_of(sources.tuned)
    processor = sources.tuned.checkpoint.processor_directory or request.tuned
    paths = [request.calibration]
    if request.retain is not None and not is_statistics(request.retain):
        paths.append(request.retain)
    for path in paths:
        read_data(path, processor, model, request.options, torch.device("cpu"))


def _request(
    base: PathLike,
    tuned: PathLike,
    out: PathLike,
    recipe: Recipe | None,
    calibration: PathLike | None,
    statistics: PathLike | None,
    retain: PathLike | None,
    options: RunOptions | None,
) -> Request:
    new, sums, old = (None if p is None else Path(p) for p in (calibration, statistics, retain))
    recipe, options = recipe or Recipe(), options or RunOptions()
    return Request(local_path(base), local_path(tuned), Path(out), recipe, new, sums, old, options)


def _describe(sources: Sources, staged: StagedCheckpoint, job: Job, picture: bytes) -> None:
    buffer = bytearray(BLOCK_BYTES)
    ours, theirs = sources.base, sources.tuned
    add_records(
        staged,
        job.report,
        picture,
        recipe=job.recipe.model_dump(),
        places={"base": job.request.base, "tuned": job.request.tuned},
        inputs={
            "base": input_record(ours.checkpoint, ours.finish(buffer)),
            "tuned": input_record(theirs.checkpoint, theirs.finish(buffer)),
        },
        side_files=sources.side_files,
        licensed=theirs.checkpoint,
    )
