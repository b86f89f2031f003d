"""Patching from disk to disk: ``python -m benchmarks.cpu_disk DIR --mergekit PROGRAM``.

Makes pairs of checkpoints in DIR, patches them without data at density 0.1 through the command
line, and removes them. Beside it, in the same run and on the same disk: ``dd`` of the same bytes,
made durable as the output is, and mergekit's ``dare_ties``, which leaves its output in the page
cache. Writes ``results/cpu/disk.csv``; rows of sizes that were not run stay.
"""

import argparse
import csv
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks.pairs import SHAPES, write_pair
from benchmarks.results import CPU, machine
from tailor_fast.checkpoint import open_checkpoint

OUTPUT = CPU / "disk.csv"
WARM = ("1.1B",)  # small enough for both inputs to stay in the page cache
RAM_BARS = {"1.1B": 1.2 * 1024, "7B": 1.5 * 1024}  # MiB
_PATCH = """
import re, sys
from pathlib import Path
from tailor_fast.cli import main
sys.argv[1:1] = ["patch", "-q", "--density", "0.1"]
code = main()
print(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
sys.exit(code)
"""
_MERGE = """
merge_method: dare_ties
base_model: {base}
models:
  - model: {tuned}
    parameters: {{density: 0.1, weight: 1.0}}
dtype: bfloat16
"""


class Row(NamedTuple):
    """One figure.

    Attributes:
        size: name of the pair.
        parameters: of the model.
        inputs: ``warm`` (in the page cache), ``cold`` (dropped from it), or ``unknown`` where the
            system does not let the page cache be dropped.
        work: what was done.
        seconds: median wall time, start of the program included.
        peak_mib: most memory resident at once; empty where it was not measured.
        ratio: see ``bar``.
        bar: what is asked of ratio or peak, in words.
    """

    size: str
    parameters: int
    inputs: str
    work: str
    seconds: float
    peak_mib: float | None = None
    ratio: float | None = None
    bar: str = ""


def drop_caches() -> str:
    """Forget every cached page; ``unknown`` where that is not permitted."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return "unknown"
    return "cold"


def warm(paths: tuple[Path, Path]) -> str:
    """Read every shard once."""
    for path in paths:
        for shard in path.glob("*.safetensors"):
            _run(["dd", f"if={shard}", "of=/dev/null", "bs=8M"])
    return "warm"


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr[-2000:]}")
    return done.stdout


def timed(command: list[str]) -> tuple[float, str]:
    """Wall seconds of a command, and what it printed."""
    start = time.perf_counter()
    printed = _run(command)
    return time.perf_counter() - start, printed


@contextmanager
def removed(path: Path) -> Iterator[Path]:
    """Remove ``path`` before and after."""
    for _ in range(1):
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
    try:
        yield path
    finally:
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)


def patch(paths: tuple[Path, Path], out: Path) -> tuple[float, float]:
    """Patch once; seconds and peak MiB."""
    arguments = [str(path) for path in paths]
    command = [sys.executable, "-c", _PATCH, *arguments, "-o", str(out)]
    seconds, printed = timed(command)
    return seconds, int(printed.split()[-1]) / 1024


def copy_out(work: Path, nbytes: int) -> float:
    """Seconds of writing as many bytes with ``dd``, made durable."""
    with removed(work / "dd") as path:
        count = -(-nbytes // (8 << 20))
        command = ["dd", "if=/dev/zero", f"of={path}", "bs=8M", f"count={count}", "conv=fsync"]
        return timed(command)[0]


def copy_in(paths: tuple[Path, Path]) -> float:
    """Seconds of reading both inputs with ``dd``, one file after the other."""
    start = time.perf_counter()
    warm(paths)
    return time.perf_counter() - start


def merge(program: Path, paths: tuple[Path, Path], work: Path) -> float:
    """Seconds of mergekit's ``dare_ties``; nothing is made durable."""
    recipe = work / "merge.yaml"
    recipe.write_text(_MERGE.format(base=paths[0], tuned=paths[1]))
    with removed(work / "merged") as out:
        return timed([str(program), str(recipe), str(out)])[0]


def check(paths: tuple[Path, Path], work: Path) -> None:
    """Refuse to time an output that ``verify`` does not pass."""
    with removed(work / "out") as out:
        patch(paths, out)
        _run([sys.executable, "-m", "tailor_fast", "verify", "-q", str(out)])


def run_warm(size: str, paths: tuple[Path, Path], work: Path, program: Path | None) -> list[Row]:
    """Interleaved rounds with both inputs in the page cache."""
    nbytes, parameters = _sizes(paths[0])
    check(paths, work)
    ours: list[tuple[float, float]] = []
    disk: list[float] = []
    theirs: list[float] = []
    for number in range(3):
        warm(paths)
        with removed(work / "out") as out:
            ours.append(patch(paths, out))
        disk.append(copy_out(work, nbytes))
        if program is not None and number < 2:
            warm(paths)
            theirs.append(merge(program, paths, work))
    seconds, written = statistics.median(s for s, _ in ours), statistics.median(disk)
    peak = max(p for _, p in ours)
    allowed = 1.3 * written + 3
    rows = [
        Row(
            size,
            parameters,
            "warm",
            "patch",
            seconds,
            peak,
            peak / RAM_BARS[size],
            "peak ratio <= 1",
        ),
        Row(size, parameters, "warm", "dd conv=fsync of the output", written),
        Row(size, parameters, "warm", "1.3 dd + 3 s", allowed, None, seconds / allowed, "<= 1"),
    ]
    if theirs:
        merged = statistics.median(theirs)
        work_done = "mergekit dare_ties"
        rows.append(
            Row(size, parameters, "warm", work_done, merged, None, merged / seconds, ">= 8")
        )
    return rows


