"""One process against two: ``python -m benchmarks.cpu_processes DIR``.

A pair of 0.1 billion parameters is patched on 8192 tokens, ``exact`` and asymmetric, by one process
and by two under torchrun, each with one thread. The two outputs must be one another's, but for what
the order of sums moves. The time is that of the job, without the start of the programs. Makes
the models in DIR and removes them.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks.pairs import SHAPES, write_pair
from benchmarks.results import CPU, Figure, write
from benchmarks.texts import write_texts, write_tokenizer
from tailor_fast.checkpoint import open_checkpoint

SAMPLES, LENGTH, BATCH = 64, 128, 4
FLOOR = 1.8
# Of the words of the first group that either output changes, those not changed in both: a score at
# the threshold, or a value that rounds to base's in one of them. Later groups see other inputs by
# then, a rounding of bfloat16 apart, so that their losses are compared instead.
MASK_APART, LOSS_APART = 1e-3, 1e-2


def run(folder: Path, out: Path, processes: int) -> float:
    """Patch once; returns the seconds of the job."""
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--nproc-per-node", str(processes), "-m"]
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run(
        [
            *(*start, "tailor_fast", "patch"),
            *(str(folder / "base"), str(folder / "tuned"), "-o", str(out)),
            *("--calibration", str(folder / "new.jsonl"), "--batch-size", str(BATCH)),
            *("--device", "cpu", "--quiet", "--resume", "never"),
        ],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    report = json.loads((out / "tailor_report.json").read_text())
    if report["processes"] != processes:
        raise SystemExit(f"{out} was made by {report['processes']} processes")
    print(f"{processes}:", {stage: round(spent, 1) for stage, spent in report["seconds"].items()})
    return float(report["seconds"]["total"])


def check(folder: Path) -> None:
    """Refuse to report two outputs that are not one another's but for the order of sums."""
    ours, theirs = (
        json.loads((folder / f"out-{count}" / "tailor_report.json").read_text())["linears"]
        for count in (1, 2)
    )
    for row, other in zip(ours, theirs, strict=True):
        if row["kept"] != other["kept"] or row["tokens"] != other["tokens"]:
            raise SystemExit(f"{row['name']}: other weights or tokens with 2 processes")
        if abs(row["loss"] - other["loss"]) > LOSS_APART * row["loss"]:
            raise SystemExit(f"{row['name']}: loss {row['loss']}, with 2 processes {other['loss']}")
    first = [row["tensor"] for row in ours if row["group"] == ours[0]["group"]]
    for share, most, names in (
        (different(folder, first), MASK_APART, "first group"),
        (different(folder, [row["tensor"] for row in ours]), 1.0, "all"),
    ):
        print(f"{share:.2e} of the changed words differ in the {names}")
        if share > most:
            raise SystemExit("the two outputs differ")


def different(folder: Path, names: Sequence[str]) -> float:
    """Share of the changed words that are changed in one of the two outputs only."""
    apart = changed = 0
    with ExitStack() as stack:
        places = (folder / name for name in ("base", "out-1", "out-2"))
        opened = [stack.enter_context(open_checkpoint(place)) for place in places]
        for name in names:
            tensors = [checkpoint.empty(name) for checkpoint in opened]
            for checkpoint, tensor in zip(opened, tensors, strict=True):
                checkpoint.read_into(name, tensor)
            before, *after = (tensor.view(torch.int16) for tensor in tensors)
            first, second = (words != before for words in after)
            apart += int((first ^ second).sum())
            changed += int((first | second).sum())
    return apart / max(1, changed)


def main() -> None:
    """Make, check, measure, remove, write, print."""
    parser = argparse.ArgumentParser(description="Times one process against two.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="has room for 2 GB")
    parser.add_argument("--rounds", type=int, default=1)
    given = parser.parse_args()
    folder = given.folder.absolute()
    folder.mkdir(parents=True)
    try:
        tuned = write_pair(folder, SHAPES["0.1B"])[1]
        write_tokenizer(tuned)
        write_texts(folder / "new.jsonl", SAMPLES, LENGTH)
        seconds: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(given.rounds):
            for count, times in seconds.items():
                times.append(run(folder, folder / f"out-{count}", count))
        print(seconds)
        check(folder)
    finally:
        shutil.rmtree(folder)
    torch.set_num_threads(1)  # as the programs ran
    one, two = (statistics.median(seconds[count]) for count in (1, 2))
    shape = f"0.1B, {SAMPLES * LENGTH} tokens, bfloat16"
    write(
        CPU / "processes.csv",
        [
            Figure("patch", shape, "1 process", one, 1.0, float("nan")),
            Figure("patch", shape, "2 processes", two, one / two, FLOOR),
        ],
    )


if __name__ == "__main__":
    main()
