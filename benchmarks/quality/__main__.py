"""``python -m benchmarks.quality``: fill the cells of a plan, write its tables.

What has been measured is kept in the work folder and not measured again, so that a stopped run goes
on where it ended, and one row can be measured alone:

    python -m benchmarks.quality --protocols hard-code --rows wise-ft exact-asymmetric-refit
"""

import argparse
import time
from pathlib import Path

import torch

from benchmarks.quality import report
from benchmarks.quality.cells import Store, code_version
from benchmarks.quality.commands import command_line
from benchmarks.quality.protocols import PROTOCOLS
from benchmarks.quality.rows import ROWS
from benchmarks.quality.runner import Plan, Runner
from benchmarks.results import machine

DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.3)
PLANS = {
    "quick": Plan(("hard-code", "hard-next"), (0,), (0, 1, 2), tuple(ROWS), (0.1,)),
    "full": Plan(tuple(PROTOCOLS), (0, 1), (0, 1, 2, 3, 4), tuple(ROWS), DENSITIES),
}


def _density(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1]; got {text}")
    return value


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description="Measure how much of the old and of the new tasks every method keeps.",
    )
    made.add_argument("--plan", choices=PLANS, default="quick", help="what the rest starts from")
    made.add_argument("--protocols", nargs="+", choices=PROTOCOLS, metavar="NAME")
    made.add_argument("--pretraining-seeds", nargs="+", type=int, metavar="N")
    made.add_argument("--finetuning-seeds", nargs="+", type=int, metavar="N")
    made.add_argument("--rows", nargs="+", choices=ROWS, metavar="NAME")
    made.add_argument("--densities", nargs="+", type=_density, metavar="SHARE")
    made.add_argument("--work", type=Path, default=Path("build/quality"), help="models and cells")
    made.add_argument("--out", type=Path, help="folder of the tables; left out: none is written")
    return made


def plan_of(arguments: argparse.Namespace) -> Plan:
    """Return the plan, with what the command line says in place of its own."""
    plan = PLANS[arguments.plan]
    return Plan(
        *(
            tuple(getattr(arguments, name) or getattr(plan, name))
            for name in ("protocols", "pretraining_seeds", "finetuning_seeds", "rows", "densities")
        )
    )


def main() -> None:
    """Parse the command line, run, write."""
    arguments = parser().parse_args()
    plan = plan_of(arguments)
    # For models this small a second thread gains little, and on busy cores costs tenfold.
    torch.set_num_threads(1)
    began = time.perf_counter()

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - began:7.1f} s] {line}", flush=True)

    store = Store(arguments.work / "cells.csv", code_version(), machine()["commit"])
    cells = Runner(arguments.work, store, say).run(plan)
    summary = report.summarise(cells)
    print(report.text(summary))
    if arguments.out is not None:
        report.write(cells, arguments.out, command_line("benchmarks.quality"))
        say(f"tables are in {arguments.out}")


if __name__ == "__main__":
    main()
