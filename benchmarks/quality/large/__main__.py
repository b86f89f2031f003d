"""``python -m benchmarks.quality.large``: train the larger pairs, measure rows, write the table.

One pre-training, by default three fine-tunes of each of two tasks. What has been trained and
measured is kept in the work folder, so that a stopped run goes on where it ended.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.quality import report, sources
from benchmarks.quality.cells import Store, code_version
from benchmarks.quality.commands import command_line, write_cells
from benchmarks.quality.large import bench as large_bench
from benchmarks.quality.large import model, scenes
from benchmarks.quality.large.bench import LargeBench
from benchmarks.quality.large.model import Size
from benchmarks.quality.large.training import LargeProtocol
from benchmarks.quality.rows import ROWS
from benchmarks.quality.runner import Plan, Runner
from benchmarks.quality.training import Finetuning, Pretraining
from benchmarks.results import machine

# What eight minutes of a large card hold; any other row can be asked for.
DEFAULT_ROWS = (
    *("base", "tuned", "wise-ft", "wise-ft-0.5", "magnitude", "dare", "wanda", "official", "obs"),
    *("default", "default-retain"),
)
# Grafting learns its mask through the model, with all of its tensors where the states are.
ROW_NAMES = tuple(name for name in ROWS if name != "grafting")


@dataclass(frozen=True)
class Variant:
    """A size of model and how long it is trained."""

    size: Size
    pretraining: Pretraining
    finetuning: Finetuning


VARIANTS = {
    "large": Variant(
        Size(),
        # Six slots, ``exists`` twice: 1,026 scenes a step. The noise is 0.05 of the pixels' range.
        Pretraining(
            steps=3000, per_task=171, learning_rate=1e-3, noise=0.135, family="llava-large"
        ),
        Finetuning("code", steps=300, learning_rate=1e-3, batch=256, layers=5),
    ),
    # Every step of the above in seconds on a CPU: what it measures means nothing.
    "dry-run": Variant(
        Size(vision=(32, 1), width=32, inner=64, blocks=2, heads=2),
        Pretraining(steps=4, per_task=4, learning_rate=1e-3, noise=0.135, family="llava-dry-run"),
        Finetuning("code", steps=4, learning_rate=1e-3, batch=8, layers=1),
    ),
}


def protocols(name: str, device: torch.device) -> dict[str, LargeProtocol]:
    """Return the protocols of a variant: a shifted domain and conflicting answers."""
    variant = VARIANTS[name]
    return {
        f"{name}-{task}": LargeProtocol(
            f"{name}-{task}",
            f"LLaVA of sixteen digits, {title}",
            variant.pretraining,
            replace(variant.finetuning, task=task),
            variant.size,
            device,
        )
        for task, title in (("code", "shifted domain"), ("next", "conflicting answers"))
    }


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.quality.large", description=__doc__)
    made.add_argument("--variant", choices=VARIANTS, default="large")
    made.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    made.add_argument("--finetuning-seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    made.add_argument(
        "--rows", nargs="+", choices=ROW_NAMES, default=list(DEFAULT_ROWS), metavar="NAME"
    )
    made.add_argument("--densities", nargs="+", type=float, default=[0.1], metavar="SHARE")
    made.add_argument("--work", type=Path, default=Path("build/quality"), help="models and cells")
    made.add_argument("--out", type=Path, help="the table, a CSV file; left out: none is written")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, run, write."""
    parsed = parser()
    options = parsed.parse_args(arguments)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parsed.error("torch sees no CUDA device; --variant dry-run --device cpu tries every step")
    chosen = protocols(options.variant, options.device)
    plan = Plan(tuple(chosen), (0,), options.finetuning_seeds, options.rows, options.densities)
    began = time.perf_counter()

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - began:7.1f} s] {line}", flush=True)

    code = sources.digest((large_bench, model, scenes))[:6] + code_version()[:6]
    store = Store(options.work / f"{options.variant}-cells.csv", code, machine()["commit"])
    cells = Runner(options.work, store, say, chosen, LargeBench).run(plan)
    print(report.text(report.summarise(cells)))
    if options.out is not None:
        command = command_line("benchmarks.quality.large", arguments)
        write_cells(cells, options.out, f"{command}; {device_name(options.device)}", code)
        say(f"the table is in {options.out}")


def device_name(device: torch.device) -> str:
    """Return what the device calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


if __name__ == "__main__":
    main()