def run_cold(size: str, paths: tuple[Path, Path], work: Path) -> list[Row]:
    """Interleaved rounds against ``dd`` of the same bytes, each with the page cache dropped."""
    nbytes, parameters = _sizes(paths[0])
    ours: list[tuple[float, float]] = []
    disk: list[float] = []
    for _ in range(2):
        state = drop_caches()
        disk.append(copy_in(paths) + copy_out(work, nbytes))
        drop_caches()
        with removed(work / "out") as out:
            ours.append(patch(paths, out))
    seconds, copied = statistics.median(s for s, _ in ours), statistics.median(disk)
    peak = max(p for _, p in ours)
    bar = "<= 1.3" if size == "7B" else ""
    return [
        Row(size, parameters, state, "patch", seconds, peak, seconds / copied, bar),
        Row(size, parameters, state, "dd of inputs and output", copied),
    ]


def _sizes(path: Path) -> tuple[int, int]:
    with open_checkpoint(path) as checkpoint:
        tensors = checkpoint.tensors.values()
        return checkpoint.total_bytes, sum(info.numel for info in tensors)


def fit(rows: list[Row]) -> list[Row]:
    """Growth of the cold runs: a line through the seconds, and the spread of the peaks."""
    runs = [row for row in rows if row.work == "patch" and row.inputs != "warm"]
    if len(runs) < 3:
        return []
    billions = [row.parameters / 1e9 for row in runs]
    line = statistics.linear_regression(billions, [row.seconds for row in runs])
    off = max(
        abs(row.seconds - line.intercept - line.slope * size) / row.seconds
        for row, size in zip(runs, billions, strict=True)
    )
    peaks = [row.peak_mib for row in runs if row.peak_mib is not None and row.parameters > 10**9]
    text = f"linear fit: {line.intercept:.2f} s + {line.slope:.2f} s per 10^9 parameters"
    return [
        Row(
            "all", 0, "cold", text, line.slope, None, off, "largest relative distance from the line"
        ),
        Row(
            "all",
            0,
            "cold",
            "memory: four of the largest layers, at most 768 MiB",
            0.0,
            max(peaks),
            max(peaks) / min(peaks),
            "largest over smallest peak above 1B",
        ),
    ]


def write(rows: list[Row]) -> None:
    """Write the table: new rows, and old ones of what was not run again."""
    facts = machine()
    done = {(row.size, row.inputs) for row in rows}
    kept: list[dict[str, str]] = []
    if OUTPUT.is_file():
        with OUTPUT.open(newline="", encoding="utf-8") as file:
            kept = [
                old
                for old in csv.DictReader(file)
                if old["size"] != "all" and (old["size"], old["inputs"]) not in done
            ]
    old_rows = [
        Row(
            old["size"],
            int(old["parameters"]),
            old["inputs"],
            old["work"],
            float(old["seconds"]),
            float(old["peak_mib"]) if old["peak_mib"] else None,
        )
        for old in kept
    ]
    lines = kept + [facts | _shown(row) for row in (*rows, *fit([*old_rows, *rows]))]
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    with OUTPUT.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [*facts, *Row._fields])
        table.writeheader()
        table.writerows(lines)


def _shown(row: Row) -> dict[str, str]:
    numbers = {
        name: "" if value is None else f"{value:.4g}"
        for name, value in (
            ("seconds", row.seconds),
            ("peak_mib", row.peak_mib),
            ("ratio", row.ratio),
        )
    }
    fields = {name: str(value) for name, value in row._asdict().items()}
    return fields | numbers


def main() -> None:
    """Make, check, measure, remove, write, print."""
    parser = argparse.ArgumentParser(description="Times patching from disk to disk.")
    parser.add_argument("work", type=Path, metavar="DIR", help="has room for the pairs")
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["0.1B", "0.4B", "1.1B"])
    parser.add_argument("--mergekit", type=Path, help="mergekit-yaml of mergekit 0.1.5")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for size in given.sizes:
        shape = SHAPES[size]
        nbytes = sum(2 * spec.shape[0] * (spec.shape[1:] or (1,))[0] for spec in shape.specs())
        free = shutil.disk_usage(given.work).free
        if free < 3.3 * nbytes:
            raise SystemExit(
                f"{size}: needs {3.3 * nbytes / 1e9:.0f} GB, {free / 1e9:.0f} are free"
            )
        with removed(given.work / size) as folder:
            folder.mkdir()
            paths = write_pair(folder, shape)
            found = run_warm(size, paths, given.work, given.mergekit) if size in WARM else []
            found += run_cold(size, paths, given.work)
        for row in found:
            print(*_shown(row).values(), sep="\t", flush=True)
        rows += found
    write(rows)


if __name__ == "__main__":
    main()
