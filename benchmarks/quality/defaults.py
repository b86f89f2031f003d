"""``python -m benchmarks.quality.defaults``: the defaults, and one choice at a time changed.

All on validation scenes: this is what defaults are chosen from. What was measured is kept in the
work folder, by checkpoints and code, and not measured again.
"""

import argparse
import csv
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.quality import (
    baselines,
    bench,
    evaluation,
    protocols,
    scenes,
    sensitivities,
    sources,
    tinyllava,
)
from benchmarks.quality.baselines import State
from benchmarks.quality.bench import Bench, labelled
from benchmarks.quality.cells import (
    COLUMNS,
    Cell,
    Key,
    Store,
    from_line,
    read,
    to_line,
)
from benchmarks.quality.choices import CHOICES, Choice, row, setting
from benchmarks.quality.protocols import PROTOCOLS
from benchmarks.quality.training import Report
from benchmarks.results import ROOT, machine
from tailor_fast import Recipe, tailor_model

OUT = ROOT / "results" / "quality" / "defaults.csv"
DENSITY = 0.1


def code_version() -> str:
    """Return a short digest of the sources that make and measure a cell."""
    modules = (baselines, sensitivities, bench, evaluation, protocols, scenes)
    return sources.digest((*modules, sys.modules[__name__]))[:12]


def _tailored(found: Bench, choice: Choice, retain: bool, seed: int) -> State:
    def data(task: str) -> dict[str, torch.Tensor]:
        batch = tinyllava.encode([scenes.draw(task, "train", choice.samples, seed)])
        return labelled(found.family, batch)

    old = [data(task) for task in found.old_tasks] if retain else None
    recipe = Recipe(density=DENSITY, **choice.changed)
    done = tailor_model(found.base, found.tuned, [data(found.new_task)], recipe, retain_batches=old)
    return done.model.state_dict()


def run(
    work: Path, names: Sequence[str], seeds: Sequence[int], store: Store, report: Report = print
) -> Iterator[Cell]:
    """Measure what is missing and yield every cell of these protocols and fine-tuning seeds.

    A cell's row is ``old data`` or ``new data only``, its setting the departure.
    """
    for name in names:
        for seed in seeds:
            base, tuned = PROTOCOLS[name].make(work, 0, seed, report)
            found: Bench | None = None
            for retain, choices in CHOICES.items():
                for choice in choices:
                    key = Key(
                        name, 0, seed, row(retain), DENSITY, setting(choice), "validation",
                        tuned.fingerprint[:12],
                    )  # fmt: skip
                    cell = store.get(key)
                    if cell is None:
                        found = found or Bench(PROTOCOLS[name], base, tuned, seed)
                        make = _maker(found, choice, retain, seed)
                        cell = store.add(key, found.measure(make, "validation"))
                    report(f"{name} {seed} {key.row} {key.setting}: {cell.scores.h_mean:.1f}")
                    yield cell


def _maker(found: Bench, choice: Choice, retain: bool, seed: int) -> Callable[[], State]:
    return lambda: _tailored(found, choice, retain, seed)


def save(cells: Sequence[Cell], path: Path, command: str) -> None:
    """Write a line for each cell below a remark that names what made them."""
    facts = "; ".join(f"{name} {value}" for name, value in machine().items())
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(f"# {command}; {facts}\n")
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(to_line(cell, code_version()) for cell in cells)


def load(path: Path) -> list[Cell]:
    """Read them back."""
    return [from_line(line) for line in read(path)]


def main() -> None:
    """Parse the command line, run, write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.defaults")
    parser.add_argument("--work", type=Path, default=Path("build/quality"))
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    store = Store(arguments.work / "defaults-cells.csv", code_version(), machine()["commit"])
    cells = list(run(arguments.work, arguments.protocols, arguments.seeds, store))
    save(
        cells,
        arguments.out,
        shlex.join(["python", "-m", "benchmarks.quality.defaults", *sys.argv[1:]]),
    )


if __name__ == "__main__":
    main()
