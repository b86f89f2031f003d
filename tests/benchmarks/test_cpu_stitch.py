"""The benchmark of the joint solve runs from end to end, and refuses to report a bad model."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import pytest

from benchmarks import cpu_stitch
from benchmarks.pairs import Shape
from tailor_fast.cli import main as tailor_fast


def here(*arguments: object) -> cpu_stitch.Run:
    """Run ``tailor-fast`` in this process: a program would import everything each time."""
    began = time.perf_counter()
    if code := tailor_fast([*map(str, arguments), "--quiet"]):
        raise SystemExit(code)
    return cpu_stitch.Run(time.perf_counter() - began, 1 << 20)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(1, 64, 128, 4, 4, 10**8, vocabulary=32000)
    monkeypatch.setitem(cpu_stitch.SHAPES, "tiny", shape)
    monkeypatch.setattr(cpu_stitch, "program", here)
    monkeypatch.setattr(cpu_stitch, "SAMPLES", 2)


def test_from_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "stitch.csv"
    cpu_stitch.main([str(tmp_path / "work"), "--size", "tiny", "--rounds", "1", "--out", str(path)])
    assert not (tmp_path / "work").exists()
    with path.open(newline="", encoding="utf-8") as file:
        rows = {row["work"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["statistics of one", "two patches", "stitch", "stitch, old data"]
    two = float(rows["two patches"]["seconds"])
    for row in rows.values():
        assert row["shape"] == "tiny, 256 tokens a task, bfloat16"
        assert float(row["ratio"]) == pytest.approx(two / float(row["seconds"]), rel=2e-3)
        assert float(row["peak_mib"]) == 1.0


def test_a_model_that_is_no_better_than_the_base_is_not_reported(tmp_path: Path) -> None:
    setting = object.__new__(cpu_stitch.Setting)  # what it makes is not looked at
    setting._folder = tmp_path
    tasks = {"tuned": {"stitched": 0.5, "base": 1.0}, "second": {"stitched": 1.0, "base": 1.0}}
    (tmp_path / "stitched").mkdir()
    report = {"linears": [{"name": "model.q_proj", "tasks": tasks}]}
    (tmp_path / "stitched" / "tailor_report.json").write_text(json.dumps(report))
    with pytest.raises(SystemExit, match=r"stitched: model\.q_proj is no better at second"):
        setting.check()
