"""Everything of an output that is not a weight: side files, report, picture, card, manifest."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tailor_fast._version import __version__
from tailor_fast.checkpoint import (
    CARD_NAME,
    MANIFEST_NAME,
    REPORT_NAME,
    CheckpointRecord,
    StagedCheckpoint,
    TensorSource,
    build_manifest,
    model_card,
    model_name,
    read_license,
)
from tailor_fast.patching.report import Report

PICTURE_NAME = "tailor_report.png"
_OURS = frozenset((CARD_NAME, MANIFEST_NAME, REPORT_NAME, PICTURE_NAME))
_VERSIONED = ("torch", "transformers", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Versions of the software that takes part in a run."""
    return {"tailor_fast": __version__, **{name: version(name) for name in _VERSIONED}}


def add_records(
    staged: StagedCheckpoint,
    report: Report,
    picture: bytes,
    *,
    recipe: Mapping[str, Any],
    places: Mapping[str, Path],
    inputs: Mapping[str, CheckpointRecord],
    side_files: Iterable[Path],
    licensed: TensorSource,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Add to an output all that is not a weight; the manifest, which covers the rest, comes last.

    Report and picture hold seconds and are left out of the manifest, so that two runs of the same
    inputs have the same.

    Args:
        staged: the output, all weights written.
        report: of the run.
        picture: of the report, a PNG file.
        recipe: as it was run; ``report`` holds what was asked for.
        places: where each input was, by role; ``verify`` looks for the base there.
        inputs: what each input consisted of, by role.
        side_files: configuration, tokenizer and the like; those named as files of ours are not
            copied.
        licensed: the input whose licence the card carries on.
        extra: further entries of the report file.

    Raises:
        OutputError, StorageError: a file cannot be copied or written.
    """
    for path in side_files:
        if path.name not in _OURS:
            staged.copy_file(path)
    body = {
        **report.to_dict(),
        "inputs": {role: str(path.absolute()) for role, path in places.items()},
        **(extra or {}),
    }
    text = json.dumps(body, indent=2, sort_keys=True, allow_nan=False)
    staged.add_file(REPORT_NAME, text + "\n", recorded=False)
    staged.add_file(PICTURE_NAME, picture, recorded=False)
    card = model_card(
        title=staged.out.name,
        base_models=[model_name(path) for path in places.values()],
        recipe=recipe,
        kept={row.tensor: (row.kept, row.rows * row.cols) for row in report.linears},
        license=None if licensed.directory is None else read_license(licensed.directory),
    )
    staged.add_file(CARD_NAME, card)
    manifest = build_manifest(
        inputs=inputs, output=staged.record(), recipe=recipe, versions=versions()
    )
    staged.add_file(MANIFEST_NAME, manifest)
