"""What an output directory says about itself: its manifest and its report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailor_fast._core.errors import InputError
from tailor_fast.checkpoint import MANIFEST_FORMAT, MANIFEST_NAME, REPORT_NAME


@dataclass(frozen=True)
class Output:
    """The records of an output directory.

    Attributes:
        path: the directory.
        manifest: ``tailor_manifest.json``.
        report: ``tailor_report.json``.
    """

    path: Path
    manifest: Mapping[str, Any]
    report: Mapping[str, Any]

    @property
    def patched(self) -> dict[str, Mapping[str, Any]]:
        """Rows of the report by tensor name."""
        return {row["tensor"]: row for row in self.report["linears"]}

    def input_path(self, role: str) -> Path | None:
        """Where the input ``base`` or ``tuned`` was when the output was made."""
        path = self.report.get("inputs", {}).get(role)
        return None if path is None else Path(path)


def is_output(path: Path) -> bool:
    """Whether ``path`` is a directory that this project wrote."""
    return (path / MANIFEST_NAME).is_file()


def read_output(path: Path) -> Output:
    """Read the records of an output directory.

    Raises:
        InputError: there are none, or they are not what this version writes.
    """
    if not is_output(path):
        raise InputError(
            f"{path}: holds no {MANIFEST_NAME}; expected a directory that `tailor-fast patch` made"
        )
    manifest = _read(path / MANIFEST_NAME, ("format", "inputs", "output", "recipe"))
    if manifest["format"] != MANIFEST_FORMAT:
        raise InputError(
            f"{path / MANIFEST_NAME}: format is {manifest['format']!r}; expected"
            f" {MANIFEST_FORMAT!r}; use the version that wrote it"
        )
    return Output(path, manifest, _read(path / REPORT_NAME, ("linears", "recipe", "density")))


def _read(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        body = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON: {error}") from None
    missing = [key for key in keys if not isinstance(body, dict) or key not in body]
    if missing:
        raise InputError(f"{path}: has no {missing[0]!r}; expected a file that this project wrote")
    found: dict[str, Any] = body
    return found
