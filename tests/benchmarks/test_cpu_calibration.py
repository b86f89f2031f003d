"""The calibration benchmark runs from end to end, and refuses to time a wrong answer."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import cpu_calibration
from benchmarks.pairs import Shape
from tailor_fast.calibration.moments import MomentSums

ARGUMENTS = ["--size", "tiny", "--samples", "8", "--rounds", "1", "--out"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(2, 64, 128, 4, 4, 10**8, vocabulary=100)
    monkeypatch.setitem(cpu_calibration.SHAPES, "tiny", shape)


def test_forward_and_moments_stand_apart(tmp_path: Path) -> None:
    path = tmp_path / "calibration.csv"
    cpu_calibration.main([*ARGUMENTS, str(path)])
    with path.open(newline="", encoding="utf-8") as file:
        plain, walked, moments = csv.DictReader(file)
    assert [row["work"] for row in (plain, walked, moments)] == ["forward", "forward", "moments"]
    assert all(float(row["seconds"]) > 0 for row in (plain, walked, moments))
    ratio = float(plain["seconds"]) / float(walked["seconds"])
    assert float(walked["ratio"]) == pytest.approx(ratio, rel=2e-3)
    assert float(walked["floor"]) == pytest.approx(1 / 1.15, rel=1e-3)
    assert {plain["floor"], moments["ratio"], moments["floor"]} == {"nan"}


def test_a_wrong_gram_is_not_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = MomentSums.add

    def scaled(self: MomentSums, actual, mask, where, target, there) -> None:
        add(self, actual * 1.01, mask, where, target, there)

    monkeypatch.setattr(MomentSums, "add", scaled)
    path = tmp_path / "calibration.csv"
    with pytest.raises(SystemExit, match="its Gram is not that of plain passes"):
        cpu_calibration.main([*ARGUMENTS, str(path)])
    assert not path.exists()
