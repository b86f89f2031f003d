"""From cells to tables: mean and deviation over seeds, one line a method."""

import csv
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import transformers

from benchmarks.quality.cells import COLUMNS, Cell, code_version, from_line, read, to_line
from benchmarks.quality.protocols import PROTOCOLS
from benchmarks.quality.rows import ROWS
from benchmarks.results import machine

Pair = tuple[str, int, int]
SUMMARY = "summary.csv"


@dataclass(frozen=True)
class Spread:
    """Mean and sample deviation over pairs of models; the deviation of one value is 0."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least one value."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.deviation:.1f}"


@dataclass(frozen=True)
class Line:
    """One method at one density under one protocol, over all pairs of models.

    Attributes:
        protocol: its name.
        row: the method.
        density: share of the weights that it may change; 1 where it knows none.
        count: pairs of models.
        spreads: by column: accuracies and kept shares in percent, bytes, seconds.
        settings: what was chosen, once each, the most frequent first.
    """

    protocol: str
    row: str
    density: float
    count: int
    spreads: Mapping[str, Spread]
    settings: tuple[str, ...]


# Columns of ``tailor-fast evaluate`` by the names that they have here.
_FIGURES = {
    "old": "old mean",
    "new": "new",
    "h_mean": "H-mean",
    "mean_of_tasks": "mean over tasks",
    "mean_of_old_and_new": "mean of old and new",
    "old_kept": "old kept",
    "new_kept": "new kept",
}


def _values(cell: Cell, base: Cell | None, tuned: Cell | None) -> dict[str, float]:
    ends = (None if end is None else end.scores for end in (base, tuned))
    found = cell.scores.figures(*ends)
    return {
        **{name: found[column] for name, column in _FIGURES.items() if column in found},
        "changed": 100 * cell.changed,
        "patch_bytes": float(cell.patch_bytes),
        "cpu_seconds": cell.cpu_seconds,
        "peak_bytes": float(cell.peak_bytes),
    }


def summarise(cells: Iterable[Cell]) -> list[Line]:
    """Return a line for each protocol, method and density, in the order of the cells.

    Kept shares are those of the same pair's base (old tasks) and fine-tuned model (new task); they
    are left out where these were not measured.
    """
    groups: dict[tuple[str, str, float], list[Cell]] = {}
    anchors: dict[tuple[Pair, str], Cell] = {}
    for cell in cells:
        key = cell.key
        groups.setdefault((key.protocol, key.row, key.density), []).append(cell)
        anchors[_pair(cell), key.row] = cell
    lines = []
    for (protocol, row, density), members in groups.items():
        values = [
            _values(cell, anchors.get((_pair(cell), "base")), anchors.get((_pair(cell), "tuned")))
            for cell in members
        ]
        names = [name for name in values[0] if all(name in each for each in values)]
        settings = [cell.key.setting for cell in members]
        lines.append(
            Line(
                protocol,
                row,
                density,
                len(members),
                {name: Spread.of([each[name] for each in values]) for name in names},
                tuple(sorted(set(settings), key=lambda text: (-settings.count(text), text))),
            )
        )
    return lines


def _pair(cell: Cell) -> Pair:
    return cell.key.protocol, cell.key.pretraining_seed, cell.key.finetuning_seed


_SHOWN: Mapping[str, Callable[[Line], str]] = {
    "protocol": lambda line: line.protocol,
    "method": lambda line: line.row,
    "density": lambda line: f"{line.density:g}",
    "old": lambda line: str(line.spreads["old"]),
    "new": lambda line: str(line.spreads["new"]),
    "H-mean": lambda line: str(line.spreads["h_mean"]),
}


def text(lines: Sequence[Line]) -> str:
    """Return the accuracies as aligned text."""
    body = [list(_SHOWN)] + [[cell(line) for cell in _SHOWN.values()] for line in lines]
    widths = [max(map(len, column)) for column in zip(*body, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in body
    )


def _remark(command: str) -> str:
    facts = machine() | {"transformers": transformers.__version__, "cells": code_version()}
    facts["date"] = datetime.now(UTC).date().isoformat()
    return f"# {command}; " + "; ".join(f"{name} {value}" for name, value in facts.items())


def write(cells: Sequence[Cell], folder: Path, command: str) -> None:
    """Write ``<protocol>.csv`` with the test cells, then the summary of all files there.

    A file keeps what other commands put there, as long as the code is the same.

    Args:
        cells: of one run.
        folder: of the tables, made when missing.
        command: what makes the cells again, for the first lines of each file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for protocol in dict.fromkeys(cell.key.protocol for cell in cells):
        path = folder / f"{protocol}.csv"
        chosen = [cell for cell in cells if cell.key.protocol == protocol]
        remarks, chosen = _merged(path, _remark(command), chosen)
        with path.open("w", newline="", encoding="utf-8") as file:
            file.writelines(f"{remark}\n" for remark in remarks)
            table = csv.DictWriter(file, COLUMNS)
            table.writeheader()
            table.writerows(to_line(cell, code_version()) for cell in chosen)
    _write_summary(summarise(measured(folder)), folder / SUMMARY)


def _merged(path: Path, remark: str, cells: Sequence[Cell]) -> tuple[list[str], list[Cell]]:
    """The remarks and cells of a file after a run: what the same code measured before stays.

    A row has one cell for each pair of models and density, whatever setting was chosen.
    """
    merged = {_place(cell): cell for cell in cells}
    remarks = [remark]
    if path.exists():
        before = [from_line(line) for line in read(path) if line["code"] == code_version()]
        if before:
            lines = path.read_text(encoding="utf-8").splitlines()
            command = remark.split(";")[0]
            earlier = [line for line in lines if line.startswith("#")]
            remarks = [line for line in earlier if line.split(";")[0] != command] + remarks
        merged = {_place(cell): cell for cell in before} | merged
    return remarks, [merged[place] for place in sorted(merged)]


def _place(cell: Cell) -> tuple[int, float, int, int]:
    """Where the cell stands in its protocol's file."""
    key = cell.key
    row = list(ROWS).index(key.row)
    return row, key.density, key.pretraining_seed, key.finetuning_seed


def measured(folder: Path) -> list[Cell]:
    """Return the test cells of every file in ``folder``, in the order of ``PROTOCOLS``."""
    files = [folder / f"{protocol}.csv" for protocol in PROTOCOLS]
    return [from_line(line) for path in files if path.exists() for line in read(path)]


def _write_summary(lines: Sequence[Line], path: Path) -> None:
    spreads = list(dict.fromkeys(name for line in lines for name in line.spreads))
    columns = [f"{name}_{what}" for name in spreads for what in ("mean", "deviation")]
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(
            file, [*("protocol", "row", "density", "pairs"), *columns, "settings"]
        )
        table.writeheader()
        for line in lines:
            values: dict[str, Any] = {
                "protocol": line.protocol,
                "row": line.row,
                "density": line.density,
                "pairs": line.count,
                "settings": " | ".join(line.settings),
            }
            for name, spread in line.spreads.items():
                values[f"{name}_mean"] = f"{spread.mean:.4f}"
                values[f"{name}_deviation"] = f"{spread.deviation:.4f}"
            table.writerow(values)
