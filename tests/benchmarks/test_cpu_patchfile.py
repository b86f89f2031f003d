"""The patch file's benchmark runs from end to end, gate included, and writes what it says."""

import csv
from pathlib import Path

import pytest

from benchmarks import cpu_patchfile
from tests.backends import needs_native

pytestmark = needs_native


def test_table(tmp_path: Path) -> None:
    out, work = tmp_path / "patchfile.csv", tmp_path / "work"
    work.mkdir()
    sizes = ("--tensors", "2", "--side", "256", "--rounds", "1")
    cpu_patchfile.main([*sizes, "--work", str(work), "--out", str(out)])
    with out.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    state = "cold" if cpu_patchfile.drops_cache() else "warm"
    works = [(f"{work} {state}", p) for work in ("diff", "apply", "revert") for p in ("dd", "ours")]
    found = [(row["work"], row["provider"].replace("tailor_fast", "ours")) for row in rows]
    assert found == works
    assert all(float(row["seconds"]) > 0 and float(row["ratio"]) > 0 for row in rows)
    assert [row["floor"] for row in rows] == ["nan", "0.85"] * 3
    assert list(work.iterdir()) == []


def test_a_wrong_result_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(base: Path, _patch: Path, out: Path) -> None:
        out.write_bytes(base.read_bytes())

    monkeypatch.setattr(cpu_patchfile, "apply_patch", nothing)
    pair = cpu_patchfile.make_pair(tmp_path, 2, 64)
    with pytest.raises(AssertionError, match="is not that of"):
        cpu_patchfile.check(*pair, tmp_path)
