"""Two fine-tunes into one model: ``python -m benchmarks.cpu_stitch DIR``.

A base and two fine-tunes of 0.1 billion parameters with statistics of 2048 tokens each: what the
joint solve takes beside two single patches from the same statistics, which leave two models, and
how much memory. Programs from disk to disk, their start included. Makes the models in DIR and
removes them.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.pairs import SHAPES, write_pair
from benchmarks.results import CPU, Figure, write
from benchmarks.texts import write_texts, write_tokenizer

SAMPLES, LENGTH = 16, 128
DENSITY = 0.05  # a task: the union keeps at most a tenth
_MIB = 1 << 20
_KIB = 1 << 10


class Run(NamedTuple):
    """Wall seconds of a program from start to end, and the most that was resident of it, bytes."""

    seconds: float
    peak: int


def program(*arguments: object) -> Run:
    """Run ``tailor-fast``."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "tailor_fast", *map(str, arguments), "--quiet"]
    with subprocess.Popen(command) as child:
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}")
    return Run(time.perf_counter() - began, usage.ru_maxrss * _KIB)


class Setting:
    """A base, two fine-tunes of it, and samples of both tasks and of an old one, in a folder."""

    def __init__(self, folder: Path, size: str) -> None:
        """Make them."""
        self._folder = folder
        self.base, first = write_pair(folder, SHAPES[size])
        (folder / "other").mkdir()
        other, second = write_pair(folder / "other", SHAPES[size], moved=2)
        shutil.rmtree(other)
        # A task is called after its folder.
        self.tuned = (first, second.rename(folder / "second"))
        for number, model in enumerate((*self.tuned, self.base)):
            write_tokenizer(model)
            write_texts(folder / f"{number}.jsonl", SAMPLES, LENGTH, seed=number)

    def calibrate(self) -> Run:
        """Take the statistics of both tasks and of the old one; the slowest program."""
        return max(
            program("calibrate", model, "--data", self._data(at), "-o", self._stats(at))
            for at, model in enumerate((*self.tuned, self.base))
        )

    def patches(self) -> Run:
        """Patch each fine-tune by itself."""
        runs = [
            program(
                *("patch", self.base, model, "-o", self._out(f"patch-{at}"), *_DENSITY),
                *("--statistics", self._stats(at)),
            )
            for at, model in enumerate(self.tuned)
        ]
        return Run(sum(run.seconds for run in runs), max(run.peak for run in runs))

    def stitch(self) -> Run:
        """Solve for both."""
        return program(*self._stitch("stitched"))

    def stitch_with_old_data(self) -> Run:
        """Solve for both and the old task, the mask from the solution."""
        return program(*self._stitch("held"), "--retain", self._stats(2))

    def check(self) -> None:
        """Refuse to report a stitched model that is no better than the base model at its tasks."""
        for name in ("stitched", "held"):
            told = json.loads((self._folder / name / "tailor_report.json").read_text())
            for layer in told["linears"]:
                for task, loss in layer["tasks"].items():
                    if not loss["stitched"] < loss["base"]:
                        raise SystemExit(f"{name}: {layer['name']} is no better at {task}")
            program("verify", self._folder / name)

    def _stitch(self, name: str) -> tuple[object, ...]:
        taken = (("--statistics", self._stats(at)) for at in range(2))
        out = self._out(name)
        return ("stitch", self.base, *self.tuned, "-o", out, *_DENSITY, *sum(taken, ()))

    def _out(self, name: str) -> Path:
        shutil.rmtree(self._folder / name, ignore_errors=True)
        return self._folder / name

    def _data(self, at: int) -> Path:
        return self._folder / f"{at}.jsonl"

    def _stats(self, at: int) -> Path:
        return self._folder / f"{at}.stats.safetensors"


_DENSITY = ("--density", DENSITY)


def main(arguments: list[str] | None = None) -> None:
    """Make, measure, check, remove, write, print."""
    parser = argparse.ArgumentParser(description="Times the joint solve beside single patches.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="has room for eight models")
    parser.add_argument("--size", choices=SHAPES, default="0.1B")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=CPU / "stitch.csv")
    given = parser.parse_args(arguments)
    folder = given.folder.absolute()
    folder.mkdir(parents=True)
    try:
        setting = Setting(folder, given.size)
        taken = setting.calibrate()
        ways: dict[str, Callable[[], Run]] = {
            "two patches": setting.patches,
            "stitch": setting.stitch,
            "stitch, old data": setting.stitch_with_old_data,
        }
        runs: dict[str, list[Run]] = {way: [] for way in ways}
        for _ in range(given.rounds):
            for way, call in ways.items():
                runs[way].append(call())
        setting.check()
    finally:
        shutil.rmtree(folder)
    found = {"statistics of one": taken} | {
        way: Run(statistics.median(run.seconds for run in each), max(run.peak for run in each))
        for way, each in runs.items()
    }
    record(found, given.size, given.out)


def record(found: dict[str, Run], size: str, path: Path) -> None:
    """Write a row for each; ratios are to the two single patches."""
    shape = f"{size}, {SAMPLES * LENGTH} tokens a task, bfloat16"
    once = found["two patches"].seconds
    nan = float("nan")
    figures = [
        Figure(way, shape, "tailor-fast", run.seconds, once / run.seconds, nan)
        for way, run in found.items()
    ]
    write(path, figures, {"peak_mib": [run.peak / _MIB for run in found.values()]})


if __name__ == "__main__":
    main()
