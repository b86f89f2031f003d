"""The page on performance is what the tables say."""

from pathlib import Path

from benchmarks import performance
from benchmarks.results import CPU


def test_the_page_is_current() -> None:
    assert performance.PAGE.read_text() == performance.render()


def test_every_table_of_results_has_its_place() -> None:
    made = {path.name for path in CPU.glob("*.csv")}
    assert made <= {table.file for table in performance.TABLES}


def test_a_table_that_was_not_made_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "gram.csv").write_text((CPU / "gram.csv").read_text())
    page = performance.render(tmp_path)
    assert "### Grams" in page
    assert "### Decorating" not in page
    assert "nan" not in page
