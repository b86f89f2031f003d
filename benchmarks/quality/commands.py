"""What the commands of this folder share: how they are named in a table, and tables of cells."""

import argparse
import csv
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from benchmarks.quality.cells import COLUMNS, Cell, Store, from_line, read, to_line
from benchmarks.quality.protocols import PROTOCOLS
from benchmarks.results import machine

# Where a table and its models lie is the machine's own affair.
_PLACES = ("--out", "--work")
Run = Callable[[Path, Sequence[str], Sequence[int], Store], Iterable[Cell]]


def command_line(module: str, given: Sequence[str] | None = None) -> str:
    """Return the command that makes a table again, without the places of its files.

    Args:
        module: what ``python -m`` runs.
        given: its arguments; None takes this program's.
    """
    words = iter(sys.argv[1:] if given is None else given)
    kept = []
    for word in words:
        if word in _PLACES:
            next(words, None)
        elif word.partition("=")[0] not in _PLACES:
            kept.append(word)
    return shlex.join(["python", "-m", module, *kept])


def write_cells(cells: Iterable[Cell], path: Path, remark: str, code: str) -> None:
    """Write a line for each cell below one that names what made them.

    Args:
        cells: in order.
        path: the table, replaced.
        remark: the command, and what else there is to say.
        code: digest of what measured them.
    """
    facts = "; ".join(f"{name} {value}" for name, value in machine().items())
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(f"# {remark}; {facts}\n")
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(to_line(cell, code) for cell in cells)


def read_cells(path: Path) -> list[Cell]:
    """Read them back."""
    return [from_line(line) for line in read(path)]


def fill_table(name: str, out: Path, code: str, run: Run) -> None:
    """Parse the command line of ``benchmarks.quality.NAME``, run, and write its table of cells.

    Args:
        name: of the module.
        out: the committed table.
        code: digest of what measures.
        run: yields the cells of a work folder, protocols and fine-tuning seeds.
    """
    module = f"benchmarks.quality.{name}"
    parser = argparse.ArgumentParser(prog=f"python -m {module}")
    parser.add_argument("--work", type=Path, default=Path("build/quality"))
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=out)
    given = parser.parse_args()
    torch.set_num_threads(1)
    store = Store(given.work / f"{name}-cells.csv", code, machine()["commit"])
    cells = list(run(given.work, given.protocols, given.seeds, store))
    write_cells(cells, given.out, command_line(module), code)
