"""``patch --save-patch``: what a run changed as a patch file, beside the output or alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tailor_fast._core.errors import UsageError
from tailor_fast._core.processes import ALONE, Processes
from tailor_fast._core.progress import Progress, Silent
from tailor_fast.calibration.options import RunOptions
from tailor_fast.checkpoint import (
    MismatchError,
    OutputExistsError,
    match_pair,
    open_checkpoint,
    open_tuned,
)
from tailor_fast.checkpoint.errors import shown_path
from tailor_fast.checkpoint.places import ELSEWHERE, OVERWRITE
from tailor_fast.models import names_as_stored
from tailor_fast.patchfile.diffing import check_name, write_patch
from tailor_fast.patchfile.writer import GrowingFile
from tailor_fast.patching.checkpoints import patch_checkpoint
from tailor_fast.patching.job import PathLike
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.report import Report

_SCRATCH = "model"


def patch_to_file(
    base: PathLike,
    tuned: PathLike,
    out: PathLike,
    recipe: Recipe | None = None,
    *,
    save_patch: PathLike,
    checkpoint: bool = True,
    calibration: PathLike | None = None,
    statistics: PathLike | None = None,
    retain: PathLike | None = None,
    target_old: float | None = None,
    options: RunOptions | None = None,
    progress: Progress | None = None,
    processes: Processes = ALONE,
) -> Report:
    """Patch ``base`` as ``patch_checkpoint`` does and write the patch file of the result.

    The patch is that of ``diff_checkpoints(base, out, save_patch)``, byte for byte. Its place is
    checked and locked before the run begins.

    Args:
        base: checkpoint before fine-tuning.
        tuned: the same after fine-tuning.
        out: directory to make; with ``checkpoint=False`` only its name is used, for the target.
        recipe: every choice of the method; None takes the defaults.
        save_patch: patch file to write.
        checkpoint: False makes the patched model in the patch's staging directory and removes it
            again, which takes its room on that disk for the time of the run. Nothing is left for a
            later run to go on from.
        calibration: as for ``patch_checkpoint``; so are the arguments below.
        statistics: likewise.
        retain: likewise.
        target_old: likewise.
        options: likewise; ``overwrite`` holds for both outputs.
        progress: likewise.
        processes: likewise; process 0 alone writes the patch.

    Returns:
        The report.

    Raises:
        InputError, UsageError, OutputError, StorageError: as for ``patch_checkpoint`` and
            ``diff_checkpoints``. When the patch cannot be written, ``out`` stays.
    """
    options, progress = options or RunOptions(), progress or Silent()
    how: dict[str, Any] = {
        "calibration": calibration,
        "statistics": statistics,
        "retain": retain,
        "target_old": target_old,
        "progress": progress,
        "processes": processes,
    }
    if processes.rank > 0:
        return patch_checkpoint(base, tuned, out, recipe, options=options, **how)
    check_name(save_patch)
    if not checkpoint and options.resume == "required":
        raise UsageError(
            "resume 'required' without a checkpoint: nothing is kept of a run that writes a patch"
            " alone; expected 'auto', 'never', or a checkpoint"
        )
    _check_same(base, tuned)
    # OUT is replaced whole, so that a patch inside it would be lost.
    apart = (base, tuned, out) if checkpoint else (base, tuned)
    with GrowingFile(save_patch, overwrite=options.overwrite, inputs=apart) as file:
        place = Path(out) if checkpoint else file.scratch / _SCRATCH
        if not checkpoint:  # the patch's staging goes, and the model in it
            options = replace(options, resume="never")
        try:
            report = patch_checkpoint(base, tuned, place, recipe, options=options, **how)
        except OutputExistsError as error:
            raise _exists(error, base, place, file.out, options) from error
        progress.note(f"writing the patch to {file.out}")
        with open_checkpoint(base) as ours, open_checkpoint(place) as theirs:
            write_patch(ours, theirs, file, (base, out), "xxh3-128", progress)
    return report


def _exists(
    error: OutputExistsError, base: PathLike, out: Path, patch: Path, options: RunOptions
) -> OutputExistsError:
    """The error about an OUT that is there, which a run that ended before its patch leaves too."""
    if options.overwrite or not out.is_dir():
        return error
    command = f"tailor-fast diff {shown_path(base)} {shown_path(out)} -o {shown_path(patch)}"
    remedy = f"if only its patch is missing, run `{command}`, which writes the same; or"
    remedy += f" {ELSEWHERE} {OVERWRITE}"
    return OutputExistsError("exists already", path=out, remedy=remedy)


def _check_same(base: PathLike, tuned: PathLike) -> None:
    """A patch file holds words, no new tensors and no new rows."""
    with open_checkpoint(base) as ours, open_tuned(tuned, ours, names_as_stored) as theirs:
        try:
            match_pair(ours, theirs)
        except MismatchError as error:
            raise UsageError(
                f"{error}; only the patched words of equal tensors go into a patch file; leave"
                " save_patch out"
            ) from error
