"""Where the time of a calibrated patch goes: ``python -m benchmarks.cpu_stages DIR``.

A pair of TinyLlama's shape (1.1 billion parameters in 22 blocks) is patched on 16384 tokens,
``exact`` and asymmetric, under a memory limit. Each block costs the same, so that some of them say
what all would take. Beside the seconds that pass stand those of the CPU, all threads together: a
machine that is shared, or a program that is stopped meanwhile, moves the first alone. Makes the
models in DIR and removes them.
"""

import argparse
import dataclasses
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from benchmarks.pairs import SHAPES, write_pair
from benchmarks.results import CPU, Figure, write
from benchmarks.texts import write_texts, write_tokenizer
from tailor_fast import Recipe, RunOptions, patch_checkpoint
from tailor_fast.patching.report import Report

SAMPLES, LENGTH = 128, 128
MAX_RAM = 3 << 30
_KIB = 1 << 10
_GIB = 1 << 30


@contextmanager
def cpu_seconds() -> Iterator[dict[str, float]]:
    """Collect the CPU seconds of each stage that reports time."""
    spent: dict[str, float] = {}
    original = Report.timed

    @contextmanager
    def timed(self: Report, stage: str) -> Iterator[None]:
        start = time.process_time()
        try:
            with original(self, stage):
                yield
        finally:
            spent[stage] = spent.get(stage, 0.0) + time.process_time() - start

    with patch.object(Report, "timed", timed):
        start = time.process_time()
        yield spent
        spent["total"] = time.process_time() - start


def peak_bytes() -> int:
    """The most that was ever resident of this process, the loaded program included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB


def check(report: Report) -> None:
    """Refuse figures of a run that is not what it should be."""
    for row in report.linears:
        losses = [x for x in (row.loss, row.loss_undecorated, row.loss_reverted) if x is not None]
        if len(losses) < 3 or losses != sorted(losses):
            raise SystemExit(f"{row.name}: the patch is worse than the bare mask")
        if row.tokens != SAMPLES * LENGTH:
            raise SystemExit(f"{row.name}: {row.tokens} tokens were counted")


def main() -> None:
    """Make, run, check, remove, write, print."""
    parser = argparse.ArgumentParser(description="Times the stages of a calibrated patch.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="has room for three models")
    parser.add_argument("--blocks", type=int, default=SHAPES["1.1B"].layers)
    given = parser.parse_args()
    folder = given.folder.absolute()
    folder.mkdir(parents=True)
    try:
        shape = dataclasses.replace(SHAPES["1.1B"], layers=given.blocks)
        base, tuned = write_pair(folder, shape)
        write_tokenizer(tuned)
        data = write_texts(folder / "new.jsonl", SAMPLES, LENGTH)
        loaded = peak_bytes()
        options = RunOptions(max_ram=MAX_RAM, resume="never")
        with cpu_seconds() as cpu:
            report = patch_checkpoint(
                base, tuned, folder / "out", Recipe(), calibration=data, options=options
            )
    finally:
        shutil.rmtree(folder)
    check(report)
    work = f"{given.blocks} of {SHAPES['1.1B'].layers} blocks, {SAMPLES * LENGTH} tokens"
    wall = report.seconds
    memory = {"max_ram": MAX_RAM, "loaded": loaded, "peak": peak_bytes()}
    write(
        CPU / "stages.csv",
        [
            Figure(stage, work, "exact", spent, spent / wall["total"], float("nan"))
            for stage, spent in wall.items()
        ],
        {
            "cpu_seconds": [cpu[stage] for stage in wall],
            **{f"{name}_gib": [size / _GIB] * len(wall) for name, size in memory.items()},
        },
    )


if __name__ == "__main__":
    main()
