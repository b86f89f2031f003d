"""``python -m benchmarks.quality.stitching``: two or four fine-tunes of one base in one model.

The LLaVA of the hard protocols and its fine-tunes, merged by published rules and by the joint
solve. Every method chooses its setting on validation scenes; test scenes see the chosen one.
"""

import argparse
import csv
import json
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch

from benchmarks.quality.commands import command_line
from benchmarks.quality.report import Spread
from benchmarks.quality.scenes import OLD_TASKS
from benchmarks.quality.stitching_rows import DENSITIES, GROUPS, ROWS, Bench, Row
from benchmarks.quality.training import Report
from benchmarks.results import ROOT, machine

Choice = Literal["h_mean", "held"]
Scores = Mapping[str, float]

OUT = {
    "two": ROOT / "results" / "quality" / "stitching.csv",
    "four": ROOT / "results" / "quality" / "stitching-four.csv",
}
HELD = 0.97  # of the base model's accuracy on old tasks
_LINE = ("row", "density", "choice", "seed", "setting", "changed")


class Line(NamedTuple):
    """What one method has, chosen by one rule, for one seed; accuracies in percent.

    Attributes:
        row: the method.
        density: share of the weights a task; 0 where the method has none or chooses it itself.
        choice: the rule, see ``best``.
        seed: of the fine-tunings and of the calibration scenes.
        setting: what was chosen, canonical JSON.
        changed: share of the linear weights that differ from the base, 0 to 1.
        scores: by task.
    """

    row: str
    density: float
    choice: str
    seed: int
    setting: str
    changed: float
    scores: Scores


def new_tasks(scores: Iterable[str]) -> list[str]:
    """Those of the tasks that the base model does not know."""
    return [task for task in scores if task not in OLD_TASKS]


def figures(scores: Scores, base: Scores) -> dict[str, float]:
    """Means in percent: old and new tasks, all of them, old ones kept, and the harmonic mean.

    Nothing is kept of a base model that knows nothing.
    """
    known = statistics.fmean(base[task] for task in OLD_TASKS)
    old = statistics.fmean(scores[task] for task in OLD_TASKS)
    tasks = new_tasks(scores)
    new = statistics.fmean(scores[task] for task in tasks)
    return {
        "old": old,
        **{task: scores[task] for task in tasks},
        "new": new,
        "kept": 100 * old / known if known else 0.0,
        "mean": statistics.fmean(scores.values()),
        "h_mean": 2 * old * new / (old + new) if old + new else 0.0,
    }


def best(found: Sequence[Scores], base: Scores, choice: Choice) -> int:
    """Index of the setting to take, by its scores on validation scenes; the first of equals.

    ``h_mean`` takes the best harmonic mean of old and new tasks. ``held`` takes the best mean of
    new tasks among those that keep ``HELD`` of the base model's old tasks, and what keeps most
    where none does.
    """
    known = [figures(scores, base) for scores in found]

    def rank(at: int) -> tuple[bool, float]:
        if choice == "h_mean":
            return True, known[at]["h_mean"]
        held = known[at]["kept"] >= 100 * HELD
        return held, known[at]["new" if held else "kept"]

    return max(range(len(known)), key=rank)


def measure(bench: Bench, rows: Mapping[str, Row], seed: int, report: Report) -> Iterator[Line]:
    """Choose and test every row, at each density and over all of its settings."""
    base = bench.scores(bench.base, "validation")
    shown = bench.scores(bench.base, "test")
    for name, row in rows.items():
        found = [bench.scores(row.make(bench, hyper), "validation") for hyper in row.grid]
        tested: dict[int, tuple[float, Scores]] = {}
        for density in (0.0, *DENSITIES):
            among = [at for at, one in enumerate(row.grid) if density in (0.0, one.get("density"))]
            for choice in get_args(Choice) if among else ():
                at = among[best([found[one] for one in among], base, choice)]
                if at not in tested:
                    state = row.make(bench, row.grid[at])
                    tested[at] = bench.changed(state), bench.scores(state, "test")
                setting = json.dumps(dict(row.grid[at]), sort_keys=True)
                line = Line(name, density, choice, seed, setting, *tested[at])
                report(_said(line, shown))
                yield line


