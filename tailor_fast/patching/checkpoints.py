"""``patch_checkpoint``: two checkpoints on disk in, one out, shard by shard in bounded memory."""

from __future__ import annotations

import json
import time
from importlib.metadata import version
from pathlib import Path

from tailor_fast._core.progress import Progress
from tailor_fast._version import __version__
from tailor_fast.calibration.options import RunOptions
from tailor_fast.checkpoint import (
    CARD_NAME,
    MANIFEST_NAME,
    REPORT_NAME,
    StagedCheckpoint,
    build_manifest,
    input_record,
    local_path,
    model_card,
    model_name,
    read_license,
)
from tailor_fast.patching.job import Job, PathLike, Request
from tailor_fast.patching.picture import draw_report
from tailor_fast.patching.pipeline import Writer
from tailor_fast.patching.plan import PatchPlan
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.report import Report
from tailor_fast.patching.sources import BLOCK_BYTES, Sources

PICTURE_NAME = "tailor_report.png"
_VERSIONED = ("torch", "transformers", "safetensors", "numpy")


def patch_checkpoint(
    base: PathLike,
    tuned: PathLike,
    out: PathLike,
    recipe: Recipe | None = None,
    *,
    calibration: PathLike | None = None,
    statistics: PathLike | None = None,
    retain: PathLike | None = None,
    options: RunOptions | None = None,
    progress: Progress | None = None,
) -> Report:
    """Patch ``base`` with the best part of ``tuned`` and write the model to ``out``.

    One block of each model is in memory at a time. ``out`` is absent, or its old self, until it is
    complete.

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
        options: device, memory and the like.
        progress: told about each step.

    Returns:
        The report that is also written to ``out``.

    Raises:
        InputError: a file is missing, malformed, or does not fit the others.
        UsageError: the recipe and the data at hand contradict each other.
        OutputError: ``out`` exists, is locked, or may not be written.
        StorageError: reading or writing failed half way.
    """
    job = _job(base, tuned, out, recipe, calibration, statistics, retain, options, progress)
    start = time.perf_counter()
    with job.opened() as (sources, layout):
        inputs = (*sources.base.checkpoint.input_paths, *sources.tuned.checkpoint.input_paths)
        with StagedCheckpoint(
            out, layout, overwrite=job.request.options.overwrite, inputs=inputs
        ) as staged:
            with Writer(staged) as writer:
                job.run(sources, staged, writer)
                picture = draw_report(job.report.to_dict())  # while the last bytes reach the disk
                with job.report.timed("write"):
                    writer.drain()
            job.report.seconds["total"] = time.perf_counter() - start
            _finish(sources, staged, job, picture)
            staged.commit()
    job.progress.finish()
    return job.report


def plan_patch(
    base: PathLike,
    tuned: PathLike,
    out: PathLike,
    recipe: Recipe | None = None,
    *,
    calibration: PathLike | None = None,
    statistics: PathLike | None = None,
    retain: PathLike | None = None,
    options: RunOptions | None = None,
    progress: Progress | None = None,
) -> PatchPlan:
    """Say what ``patch_checkpoint`` would do with the same arguments; no weight is read.

    Raises:
        TailorError: what the run would refuse, as far as headers and data show it.
    """
    job = _job(base, tuned, out, recipe, calibration, statistics, retain, options, progress)
    with job.opened() as (sources, layout):
        inputs = (*sources.base.checkpoint.input_paths, *sources.tuned.checkpoint.input_paths)
        overwrite = job.request.options.overwrite
        StagedCheckpoint.check(out, layout, overwrite=overwrite, inputs=inputs)
        return job.plan(sources, layout)


def _job(
    base: PathLike,
    tuned: PathLike,
    out: PathLike,
    recipe: Recipe | None,
    calibration: PathLike | None,
    statistics: PathLike | None,
    retain: PathLike | None,
    options: RunOptions | None,
    progress: Progress | None,
) -> Job:
    new, sums, old = (None if p is None else Path(p) for p in (calibration, statistics, retain))
    recipe, options = recipe or Recipe(), options or RunOptions()
    ours, theirs = local_path(base), local_path(tuned)
    request = Request(ours, theirs, Path(out), recipe, new, sums, old, options)
    return Job(request, progress)


def _finish(
    sources: Sources,
    staged: StagedCheckpoint,
    job: Job,
    picture: bytes,
) -> None:
    """Add everything that is not a weight: side files, report, picture, card, manifest."""
    tuned = sources.tuned.checkpoint
    for path in tuned.side_files:
        staged.copy_file(path)
    names = (job.request.base, job.request.tuned)
    # `verify` looks for the base there.
    places = {
        role: str(name.absolute()) for role, name in zip(("base", "tuned"), names, strict=True)
    }
    report = {**job.report.to_dict(), "inputs": places}
    staged.add_file(REPORT_NAME, json.dumps(report, indent=2, sort_keys=True, allow_nan=False))
    staged.add_file(PICTURE_NAME, picture)
    kept = {row.tensor: (row.kept, row.rows * row.cols) for row in job.report.linears}
    card = model_card(
        title=staged.out.name,
        base_models=[model_name(name) for name in names],
        recipe=job.recipe.model_dump(),
        kept=kept,
        license=None if tuned.directory is None else read_license(tuned.directory),
    )
    staged.add_file(CARD_NAME, card)
    buffer = bytearray(BLOCK_BYTES)
    inputs = {
        "base": input_record(sources.base.checkpoint, sources.base.finish(buffer)),
        "tuned": input_record(tuned, sources.tuned.finish(buffer)),
    }
    versions = {"tailor_fast": __version__, **{name: version(name) for name in _VERSIONED}}
    recipe = job.recipe.model_dump()
    manifest = build_manifest(
        inputs=inputs, output=staged.record(), recipe=recipe, versions=versions
    )
    staged.add_file(MANIFEST_NAME, manifest)
