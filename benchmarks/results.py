"""Tables of figures: one CSV per op and machine, every row with what is needed to repeat it."""

import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent
CPU = ROOT / "results" / "cpu"


class Figure(NamedTuple):
    """One measured call.

    Attributes:
        work: what is computed.
        shape: sizes and dtype.
        provider: who computes it.
        seconds: median wall time.
        ratio: how many times as fast as the baseline of the same run.
        floor: least ratio that is asked for; NaN for a baseline or without one.
    """

    work: str
    shape: str
    provider: str
    seconds: float
    ratio: float
    floor: float


def interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each call. They take turns, so that a busy machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def machine() -> dict[str, str]:
    """The facts beside every figure."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,  # outside a checkout there is no commit to name
    )
    return {
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{torch.backends.cpu.get_cpu_capability()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
    }


def write(
    path: Path, figures: list[Figure], more: Mapping[str, Sequence[float]] | None = None
) -> None:
    """Write a table, replacing the one before, and print it; ``more`` are further columns."""
    facts, further = machine(), dict(more or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow([*facts, *Figure._fields, *further])
        for row, figure in enumerate(figures):
            rest = (column[row] for column in further.values())
            numbers = (f"{value:.4g}" for value in (*figure[3:], *rest))
            table.writerow([*facts.values(), *figure[:3], *numbers])
            print(f"{figure.work:24} {figure.shape:28} {figure.provider:10}", end="")
            print(f" {figure.seconds:8.4f} s  {figure.ratio:6.2f}x  floor {figure.floor:.2f}")
