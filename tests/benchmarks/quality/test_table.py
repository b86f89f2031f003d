"""The table says what was measured, on a terminal, in a pipe and in the files."""

import csv
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.quality import table
from benchmarks.quality.evaluation import Scores
from benchmarks.quality.table import Row

ROWS = [
    Row("base", Scores({"what": 80.0, "list": 60.0}, 0.0), 0.0, 0.0, 12.0),
    Row("fine-tuned", Scores({"what": 40.0, "list": 20.0}, 90.0), 1.0, 0.5, 3.0),
    Row("ours", Scores({"what": 79.0, "list": 54.0}, 81.0), 0.1, 0.05, 1.25, ours=True),
]


def test_values_are_relative_to_the_first_two_rows() -> None:
    line = table.values(ROWS[2], ROWS[0].scores, ROWS[1].scores)
    assert line == {
        "model": "ours",
        "what": 79.0,
        "list": 54.0,
        "old mean": 66.5,
        "new": 81.0,
        "old kept": pytest.approx(95.0),
        "new kept": pytest.approx(90.0),
        "H-mean": pytest.approx(2 * 66.5 * 81 / 147.5),
        "changed": 10.0,
        "changed of all": 5.0,
        "seconds": 1.25,
    }


def test_files_hold_every_row(tmp_path: Path) -> None:
    table.save(ROWS, tmp_path)
    expected = [table.values(row, ROWS[0].scores, ROWS[1].scores) for row in ROWS]
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == expected
    with (tmp_path / "results.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [list(line) for line in lines] == [list(line) for line in expected]
    assert [float(line["H-mean"]) for line in lines] == [line["H-mean"] for line in expected]


def test_a_pipe_gets_aligned_text() -> None:
    file = io.StringIO()
    table.show(ROWS, "Accuracy", Console(file=file, width=40))
    lines = file.getvalue().splitlines()
    assert lines[0] == "Accuracy"
    header = ["model", "what", "list", "old mean", "new", "old kept", "new kept", "H-mean"]
    assert re.split(" {2,}", lines[1]) == [*header, "changed", "seconds"]
    figures = ["79.0", "54.0", "66.5", "81.0", "95.0%", "90.0%", "73.0", "10.0%", "1.2"]
    assert lines[4].split() == ["ours", *figures]
    assert len({len(line) for line in lines[1:]}) == 1  # columns stand under their names
    assert "\x1b" not in file.getvalue()


def test_a_terminal_gets_colours() -> None:
    file = io.StringIO()
    console = Console(file=file, width=140, force_terminal=True, color_system="standard")
    table.show(ROWS, "Accuracy", console)
    text = file.getvalue()
    assert "\x1b[1;32m" in text  # our row
    assert "95.0%" in text
