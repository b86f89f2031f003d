"""Tables that grow while a part runs: each row is on disk before the next case begins."""

import csv
import math
import platform
import re
import subprocess
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from benchmarks.results import machine


@dataclass(frozen=True)
class Row:
    """One line of a table; a field that says nothing is NaN, 0 or empty.

    Attributes:
        work: what is computed, or checked.
        shape: sizes.
        dtype: of the inputs.
        provider: who computes it.
        seconds: median time of one call.
        bytes: what must be moved, for the floor.
        flops: what must be computed, for the floor.
        floor_seconds: least time by the ceilings measured in this run.
        share: ``floor_seconds / seconds``.
        ratio: how many times as fast as the baseline of the same rows.
        bar: what is asked for.
        met: ``yes`` or ``no`` where there is a bar.
        peak_bytes: most device memory that was allocated.
        note: a short sentence.
        error: why there is no figure.
    """

    work: str
    shape: str = ""
    dtype: str = ""
    provider: str = ""
    seconds: float = math.nan
    bytes: int = 0
    flops: int = 0
    floor_seconds: float = math.nan
    share: float = math.nan
    ratio: float = math.nan
    bar: str = ""
    met: str = ""
    peak_bytes: int = 0
    note: str = ""
    error: str = ""


COLUMNS = tuple(field.name for field in fields(Row))


class Table:
    """A CSV of ``Row``s under the facts of the run.

    Args:
        path: file to write, replacing what is there.
        dry: mark every row as a dry run's.
        device: where the part runs.

    Attributes:
        errors: rows with an error so far.
        missed: rows whose bar was not met.
    """

    def __init__(self, path: Path, *, dry: bool, device: torch.device) -> None:
        self.path = path
        self.errors = 0
        self.missed = 0
        self._facts = {"run": "dry" if dry else "measured"} | facts(device)
        self._query = device.type == "cuda"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)
        self._writer.writerow([*self._facts, "sm_clock", "memory_clock", *COLUMNS])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, row: Row) -> None:
        """Write a row through to the file, and print it."""
        values = [_text(getattr(row, name)) for name in COLUMNS]
        timed = self._query and not math.isnan(row.seconds)
        clocks = _query("clocks.sm,clocks.mem") if timed else ["", ""]
        if timed and not any(clocks):
            self._query = False  # no such tool, or one that hangs: it is not asked again
        self._writer.writerow([*self._facts.values(), *clocks, *values])
        self._file.flush()
        self.errors += bool(row.error)
        self.missed += row.met == "no"
        print(_line(row), flush=True)


def _text(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.5g}"
    return "" if value == 0 else str(value)


def _line(row: Row) -> str:
    parts = [f"{row.work:<18} {row.shape:<34} {row.dtype:<9} {row.provider:<14}"]
    if row.error:
        return f"{parts[0]} FAILED: {row.error}"
    if not math.isnan(row.seconds):
        parts.append(f"{row.seconds:10.6f} s")
    if not math.isnan(row.share):
        parts.append(f"{row.share:7.1%} of floor")
    if not math.isnan(row.ratio):
        parts.append(f"{row.ratio:8.2f}x")
    if row.bar:
        parts.append(f"{row.bar}: {row.met}")
    parts.append(row.note)
    return "  ".join(part for part in parts if part)


def facts(device: torch.device) -> dict[str, str]:
    """What stands beside every figure; clocks are read for each row, and never set."""
    triton = _version("triton")
    if device.type != "cuda":
        return machine() | {"triton": triton, "cuda": "", "driver": "", "card": "none"}
    driver = _query("driver_version")[0]
    return machine() | {
        "triton": triton,
        "cuda": torch.version.cuda or "",
        "driver": driver,
        "card": torch.cuda.get_device_name(device),
    }


def slug(card: str) -> str:
    """Name of a card's folder under ``results``."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return f"none (python {platform.python_version()})"


def _query(names: str) -> list[str]:
    """Ask the driver, reading only; empty where it has no such tool."""
    command = ["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ["" for _ in names.split(",")]
    return [part.strip() for part in done.stdout.splitlines()[0].split(",")]
