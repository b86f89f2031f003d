"""The CPU benchmarks run from end to end, gate included, and write what they say."""

import csv
from pathlib import Path

import pytest

from benchmarks import cpu_decorate, cpu_gram
from benchmarks.results import Figure
from tests.backends import needs_native

pytestmark = needs_native

FACTS = ["commit", "date", "torch", "python", "machine", "threads"]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        assert table.fieldnames == [*FACTS, *Figure._fields]
        return list(table)


def check(table: list[dict[str, str]]) -> None:
    for row in table:
        assert all(row.values())
        assert float(row["seconds"]) > 0
        assert float(row["ratio"]) > 0


def test_decorate(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "decorate.csv"
    cpu_decorate.main(["--size", "160", "--rounds", "1", "--out", str(path)])
    table = rows(path)
    check(table)
    works = ["authors", "official", "obs", "exact", "exact skewed"]
    assert [row["work"] for row in table] == works
    seconds = {row["work"]: float(row["seconds"]) for row in table}
    ratio = {row["work"]: float(row["ratio"]) for row in table}
    assert ratio["obs"] == pytest.approx(seconds["authors"] / seconds["obs"], rel=2e-3)
    assert ratio["exact skewed"] == pytest.approx(
        seconds["exact"] / seconds["exact skewed"], rel=2e-3
    )
    assert [row["floor"] for row in table] == ["nan", "6", "8", "5", "0.5"]


def test_gram(tmp_path: Path) -> None:
    path = tmp_path / "gram.csv"
    cpu_gram.main(["--tokens", "300", "--cols", "72", "--rounds", "1", "--out", str(path)])
    table = rows(path)
    check(table)
    works = [(work, name) for work in ("product", "full") for name in ("eager", "native")]
    works += [("diag", "probe"), ("diag", "eager"), ("diag", "native")]
    assert [(row["work"], row["provider"]) for row in table] == works
    from tailor_fast.ops.gemm import has_kernels  # which needs the extension

    floor = "1.5" if has_kernels() else "nan"  # where both are torch's there is nothing to win
    assert [row["floor"] for row in table] == ["nan", floor, "nan", "1.5", "nan", "nan", "0.7"]


def test_a_wrong_result_is_not_timed(monkeypatch) -> None:
    monkeypatch.setattr(cpu_gram, "accumulate_gram_", lambda gram, x, *, backend: gram)
    with pytest.raises(AssertionError):
        cpu_gram.measure(50, 16, 1)
