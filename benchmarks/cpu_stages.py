"""Where the time of a calibrated patch goes: ``python -m benchmarks.cpu_stages DIR``.

A pair with blocks of TinyLlama's shape (1.1 billion parameters in 22 of them) is patched on 16384
tokens, ``exact`` and asymmetric, by one thread. Each block costs the same, so that some of them say
what all would take. Makes the models in DIR and removes them.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.pairs import SHAPES, write_pair
from benchmarks.results import CPU, Figure, write
from benchmarks.texts import write_texts, write_tokenizer

SAMPLES, LENGTH = 128, 128


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
        out = folder / "out"
        subprocess.run(
            [
                *(sys.executable, "-m", "tailor_fast", "patch", base, tuned, "-o", out),
                *("--calibration", data, "--device", "cpu", "--quiet", "--resume", "never"),
            ],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        report = json.loads((out / "tailor_report.json").read_text())
    finally:
        shutil.rmtree(folder)
    for row in report["linears"]:
        if not row["loss"] <= row["loss_undecorated"] <= row["loss_reverted"]:
            raise SystemExit(f"{row['name']}: the patch is worse than the bare mask")
        if row["tokens"] != SAMPLES * LENGTH:
            raise SystemExit(f"{row['name']}: {row['tokens']} tokens were counted")
    torch.set_num_threads(1)  # as the program ran
    work = f"{given.blocks} of 22 blocks, {SAMPLES * LENGTH} tokens"
    seconds = report["seconds"]
    write(
        CPU / "stages.csv",
        [
            Figure(stage, work, "exact", spent, spent / seconds["total"], float("nan"))
            for stage, spent in seconds.items()
        ],
    )


if __name__ == "__main__":
    main()
