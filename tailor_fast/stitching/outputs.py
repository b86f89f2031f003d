"""Everything of a stitched output that is not a weight: report, picture, card, manifest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tailor_fast._version import __version__
from tailor_fast.checkpoint import (
    CARD_NAME,
    MANIFEST_NAME,
    REPORT_NAME,
    StagedCheckpoint,
    build_manifest,
    input_record,
    model_card,
    model_name,
    read_license,
)
from tailor_fast.patching.checkpoints import PICTURE_NAME
from tailor_fast.patching.report import Report
from tailor_fast.patching.sources import BLOCK_BYTES
from tailor_fast.stitching.tasks import OpenTask

_VERSIONED = ("torch", "transformers", "safetensors", "numpy")


def add_records(
    staged: StagedCheckpoint, base: Path, tasks: Sequence[OpenTask], report: Report, picture: bytes
) -> None:
    """Add side files of the base, report, picture, card and manifest, in this order.

    Args:
        staged: the output, all weights written.
        base: where the base is, for ``verify`` to find it.
        tasks: the open tasks.
        report: of the run.
        picture: of the report.
    """
    source = tasks[0].sources.base.checkpoint
    for path in source.side_files:
        staged.copy_file(path)
    places = {task.name: task.file.checkpoint.path for task in tasks}
    body = {
        **report.to_dict(),
        "inputs": {name: str(path.absolute()) for name, path in {"base": base, **places}.items()},
        "tasks": {task.name: _facts(task) for task in tasks},
    }
    staged.add_file(REPORT_NAME, json.dumps(body, indent=2, sort_keys=True, allow_nan=False))
    staged.add_file(PICTURE_NAME, picture)
    card = model_card(
        title=staged.out.name,
        base_models=[model_name(path) for path in (base, *places.values())],
        recipe=report.recipe,
        kept={row.tensor: (row.kept, row.rows * row.cols) for row in report.linears},
        license=None if source.directory is None else read_license(source.directory),
    )
    staged.add_file(CARD_NAME, card)
    buffer = bytearray(BLOCK_BYTES)
    inputs = {"base": input_record(source, tasks[0].sources.base.finish(buffer))}
    for task in tasks:
        inputs[task.name] = input_record(task.file.checkpoint, task.file.finish(buffer))
    staged.add_file(
        MANIFEST_NAME,
        build_manifest(
            inputs=inputs,
            output=staged.record(),
            recipe=report.recipe,
            versions={"tailor_fast": __version__, **{name: version(name) for name in _VERSIONED}},
        ),
    )


def _facts(task: OpenTask) -> dict[str, Any]:
    header = task.statistics.header
    return {
        "weight": task.weight,
        "surrogate": task.is_surrogate,
        "samples": header.samples,
        "data_sha256": header.data_sha256,
    }
