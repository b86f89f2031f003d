"""A table's first line names its command, and not where files lay."""

from pathlib import Path

import pytest

from benchmarks.quality.cells import COLUMNS, Cell, Key, Store
from benchmarks.quality.commands import command_line, fill_table, read_cells
from benchmarks.quality.evaluation import Scores
from benchmarks.results import ROOT


@pytest.mark.parametrize(
    "given",
    [
        ["--rows", "a b", "--out", "somewhere", "--seeds", "0"],
        ["--work=else where", "--rows", "a b", "--seeds", "0", "--out=somewhere"],
        ["--rows", "a b", "--seeds", "0", "--out"],
    ],
)
def test_places_are_no_part_of_a_command(given: list[str]) -> None:
    assert command_line("one.module", given) == "python -m one.module --rows 'a b' --seeds 0"


def test_the_programs_own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["program", "--rows", "dare"])
    assert command_line("m") == "python -m m --rows dare"


def test_no_table_says_where_it_lay() -> None:
    tables = list((ROOT / "results").rglob("*.csv"))
    assert tables
    for path in tables:
        remarks = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert not [line for line in remarks if "--out" in line or "--work" in line], path


def test_a_table_is_filled_from_what_a_run_yields(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = Key("hard-code", 0, 2, "defaults", 0.1, "", "validation", "abc")
    asked: list[object] = []

    def run(work: Path, names: list[str], seeds: list[int], store: Store) -> list[Cell]:
        asked.extend([work, names, seeds, store.cells()])
        return [Cell(key, Scores(dict.fromkeys(COLUMNS[8:13], 50.0), 25.0), 0.1, 4, 0.5, 6, "c0")]

    given = ["--protocols", "hard-code", "--seeds", "2"]
    table = tmp_path / "some" / "table.csv"
    places = ["--work", str(tmp_path), "--out", str(table)]
    monkeypatch.setattr("sys.argv", ["program", *given, *places])
    fill_table("tried", Path("never.csv"), "code", run)  # type: ignore[arg-type]  # lists alone
    assert asked == [tmp_path, ["hard-code"], [2], []]
    assert [cell.key for cell in read_cells(table)] == [key]
    first = table.read_text().splitlines()[0]
    assert first.startswith(f"# python -m benchmarks.quality.tried {' '.join(given)}; commit ")
    assert (tmp_path / "tried-cells.csv").exists()
