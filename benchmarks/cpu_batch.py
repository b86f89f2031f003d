"""A batch against one program per model: ``python -m benchmarks.cpu_batch DIR``.

Eight tuned models on one base of 0.4 billion parameters, each with files of its own, patched
without data by ``tailor-fast batch`` and by eight runs of ``patch``; the outputs must be
the same bytes. Makes the models in DIR and removes them.
"""

import argparse
import filecmp
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.pairs import SHAPES, write_pair
from benchmarks.results import CPU, Figure, interleaved, write

SIZE = "0.4B"
MODELS = 8
FLOOR = 1.4
_ROUNDS = 3


def make_models(folder: Path) -> tuple[Path, list[Path]]:
    """A base and the tuned models."""
    base, tuned = write_pair(folder, SHAPES[SIZE])
    models = [tuned]
    for number in range(1, MODELS):
        models.append(folder / f"tuned-{number}")
        shutil.copytree(tuned, models[-1])
    return base, models


def manifest(folder: Path, base: Path, models: list[Path]) -> Path:
    """A job for each model."""
    lines = [f"  - {{tuned: {model}, out: batch-{model.name}}}" for model in models]
    path = folder / "jobs.yaml"
    path.write_text("\n".join([f"defaults: {{base: {base}}}", "jobs:", *lines]) + "\n")
    return path


def run(*arguments: object) -> None:
    """Run the program once."""
    command = [sys.executable, "-m", "tailor_fast", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def check(models: list[Path]) -> None:
    """Refuse to time outputs that differ."""
    for model in models:
        ours, alone = (model.with_name(f"{kind}-{model.name}") for kind in ("batch", "alone"))
        shards = [path.name for path in alone.glob("*.safetensors")]
        _, differing, missing = filecmp.cmpfiles(ours, alone, shards, shallow=False)
        if differing or missing or not shards:
            raise SystemExit(f"{ours} and {alone} differ")


def main() -> None:
    """Make, check, measure, remove, write, print."""
    parser = argparse.ArgumentParser(description="Times a batch against single runs.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="has room for 20 GB")
    folder = parser.parse_args().folder.absolute()
    folder.mkdir(parents=True)
    try:
        base, models = make_models(folder)
        jobs = manifest(folder, base, models)

        def cleared(kind: str) -> None:
            for path in folder.glob(f"{kind}-*"):
                shutil.rmtree(path)
            shutil.rmtree(folder / "jobs-report", ignore_errors=True)

        def together() -> None:
            cleared("batch")
            run("batch", jobs)

        def one_by_one() -> None:
            cleared("alone")
            for model in models:
                run("patch", base, model, "-o", model.with_name(f"alone-{model.name}"))

        together()
        one_by_one()
        check(models)
        seconds = interleaved({"batch": together, "one by one": one_by_one}, _ROUNDS)
        shape = f"{MODELS} x {SIZE}, bfloat16, no data"
        alone, ours = seconds["one by one"], seconds["batch"]
        write(
            CPU / "batch.csv",
            [
                Figure("batch", shape, "one by one", alone, 1.0, float("nan")),
                Figure("batch", shape, "batch", ours, alone / ours, FLOOR),
            ],
        )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
