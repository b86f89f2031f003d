"""Measured cells: one CSV line each, appended as they come, so that a run goes on where it ended.

A cell is one model of one method: protocol, both seeds, row, density, setting and split. Its line
also names the checkpoints, the code of the methods and of their measurement, and the commit of the
whole, library included, that it comes from. A line of other code is no answer; of another commit it
is one.
"""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.quality import baselines, bench, evaluation, rows, sensitivities, sources
from benchmarks.quality.bench import Result
from benchmarks.quality.evaluation import Scores
from benchmarks.quality.scenes import OLD_TASKS


@dataclass(frozen=True)
class Key:
    """Which cell.

    Attributes:
        protocol: its name.
        pretraining_seed: of the base model.
        finetuning_seed: of the fine-tuned one, and of the calibration scenes.
        row: the method.
        density: share of the weights that it may change; 1 where it knows none.
        setting: the method's choice, canonical JSON.
        split: ``validation`` or ``test``.
        made: short digest of the checkpoints.
    """

    protocol: str
    pretraining_seed: int
    finetuning_seed: int
    row: str
    density: float
    setting: str
    split: str
    made: str


@dataclass(frozen=True)
class Cell:
    """One line: the key, then what was measured; accuracies in percent, ``changed`` 0 to 1.

    ``commit`` is what ``git describe --always --dirty`` said then.
    """

    key: Key
    scores: Scores
    changed: float
    patch_bytes: int
    cpu_seconds: float
    peak_bytes: int
    commit: str


KEY_COLUMNS = tuple(field.name for field in fields(Key))
COLUMNS = (
    *KEY_COLUMNS,
    *OLD_TASKS,
    "new",
    "changed",
    "patch_bytes",
    "cpu_seconds",
    "peak_bytes",
    "commit",
    "code",
)


def setting_text(hyper: Mapping[str, Any]) -> str:
    """Return a setting as canonical JSON."""
    return json.dumps(dict(hyper), sort_keys=True)


def code_version() -> str:
    """Return a short digest of the sources that make and measure a cell."""
    return sources.digest((baselines, sensitivities, bench, rows, evaluation))[:12]


def to_line(cell: Cell, code: str) -> dict[str, Any]:
    """Return a cell's columns as they stand in a file."""
    return {
        **asdict(cell.key),
        **{task: f"{value:.2f}" for task, value in cell.scores.old.items()},
        "new": f"{cell.scores.new:.2f}",
        "changed": f"{cell.changed:.6f}",
        "patch_bytes": cell.patch_bytes,
        "cpu_seconds": f"{cell.cpu_seconds:.3f}",
        "peak_bytes": cell.peak_bytes,
        "commit": cell.commit,
        "code": code,
    }


def from_line(line: Mapping[str, str]) -> Cell:
    """Read a cell back."""
    kept = {name: line[name] for name in KEY_COLUMNS}
    key = Key(
        protocol=kept["protocol"],
        pretraining_seed=int(kept["pretraining_seed"]),
        finetuning_seed=int(kept["finetuning_seed"]),
        row=kept["row"],
        density=float(kept["density"]),
        setting=kept["setting"],
        split=kept["split"],
        made=kept["made"],
    )
    old = {task: float(line[task]) for task in OLD_TASKS if line.get(task)}
    return Cell(
        key,
        Scores(old, float(line["new"])),
        float(line["changed"]),
        int(line["patch_bytes"]),
        float(line["cpu_seconds"]),
        int(line["peak_bytes"]),
        line["commit"],
    )


def read(path: Path) -> Iterator[dict[str, str]]:
    """Yield the lines of a file of cells; one that begins with ``#`` is a remark."""
    with path.open(newline="", encoding="utf-8") as file:
        yield from csv.DictReader(line for line in file if not line.startswith("#"))


class Store:
    """The cells of a work folder.

    Args:
        path: the file; made when missing.
        code: digest of the code; lines of another one are passed over.
        commit: of what measures now.
    """

    def __init__(self, path: Path, code: str, commit: str) -> None:
        self._path = path
        self._code = code
        self._commit = commit
        self._cells: dict[Key, Cell] = {}
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, COLUMNS).writeheader()
        elif not path.read_bytes().endswith(b"\n"):
            with path.open("ab") as file:  # a stopped run left a line unfinished; it has no code
                file.write(b"\n")
        for line in read(path):
            if line["code"] == code:
                cell = from_line(line)
                self._cells[cell.key] = cell

    def get(self, key: Key) -> Cell | None:
        """Return a measured cell."""
        return self._cells.get(key)

    def add(self, key: Key, result: Result) -> Cell:
        """Keep a cell, on disk at once."""
        rounded = to_line(Cell(key, **vars(result), commit=self._commit), self._code)
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writerow(rounded)
        cell = from_line({name: str(value) for name, value in rounded.items()})
        self._cells[key] = cell
        return cell

    def cells(self) -> list[Cell]:
        """Return every cell."""
        return list(self._cells.values())
