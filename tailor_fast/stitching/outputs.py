"""What a stitched output says of its inputs: the base, and each task's model and statistics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tailor_fast.checkpoint import StagedCheckpoint, input_record
from tailor_fast.patching.records import add_records
from tailor_fast.patching.report import Report
from tailor_fast.patching.sources import BLOCK_BYTES
from tailor_fast.stitching.tasks import OpenTask


def describe(
    staged: StagedCheckpoint, base: Path, tasks: Sequence[OpenTask], report: Report, picture: bytes
) -> None:
    """Add side files of the base, report, picture, card and manifest.

    Args:
        staged: the output, all weights written.
        base: where the base is, for ``verify`` to find it.
        tasks: the open tasks.
        report: of the run.
        picture: of the report.
    """
    source, buffer = tasks[0].sources.base, bytearray(BLOCK_BYTES)
    records = {"base": input_record(source.checkpoint, source.finish(buffer))}
    for task in tasks:
        records[task.name] = input_record(task.file.checkpoint, task.file.finish(buffer))
    add_records(
        staged,
        report,
        picture,
        recipe=report.recipe,
        places={"base": base, **{task.name: task.file.checkpoint.path for task in tasks}},
        inputs=records,
        side_files=source.checkpoint.side_files,
        licensed=source.checkpoint,
        extra={"tasks": {task.name: _facts(task) for task in tasks}},
    )


def _facts(task: OpenTask) -> dict[str, Any]:
    header = task.statistics.header
    return {
        "weight": task.weight,
        "surrogate": task.is_surrogate,
        "samples": header.samples,
        "data_sha256": header.data_sha256,
    }
