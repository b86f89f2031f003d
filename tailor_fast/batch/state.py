"""What became of each job, on disk after every one, so that a batch can go on where it ended."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal

from pydantic import TypeAdapter

from tailor_fast._core.errors import InputError, OutputError
from tailor_fast._version import __version__
from tailor_fast.batch.manifest import JobSpec
from tailor_fast.checkpoint import MANIFEST_NAME, local_path
from tailor_fast.checkpoint.files import input_error
from tailor_fast.patching.report import Report

STATE_NAME = "batch.json"
Status = Literal["waiting", "done", "failed"]


@dataclass(frozen=True)
class JobState:
    """One job's line.

    Attributes:
        name: of the job.
        out: its output.
        status: ``done`` also when an earlier run of the batch had done it.
        fingerprint: of everything that decides the output.
        manifest: SHA-256 of the output's manifest; empty until done.
        seconds: wall time.
        kept: weights that may differ from base.
        targeted: weights in the patched layers.
        loss: over the layers, relative to reverting them to base: 10th percentile, median and 90th;
            empty without statistics.
        loss_bare: median of the same with the bare mask; None without statistics.
        error: one sentence; empty unless failed.
        exit_code: that ``patch`` would have ended with.
        notes: what was decided in the run.
    """

    name: str
    out: str
    status: Status = "waiting"
    fingerprint: str = ""
    manifest: str = ""
    seconds: float = 0.0
    kept: int = 0
    targeted: int = 0
    loss: tuple[float, ...] = ()
    loss_bare: float | None = None
    error: str = ""
    exit_code: int = 0
    notes: tuple[str, ...] = ()


def fingerprint(job: JobSpec) -> str:
    """Hash of what decides a job's output: its settings, its files' sizes and times, the version.

    Raises:
        InputError: an input is not there.
    """
    given = (job.base, job.tuned, job.calibration, job.statistics, job.retain)
    seen = [_seen(path) for path in given if path is not None]
    settings = job.model_dump(mode="json", exclude={"name"})
    text = json.dumps([__version__, settings, seen], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _seen(path: Path) -> list[tuple[str, int, int]]:
    try:
        path = local_path(path)
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        found = [(file.name, file.stat()) for file in files]
    except OSError as error:
        raise input_error(error, path) from None
    return [(name, status.st_size, status.st_mtime_ns) for name, status in found]


def finished(job: JobSpec, report: Report, key: str, seconds: float) -> JobState:
    """The line of a job that is done."""
    rows = [row for row in report.linears if row.loss_reverted]
    shares = [(row.loss or 0.0) / (row.loss_reverted or 1.0) for row in rows]
    bare = [(row.loss_undecorated or 0.0) / (row.loss_reverted or 1.0) for row in rows]
    return JobState(
        job.label,
        str(job.out),
        "done",
        fingerprint=key,
        manifest=output_digest(job.out),
        seconds=round(seconds, 3),
        kept=report.kept,
        targeted=report.targeted,
        loss=_spread(shares),
        loss_bare=median(bare) if bare else None,
        notes=tuple(report.notes),
    )


def _spread(values: list[float]) -> tuple[float, ...]:
    if len(values) < 2:
        return tuple(values * 3)
    tenths = quantiles(values, n=10, method="inclusive")
    return tenths[0], tenths[4], tenths[8]


def output_digest(out: Path) -> str:
    """SHA-256 of an output's manifest, which holds the digests of the rest; empty without one."""
    try:
        return hashlib.sha256((out / MANIFEST_NAME).read_bytes()).hexdigest()
    except OSError:
        return ""


def read_states(folder: Path) -> dict[str, JobState]:
    """Lines of an earlier run by name; none when there was none.

    Raises:
        InputError: the file is there and is no such table.
    """
    path = folder / STATE_NAME
    try:
        rows = json.loads(path.read_bytes())["jobs"]
        states = [_state(row) for row in rows]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: is not the table of a batch ({error}); remove it to start anew"
        ) from None
    return {state.name: state for state in states}


def _state(row: dict[str, Any]) -> JobState:
    if set(row) != {field.name for field in fields(JobState)}:
        raise ValueError(f"its keys are {', '.join(sorted(row))}")
    return TypeAdapter(JobState).validate_python(row)


def write_states(folder: Path, states: Iterable[JobState]) -> None:
    """Replace the table in one step."""
    body = {"tailor_fast": __version__, "jobs": [asdict(state) for state in states]}
    write_text(folder / STATE_NAME, json.dumps(body, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step.

    Raises:
        OutputError: it cannot be written.
    """
    beside = path.with_name(f".{path.name}.new")
    try:
        with beside.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error


def ordered(states: dict[str, JobState], jobs: Sequence[JobSpec]) -> list[JobState]:
    """A line for each job, in the manifest's order."""
    return [states.get(job.label) or JobState(job.label, str(job.out)) for job in jobs]
