"""Cells are kept, choices are made on validation scenes, tables say what the cells say."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.quality import __main__ as command
from benchmarks.quality import bench, page, picture, protocols, report, rows, runner
from benchmarks.quality.cells import Cell, Key, Store, from_line, read, to_line
from benchmarks.quality.evaluation import Scores
from benchmarks.quality.protocols import PROTOCOLS, Protocol
from benchmarks.quality.rows import ROWS
from benchmarks.quality.runner import Plan, Runner
from tests.benchmarks.quality.conftest import QUICK

OLD = ("what", "parity", "larger", "list", "exists")


def cell(row: str, old: float, new: float, *, seed: int = 0, density: float = 1.0) -> Cell:
    key = Key("hard-next", 0, seed, row, density, '{"a": 1}', "test", "abc")
    scores = Scores(dict.fromkeys(OLD, old), new)
    return Cell(key, scores, 0.1, 4000, 0.5, 1 << 20, "c0ffee")


ANCHORS = [
    cell("base", 90.0, 0.0),
    cell("tuned", 50.0, 80.0),
    cell("base", 90.0, 0.0, seed=1),
    cell("tuned", 60.0, 100.0, seed=1),
]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> str:
    """A protocol of seconds; its old tasks are two."""
    protocol = Protocol("quick", "quick", QUICK.pretraining, QUICK.finetuning)
    monkeypatch.setitem(PROTOCOLS, "quick", protocol)
    monkeypatch.setattr(protocols, "NEW_SAMPLES", 32)
    monkeypatch.setattr(bench, "NEW_SAMPLES", 32)
    monkeypatch.setattr(bench, "OLD_SAMPLES_PER_TASK", 16)
    monkeypatch.setattr(bench, "PROMPTS", {"validation": 30, "test": 60})
    return "quick"


@pytest.fixture
def plan(quick: str) -> Plan:
    chosen = ("base", "tuned", "wise-ft", "magnitude", "fisher", "obs", "default-retain")
    return Plan((quick,), (QUICK.pretraining.seed,), (QUICK.finetuning.seed,), chosen, (0.1,))


def test_a_run_measures_chooses_and_goes_on(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "cells.csv", "code", "c0ffee")
    said: list[str] = []
    cells = Runner(tmp_path, store, said.append).run(plan)
    found = {cell.key.row: cell for cell in cells}
    assert list(found) == list(plan.rows)
    assert found["base"].changed == 0
    assert found["base"].patch_bytes == 0
    assert found["tuned"].changed == 1
    for row in ("magnitude", "fisher", "obs", "default-retain"):
        assert found[row].changed == pytest.approx(0.1, abs=0.01)
        assert found[row].key.density == 0.1
    assert found["default-retain"].scores.new > 50 > 20 > found["base"].scores.new
    assert found["obs"].peak_bytes > found["obs"].patch_bytes
    assert {cell.commit for cell in cells} == {"c0ffee"}
    validated = [c for c in store.cells() if c.key.row == "wise-ft" and c.key.split == "validation"]
    best = max(validated, key=lambda cell: cell.scores.h_mean)
    assert len(validated) == len(ROWS["wise-ft"].grid)
    assert found["wise-ft"].key.setting == best.key.setting

    monkeypatch.setattr(runner, "Bench", None)  # nothing is left to measure
    before = (tmp_path / "cells.csv").read_bytes()
    again = Runner(tmp_path, Store(tmp_path / "cells.csv", "code", "c0ffee"), said.append).run(plan)
    assert again == cells
    assert (tmp_path / "cells.csv").read_bytes() == before


def test_cells_of_other_code_and_broken_lines_are_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "cells.csv"
    store = Store(path, "one", "c0ffee")
    measured = ANCHORS[1]
    result = bench.Result(measured.scores, 0.1, 4000, 0.5, 1 << 20)
    assert store.add(measured.key, result) == measured
    assert Store(path, "one", "c0ffee").get(measured.key) == measured
    assert Store(path, "two", "c0ffee").get(measured.key) is None
    with path.open("a") as file:
        file.write("hard-next,0,0,ba")
    store = Store(path, "one", "c0ffee")
    store.add(ANCHORS[0].key, result)
    again = Store(path, "one", "c0ffee")
    assert again.get(measured.key) == measured
    assert again.get(ANCHORS[0].key) is not None
    assert len(again.cells()) == 2


def test_a_cell_is_read_back_as_it_was_written() -> None:
    line = {name: str(value) for name, value in to_line(ANCHORS[0], "code").items()}
    assert from_line(line) == ANCHORS[0]


def test_a_summary_is_the_mean_over_pairs_against_their_own_anchors() -> None:
    cells = [
        *ANCHORS,
        cell("dare", 60.0, 40.0, density=0.1),
        cell("dare", 80.0, 60.0, seed=1, density=0.1),
    ]
    line = report.summarise(cells)[-1]
    spreads = line.spreads
    assert (line.row, line.density, line.count) == ("dare", 0.1, 2)
    assert spreads["old"].mean == 70.0
    assert spreads["old"].deviation == pytest.approx(200**0.5)
    assert spreads["new_kept"].mean == pytest.approx((50.0 + 60.0) / 2)
    assert spreads["old_kept"].mean == pytest.approx(100 * (60 / 90 + 80 / 90) / 2)
    assert spreads["h_mean"].mean == pytest.approx((48.0 + 2 * 80 * 60 / 140) / 2)
    assert spreads["mean_of_tasks"].mean == pytest.approx(((300 + 40) / 6 + (400 + 60) / 6) / 2)
    assert spreads["mean_of_old_and_new"].mean == pytest.approx(60.0)
    assert line.settings == ('{"a": 1}',)


def test_kept_shares_need_their_anchors() -> None:
    assert "old_kept" not in report.summarise([cell("dare", 60.0, 40.0)])[0].spreads


def test_tables_are_written_and_read_back(tmp_path: Path) -> None:
    cells = [*ANCHORS, cell("dare", 60.0, 40.0, density=0.1)]
    report.write(cells, tmp_path / "new", "python -m something")
    first = (tmp_path / "new" / "hard-next.csv").read_text().splitlines()[0]
    assert first.startswith("# python -m something; commit ")
    assert set(map(repr, report.measured(tmp_path / "new"))) == set(map(repr, cells))
    summary = list(read(tmp_path / "new" / report.SUMMARY))
    assert [line["row"] for line in summary] == ["base", "tuned", "dare"]
    assert summary[2]["old_mean"] == "60.0000"
    assert "dare" in report.text(report.summarise(cells))


def test_a_file_keeps_what_another_command_of_the_same_code_put_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [cell("dare", 60.0, 40.0, density=0.1), cell("dare", 50.0, 40.0, density=0.05)]
    for name, cells in (("one", ANCHORS), ("two", more[:1]), ("two", more)):
        report.write(cells, tmp_path, name)
    assert report.measured(tmp_path) == [
        ANCHORS[0],
        ANCHORS[2],
        ANCHORS[1],
        ANCHORS[3],
        *more[::-1],
    ]
    lines = (tmp_path / "hard-next.csv").read_text().splitlines()
    assert [line.split(";")[0] for line in lines if line[0] == "#"] == ["# one", "# two"]
    other = replace(more[0], key=replace(more[0].key, setting='{"another": "choice"}'))
    report.write([other], tmp_path, "two")
    assert report.measured(tmp_path)[-1] == other
    assert len(report.measured(tmp_path)) == 6
    monkeypatch.setattr(report, "code_version", lambda: "other")
    report.write(more, tmp_path, "three")
    assert report.measured(tmp_path) == more[::-1]


def test_the_page_is_current() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.render()


def test_the_page_has_a_picture_of_every_protocol(tmp_path: Path) -> None:
    lines = report.summarise(report.measured(page.RESULTS))
    for protocol in {line.protocol for line in lines}:
        assert (page.PICTURES / f"quality-{protocol}.png").exists()
        path = tmp_path / f"{protocol}.png"
        picture.trade_off([line for line in lines if line.protocol == protocol], path)
        assert path.read_bytes()[:4] == b"\x89PNG"


def test_every_method_has_a_name_on_the_page() -> None:
    assert set(page.NAMES) == {name for name, row in ROWS.items() if row.kind != "curve"}


def test_the_command_line_replaces_parts_of_a_plan() -> None:
    parse = command.parser().parse_args
    assert command.plan_of(parse([])) == command.PLANS["quick"]
    plan = command.plan_of(parse(["--plan", "full", "--rows", "base", "--densities", "0.2"]))
    assert plan == replace(command.PLANS["full"], rows=("base",), densities=(0.2,))


@pytest.mark.parametrize("density", ["0", "1.5"])
def test_a_density_outside_its_range_is_refused(
    density: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.parser().parse_args(["--densities", density])
    assert f"must be in (0, 1]; got {density}" in capsys.readouterr().err


def test_a_grid_has_every_combination_once() -> None:
    for row in ROWS.values():
        texts = [str(sorted(hyper.items())) for hyper in row.grid]
        assert len(set(texts)) == len(texts) > 0
    assert rows.ROWS["dare"].grid[0] == {"seed": 0, "scale": 0.4}
