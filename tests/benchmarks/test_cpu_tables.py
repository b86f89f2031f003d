"""The CPU benchmarks run from end to end, gate included, and write what they say."""

import csv
from pathlib import Path

import pytest
import torch

from benchmarks import cpu_class, cpu_codec, cpu_decorate, cpu_gram
from benchmarks.results import Figure
from tests.backends import needs_native

pytestmark = needs_native

WHO = ("authors", "class")
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
    works = ["authors", "official", "obs", "exact", "exact skewed", "exact loss"]
    assert [row["work"] for row in table] == works
    seconds = {row["work"]: float(row["seconds"]) for row in table}
    ratio = {row["work"]: float(row["ratio"]) for row in table}
    assert ratio["obs"] == pytest.approx(seconds["authors"] / seconds["obs"], rel=2e-3)
    assert ratio["exact skewed"] == pytest.approx(
        seconds["exact"] / seconds["exact skewed"], rel=2e-3
    )
    assert ratio["exact loss"] > 1  # the minimum's loss is the smaller one
    assert [row["floor"] for row in table] == ["nan", "6", "8", "5", "0.5", "1.667"]


def test_codec(tmp_path: Path) -> None:
    path, threads = tmp_path / "codec.csv", torch.get_num_threads()
    cpu_codec.main(["--size", "70000", "--rounds", "1", "--out", str(path)])
    assert torch.get_num_threads() == threads
    with path.open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    check(table)
    assert [row["work"] for row in table] == ["copy", "encode", "apply"] * 3
    assert [row["bar"] for row in table] == ["nan", "nan", "3"] * 3
    assert {row["threads"] for row in table} == {"1"}
    for row in table:
        rate = 2 * 70000 / float(row["seconds"]) / 1e9
        assert float(row["gb_per_s"]) == pytest.approx(rate, rel=2e-3)


def test_codec_refuses_a_patch_that_is_not_exact(monkeypatch) -> None:
    from benchmarks import bench_codec

    monkeypatch.setattr(bench_codec, "apply_patch_", lambda target, patch, *, backend: target)
    with pytest.raises(AssertionError, match="native: not exact"):
        cpu_codec.measure(70000, 0.1, 1)


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


def test_class(tmp_path: Path) -> None:
    path = tmp_path / "class.csv"
    cpu_class.main(["--sizes", "160", "256", "--rounds", "1", "--out", str(path)])
    table = rows(path)
    check(table)
    steps = [(work, name) for work in ("add_batch", "fasterprune", "both") for name in WHO]
    assert [(row["work"], row["provider"]) for row in table] == 2 * steps
    assert [row["shape"].split("x")[0] for row in table] == ["160"] * 6 + ["256"] * 6
    seconds = [float(row["seconds"]) for row in table]
    assert seconds[4] == pytest.approx(seconds[0] + seconds[2], rel=2e-3)
    assert float(table[3]["ratio"]) == pytest.approx(seconds[2] / seconds[3], rel=2e-3)
    assert [row["floor"] for row in table[:6]] == ["nan", "nan", "nan", "6", "nan", "nan"]


def test_the_class_is_not_timed_when_it_is_wrong(tmp_path: Path) -> None:
    base = torch.zeros(100, 100)
    with pytest.raises(SystemExit, match=r"1\.0e-02 of the weights are kept by one of the two"):
        cpu_class.check(base, base + 1, torch.ones(100, 100).index_fill(0, torch.tensor([3]), 0))
