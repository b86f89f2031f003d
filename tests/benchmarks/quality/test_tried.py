"""What was tried for the goals: exchanges against all there are, the tables' arithmetic."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.quality import bench, exchanges, tried, tried_table
from benchmarks.quality.cells import Cell, Key, Store
from benchmarks.quality.commands import read_cells, write_cells
from benchmarks.quality.evaluation import Scores
from benchmarks.quality.protocols import PROTOCOLS, Protocol
from benchmarks.quality.scenes import OLD_TASKS
from tailor_fast import Recipe
from tailor_fast.patching import forgetting, refit, solving
from tailor_fast.patching.equations import System
from tailor_fast.patching.recipe import MEASURED_RETAIN
from tailor_fast.patching.report import LinearReport
from tests.benchmarks.quality.conftest import INSTANT


def quiet(_line: str) -> None:
    """Nothing is printed."""


def problem(cols: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A Gram of dependent inputs and a right-hand side."""
    made = torch.Generator().manual_seed(seed)
    inputs = torch.randn(cols + 3, cols, generator=made, dtype=torch.float64)
    gram = inputs.t() @ inputs + 0.1 * torch.eye(cols, dtype=torch.float64)
    return gram, torch.randn(cols, generator=made, dtype=torch.float64)


def least(gram: torch.Tensor, wanted: torch.Tensor, kept: torch.Tensor) -> float:
    """The minimum of ``p' A p - 2 b' p`` over patches on a mask."""
    places = kept.nonzero()[:, 0]
    patch = torch.linalg.solve(gram[places][:, places], wanted[places])
    return -float(wanted[places] @ patch)


def neighbours(kept: torch.Tensor) -> list[torch.Tensor]:
    """Every mask that is one exchange away."""
    found = []
    for out in kept.nonzero()[:, 0]:
        for into in (~kept).nonzero()[:, 0]:
            mask = kept.clone()
            mask[out], mask[into] = False, True
            found.append(mask)
    return found


@pytest.mark.parametrize("seed", range(6))
def test_one_exchange_is_the_best_of_all(seed: int) -> None:
    gram, wanted = problem(9, seed)
    kept = torch.arange(9) < 4
    found = exchanges.exchanged_row(gram, wanted, kept, 1)
    best = min(least(gram, wanted, mask) for mask in [kept, *neighbours(kept)])
    assert least(gram, wanted, found) == pytest.approx(best, rel=1e-12)
    assert int(found.sum()) == 4
    assert kept.tolist() == [True] * 4 + [False] * 5  # left as it was


def test_exchanges_end_where_none_pays() -> None:
    gram, wanted = problem(10, 0)
    found = exchanges.exchanged_row(gram, wanted, torch.arange(10) < 3, 100)
    here = least(gram, wanted, found)
    assert all(least(gram, wanted, mask) >= here - 1e-9 for mask in neighbours(found))
    for mask in (torch.zeros(10, dtype=torch.bool), torch.ones(10, dtype=torch.bool)):
        assert torch.equal(exchanges.exchanged_row(gram, wanted, mask, 5), mask)


@pytest.mark.parametrize("with_rhs", [False, True])
def test_a_refined_mask_lowers_the_loss_that_the_solve_reports(with_rhs: bool) -> None:
    gram, one = problem(12, 1)
    delta = torch.randn(6, 12, generator=torch.Generator().manual_seed(2))
    rhs = (torch.arange(1, 7)[:, None] * one).float() if with_rhs else None
    energy = torch.tensor(1e6, dtype=torch.float64) if with_rhs else None
    system = System(gram.float(), rhs, damping=0.05, target_energy=energy, retain_scale=0.0)
    places = (slice(0, 4), slice(4, 6))
    tiles = [
        refit.Exact(
            delta[place], replace(system, rhs=None if rhs is None else rhs[place]), 1e-6, 200
        )
        for place in places
    ]
    start = torch.zeros(6, 12, dtype=torch.bool)
    start[:, ::4] = True
    refined = exchanges.refined(lambda mask, *_others: mask, 20)(start, tiles)
    assert refined.sum(1).tolist() == start.sum(1).tolist()
    for tile, place in zip(tiles, places, strict=True):
        assert float(tile.solve(refined[place]).loss) < float(tile.solve(start[place]).loss)
        for row in range(len(tile.delta)):  # the problem is the one that is solved
            single = replace(tile, delta=tile.delta[row : row + 1], system=replace(
                tile.system, rhs=None if rhs is None else rhs[place][row : row + 1]))  # fmt: skip
            mask = refined[place][row : row + 1]
            here = float(single.solve(mask).loss)
            others = [float(single.solve(one[None]).loss) for one in neighbours(mask[0])]
            assert min(others) >= here * (1 - 1e-5)


