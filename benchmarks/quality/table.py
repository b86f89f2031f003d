"""The demo's result: one row per model, shown as a table, CSV and JSON."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.quality.evaluation import Scores


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        name: what made it.
        scores: its accuracies, percent.
        changed: share of the targeted weights that differ from the base model, 0 to 1.
        changed_all: the same over all parameters.
        seconds: time that making the model took.
        ours: made by tailor_fast.
    """

    name: str
    scores: Scores
    changed: float
    changed_all: float
    seconds: float
    ours: bool = False


def values(row: Row, base: Scores, tuned: Scores) -> dict[str, str | float]:
    """Return the columns of one row in order, percentages and seconds unrounded.

    Args:
        row: the model.
        base: the scores that 100% kept of the old tasks means.
        tuned: the score that 100% kept of the new task means.
    """
    figures = row.scores.figures(base, tuned)
    return {
        "model": row.name,
        **row.scores.old,
        **{name: figures[name] for name in ("old mean", "new", "old kept", "new kept", "H-mean")},
        "changed": 100 * row.changed,
        "changed of all": 100 * row.changed_all,
        "seconds": row.seconds,
    }


def show(rows: Sequence[Row], title: str, console: Console) -> None:
    """Print the table: with colour and rules on a terminal, as aligned text into a pipe.

    The first row is the base model, the second the fine-tuned one.
    """
    cells = [_cells(line) for line in _lines(rows)]
    header = list(cells[0])
    if not console.is_terminal:
        console.out(_plain(title, header, [list(line.values()) for line in cells]), highlight=False)
        return
    table = Table(title=title, header_style="bold", title_style="bold")
    for name in header:
        table.add_column(name, justify="left" if name == "model" else "right")
    for row, line in zip(rows, cells, strict=True):
        table.add_row(*line.values(), style="bold green" if row.ours else None)
    console.print(table)


def save(rows: Sequence[Row], folder: Path) -> None:
    """Write ``results.csv`` and ``results.json``, every figure as measured."""
    lines = _lines(rows)
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    (folder / "results.json").write_text(json.dumps(lines, indent=2) + "\n", encoding="utf-8")


def _lines(rows: Sequence[Row]) -> list[dict[str, str | float]]:
    return [values(row, rows[0].scores, rows[1].scores) for row in rows]


def _cells(line: Mapping[str, str | float]) -> dict[str, str]:
    percent = {"old kept", "new kept", "changed"}
    cells = {}
    for name, value in line.items():
        if name == "changed of all":  # in the files only: the table is wide enough
            continue
        text = value if isinstance(value, str) else f"{value:.1f}"
        cells[name] = f"{text}%" if name in percent else text
    return cells


def _plain(title: str, header: list[str], body: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    lines = [title]
    for row in [header, *body]:
        first = row[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([first, *rest]))
    return "\n".join(lines)
