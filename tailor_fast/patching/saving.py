"""``patch --save-patch``: what a run changed as a patch file, beside the output or alone."""

from __future__ import annotations

from pathlib import Path

from tailor_fast._core.progress import Progress, Silent
from tailor_fast.calibration.options import RunOptions
from tailor_fast.checkpoint import open_checkpoint
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
    options: RunOptions | None = None,
    progress: Progress | None = None,
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
            again, which takes its room on that disk for the time of the run.
        calibration: as for ``patch_checkpoint``; so are the arguments below.
        statistics: likewise.
        retain: likewise.
        options: likewise; ``overwrite`` holds for both outputs.
        progress: likewise.

    Returns:
        The report.

    Raises:
        InputError, UsageError, OutputError, StorageError: as for ``patch_checkpoint`` and
            ``diff_checkpoints``. When the patch cannot be written, ``out`` stays.
    """
    options, progress = options or RunOptions(), progress or Silent()
    check_name(save_patch)
    # OUT is replaced whole, so that a patch inside it would be lost.
    apart = (base, tuned, out) if checkpoint else (base, tuned)
    with GrowingFile(save_patch, overwrite=options.overwrite, inputs=apart) as file:
        place = Path(out) if checkpoint else file.scratch / _SCRATCH
        report = patch_checkpoint(
            base,
            tuned,
            place,
            recipe,
            calibration=calibration,
            statistics=statistics,
            retain=retain,
            options=options,
            progress=progress,
        )
        progress.note(f"writing the patch to {file.out}")
        with open_checkpoint(base) as ours, open_checkpoint(place) as theirs:
            write_patch(ours, theirs, file, (base, out), "xxh3-128", progress)
    return report