def test_densities_by_loss_keep_the_whole_and_give_more_to_what_is_left() -> None:
    def line(name: str, cols: int, left: float) -> LinearReport:
        return LinearReport(name, 10, cols, kept=0, loss=left, loss_reverted=1.0)

    lines = [line("a.b", 40, 0.16), line("axb", 20, 0.04), line("c", 30, 1e-8)]
    found = tried.by_loss(lines)
    recipe = Recipe(densities=found)
    of = [recipe.of(line.name).density for line in lines]
    assert of[0] == pytest.approx(2 * of[1])
    assert of[2] == tried.DENSITY / 4
    kept = sum(share * line.cols for share, line in zip(of, lines, strict=True))
    assert kept == pytest.approx(tried.DENSITY * 90)


def cell(protocol: str, seed: int, row: str, old: float, new: float, seconds: float) -> Cell:
    key = Key(protocol, 0, seed, row, 0.1, "", "validation", "abc")
    return Cell(key, Scores(dict.fromkeys(OLD_TASKS, old), new), 0.1, 1, seconds, 1, "c0ffee")


def test_the_tables_compare_pair_by_pair() -> None:
    cells = [
        cell("gentle-next", 0, "base", 80.0, 0.0, 0.0),
        cell("gentle-next", 0, "tuned", 40.0, 50.0, 0.0),
        cell("gentle-next", 0, "defaults", 60.0, 40.0, 2.0),
        cell("gentle-next", 0, "by loss", 80.0, 40.0, 5.0),
        cell("gentle-next", 0, "factor 0.2", 40.0, 40.0, 5.0),
        cell("hard-next", 0, "defaults", 70.0, 70.0, 2.0),
        cell("hard-next", 0, "factor 0.2", 80.0, 80.0, 5.0),
    ]
    lines = tried_table.table(cells).splitlines()
    assert lines[0].startswith("|  | `gentle-next`: old kept | new kept | H-mean | change | time |")
    assert lines[2] == ("| **defaults** | 75.0 ± 0.0 | 80.0 ± 0.0 | 48.0 ± 0.0 |  | 1.0 |")
    assert (
        f"| {tried.TRIES['by loss'].title} | 100.0 ± 0.0 | 80.0 ± 0.0 | 53.3 ± 0.0 | +5.3 | 2.5 |"
        in lines
    )
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert tried_table.factors(cells).splitlines() == [
        "| factor | `gentle-next` | `hard-next` | mean |",
        "| ---: | ---: | ---: | ---: |",
        "| 0.2 | 40.0 ± 0.0 | 80.0 ± 0.0 | 60.00 |",
        f"| **{MEASURED_RETAIN}** | 48.0 ± 0.0 | 70.0 ± 0.0 | 59.00 |",
    ]


def test_a_run_is_kept_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    protocol = Protocol("quick", "quick", INSTANT.pretraining, INSTANT.finetuning)
    monkeypatch.setitem(PROTOCOLS, "quick", protocol)
    monkeypatch.setattr(bench, "PROMPTS", {"validation": 6})
    monkeypatch.setattr(tried, "GOALS", ("quick",))
    rows: list[int] = []

    def seen(_gram: object, _wanted: object, kept: torch.Tensor, most: int) -> torch.Tensor:
        rows.append(most)
        return kept

    monkeypatch.setattr(exchanges, "exchanged_row", seen)
    data = tried._data
    monkeypatch.setattr(
        tried, "_data", lambda found, task, _count, seed: data(found, task, 4, seed)
    )
    names = ("factor 0.5", "exchanges", "two passes")
    monkeypatch.setattr(tried, "TRIES", {name: tried.TRIES[name] for name in names})
    path = tmp_path / "cells.csv"
    cells = list(tried.run(tmp_path, ["quick"], [0], Store(path, "code", "c0ffee"), quiet))
    assert [one.key.row for one in cells] == ["base", "tuned", *names]
    changed = {one.key.row: one.changed for one in cells}
    assert (changed.pop("base"), changed.pop("tuned")) == (0.0, 1.0)
    assert all(share == pytest.approx(0.1, abs=0.01) for share in changed.values())
    assert set(rows) == {8}
    left = (vars(forgetting)["MEASURED_RETAIN"], vars(solving)["refit_mask"])
    assert left == (MEASURED_RETAIN, refit.refit_mask)

    monkeypatch.setattr(tried, "Bench", None)  # nothing is left to measure
    assert list(tried.run(tmp_path, ["quick"], [0], Store(path, "code", "c0ffee"), quiet)) == cells
    write_cells(cells, tmp_path / "table.csv", "one command", "code")
    assert read_cells(tmp_path / "table.csv") == cells