def run(
    work: Path, group: str, seed: int, rows: Sequence[str], report: Report = print
) -> Iterator[Line]:
    """Train what is missing under ``work``, and measure the rows of these names for one seed.

    A row of a fine-tune that does not belong to the group is left out.
    """
    made = {one.finetuning.task: one.make(work, 0, seed, report) for one in GROUPS[group]}
    tuned = {task: pair[1] for task, pair in made.items()}
    names = [
        name
        for name in rows
        if not name.startswith("tuned-") or name.removeprefix("tuned-") in made
    ]
    with tempfile.TemporaryDirectory(dir=work, prefix="stitching-") as folder:
        bench = Bench(next(iter(made.values()))[0], tuned, seed, Path(folder))
        yield from measure(bench, {name: ROWS[name] for name in names}, seed, report)


def save(lines: Sequence[Line], path: Path, command: str) -> None:
    """Write a CSV line each, below a remark that names what made them.

    A file keeps what it has of other rows and seeds, and the remarks of other commands.
    """
    facts = "; ".join(f"{name} {value}" for name, value in machine().items())
    remarks, new = [f"# {command}; {facts}"], {(line.row, line.seed) for line in lines}
    if path.exists():
        lines = [*(line for line in load(path) if (line.row, line.seed) not in new), *lines]
        earlier = path.read_text(encoding="utf-8").splitlines()
        remarks = [
            text
            for text in earlier
            if text.startswith("#") and text.partition(";")[0] != f"# {command}"
        ] + remarks
    order, tasks = list(ROWS), list(lines[0].scores)
    with path.open("w", newline="", encoding="utf-8") as file:
        file.writelines(f"{remark}\n" for remark in remarks)
        table = csv.writer(file, lineterminator="\n")
        table.writerow([*_LINE, *tasks])
        for line in sorted(lines, key=lambda one: (order.index(one.row), *one[1:4])):
            scores = [f"{line.scores[task]:.2f}" for task in tasks]
            table.writerow([*line[:5], f"{line.changed:.6f}", *scores])


def load(path: Path) -> list[Line]:
    """Read them back."""
    with path.open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(text for text in file if not text.startswith("#"))
        tasks = [name for name in table.fieldnames or () if name not in _LINE]
        return [
            Line(
                line["row"],
                float(line["density"]),
                line["choice"],
                int(line["seed"]),
                line["setting"],
                float(line["changed"]),
                {task: float(line[task]) for task in tasks},
            )
            for line in table
        ]


def spreads(lines: Sequence[Line], row: str, density: float, choice: str) -> dict[str, Spread]:
    """Mean and deviation over seeds of a row's ``figures``, and of ``changed`` in percent."""
    base = {line.seed: line.scores for line in lines if line.row == "base"}
    each = [
        {**figures(line.scores, base[line.seed]), "changed": 100 * line.changed}
        for line in lines
        if (line.row, line.density, line.choice) == (row, density, choice)
    ]
    return {name: Spread.of([one[name] for one in each]) for name in (each[0] if each else ())}


def _said(line: Line, base: Scores) -> str:
    values = (f"{name} {value:.1f}" for name, value in figures(line.scores, base).items())
    what = f"seed {line.seed} {line.row} {line.density:g} {line.choice}"
    return f"{what}: {', '.join(values)} {line.setting}"


def main() -> None:
    """Parse the command line, run, write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.stitching")
    parser.add_argument("--work", type=Path, default=Path("build/quality"))
    parser.add_argument("--tasks", choices=GROUPS, default="two")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME")
    parser.add_argument("--out", type=Path, help="table; default: the committed one")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    command = command_line("benchmarks.quality.stitching")
    out = arguments.out or OUT[arguments.tasks]
    for seed in arguments.seeds:
        lines = run(arguments.work, arguments.tasks, seed, arguments.rows)
        for _, row in groupby(lines, key=lambda line: line.row):
            save(list(row), out, command)


if __name__ == "__main__":
    main()
