"""One process against two: ``python -m benchmarks.cpu_processes DIR``.

A pair of 0.1 billion parameters is patched on 8192 tokens, ``exact`` and asymmetric, by one process
and by two under torchrun, each with one thread. The two outputs must be one another's, but for what
the order of sums moves. The time is that of the job, without the start of the programs, to
which the import of transformers' model class belongs; that of the whole programs, torchrun's own
start included, stands beside it. Makes the models in DIR and removes them.
"""

import argparse
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks.pairs import SHAPES, write_pair
from benchmarks.results import CPU, Figure, write
from benchmarks.texts import write_texts, write_tokenizer
from tailor_fast.checkpoint import open_checkpoint

SAMPLES, LENGTH, BATCH = 64, 128, 4
FLOOR = 1.8
WORTH_A_ROW = 0.01  # of the job's time
JOB = "--job"  # what tells this module that it is the program that is timed
# Of the words of the first group that either output changes, those not changed in both: a score at
# the threshold, or a value that rounds to base's in one of them. Later groups see other inputs by
# then, a rounding of bfloat16 apart, so that their losses are compared instead.
MASK_APART, LOSS_APART = 1e-3, 1e-2


def job(arguments: Sequence[str]) -> int:
    """Run ``tailor-fast`` in this process, once what it imports on its way is imported."""
    for name in ("transformers.models.llama.modeling_llama", "matplotlib.backends.backend_agg"):
        importlib.import_module(name)
    from tailor_fast.cli import main as program

    return program(list(arguments))


def run(folder: Path, out: Path, processes: int) -> dict[str, float]:
    """Patch once; returns the seconds of each stage, of the job, and of the program."""
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--nproc-per-node", str(processes), "-m"]
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    subprocess.run(
        [
            *(*start, "benchmarks.cpu_processes", JOB, "patch"),
            *(str(folder / "base"), str(folder / "tuned"), "-o", str(out)),
            *("--calibration", str(folder / "new.jsonl"), "--batch-size", str(BATCH)),
            *("--device", "cpu", "--quiet", "--resume", "never"),
        ],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    program = time.perf_counter() - began
    report = json.loads((out / "tailor_report.json").read_text())
    if report["processes"] != processes:
        raise SystemExit(f"{out} was made by {report['processes']} processes")
    seconds = {"exchange": 0.0, **report["seconds"], "program": program}
    print(f"{processes}:", {stage: round(spent, 1) for stage, spent in seconds.items()})
    return seconds


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
        rounds: dict[int, list[dict[str, float]]] = {1: [], 2: []}
        for _ in range(given.rounds):
            for count, times in rounds.items():
                times.append(run(folder, folder / f"out-{count}", count))
        check(folder)
    finally:
        shutil.rmtree(folder)
    torch.set_num_threads(1)  # as the programs ran
    record([medians(rounds[count]) for count in (1, 2)])


def medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each stage."""
    return {stage: statistics.median(r[stage] for r in rounds) for stage in rounds[0]}


def record(seconds: Sequence[Mapping[str, float]]) -> None:
    """Write the job's row for one process and for two, and below it those of its stages."""
    least = WORTH_A_ROW * seconds[0]["total"]
    long = (name for name in seconds[0] if max(spent[name] for spent in seconds) >= least)
    stages = ["total", *(name for name in long if name != "total")]
    shape = f"0.1B, {SAMPLES * LENGTH} tokens, bfloat16"
    figures = [
        Figure(
            "patch" if stage == "total" else stage,
            shape,
            f"{count} process" + "es" * (count > 1),
            spent[stage],
            seconds[0][stage] / spent[stage] if seconds[0][stage] else float("nan"),
            FLOOR if stage == "total" and count > 1 else float("nan"),
        )
        for stage in stages
        for count, spent in enumerate(seconds, 1)
        if spent[stage]
    ]
    write(CPU / "processes.csv", figures)


if __name__ == "__main__":
    if sys.argv[1:2] == [JOB]:
        sys.exit(job(sys.argv[2:]))
    main()
