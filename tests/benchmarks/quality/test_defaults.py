"""One choice changed at a time: kept, on validation scenes, compared pair by pair."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.quality import bench, defaults, defaults_table
from benchmarks.quality.cells import Cell, Key, Store
from benchmarks.quality.choices import CHOICES, DEFAULTS, Choice, row, setting
from benchmarks.quality.commands import read_cells, write_cells
from benchmarks.quality.evaluation import Scores
from benchmarks.quality.protocols import PROTOCOLS, Protocol
from benchmarks.quality.scenes import OLD_TASKS
from tailor_fast import Recipe
from tests.benchmarks.quality.conftest import INSTANT

FEW = Choice("few", samples=4)
USUAL = replace(DEFAULTS, samples=8)


def quiet(_line: str) -> None:
    """Say nothing."""


def cell(protocol: str, seed: int, choice: Choice, value: float, retain: bool = True) -> Cell:
    key = Key(protocol, 0, seed, row(retain), 0.1, setting(choice), "validation", "abc")
    scores = Scores(dict.fromkeys(OLD_TASKS, value), value)
    return Cell(key, scores, 0.1, 4000, 0.5, 1 << 20, "c0ffee")


def test_every_departure_is_a_recipe_with_one_choice_or_a_named_one() -> None:
    usual = Recipe().model_dump()
    for choices in CHOICES.values():
        assert choices[0] is DEFAULTS
        assert len({setting(choice) for choice in choices}) == len(choices)
        for choice in choices[1:]:
            changed = Recipe(**choice.changed).model_dump()
            assert changed != usual or choice.samples != DEFAULTS.samples
            assert len(choice.changed) <= 1 or all(
                f"`{name}`" in choice.title for name in choice.changed
            )


def test_a_table_compares_pair_by_pair_and_names_the_worst_protocol() -> None:
    choice = CHOICES[True][1]
    cells = [
        cell("hard-code", 0, DEFAULTS, 80.0),
        cell("hard-code", 1, DEFAULTS, 60.0),
        cell("hard-next", 0, DEFAULTS, 50.0),
        cell("hard-code", 0, choice, 84.0),
        cell("hard-code", 1, choice, 62.0),
        cell("hard-next", 0, choice, 47.0),
        cell("hard-next", 0, choice, 1.0, retain=False),
    ]
    lines = defaults_table.table(cells, retain=True).splitlines()
    assert lines[0] == "|  | `hard-code` | `hard-next` | change | worst |"
    assert lines[2] == "| **defaults** | 70.0 ± 14.1 | 50.0 ± 0.0 |  |  |"
    assert lines[3] == f"| {choice.title} | 73.0 ± 15.6 | 47.0 ± 0.0 | +1.0 | -3.0 |"
    assert len(lines) == 4


def test_a_run_is_kept_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    protocol = Protocol("quick", "quick", INSTANT.pretraining, INSTANT.finetuning)
    monkeypatch.setitem(PROTOCOLS, "quick", protocol)
    monkeypatch.setattr(bench, "PROMPTS", {"validation": 6})
    monkeypatch.setattr(defaults, "CHOICES", {False: (USUAL, FEW), True: (USUAL,)})
    path = tmp_path / "cells.csv"
    cells = list(defaults.run(tmp_path, ["quick"], [0], Store(path, "code", "c0ffee"), quiet))
    assert [(one.key.row, one.key.setting) for one in cells] == [
        ("new data only", '{"samples": 8}'),
        ("new data only", '{"samples": 4}'),
        ("old data", '{"samples": 8}'),
    ]
    assert all(one.changed == pytest.approx(0.1, abs=0.01) for one in cells)
    assert {one.key.split for one in cells} == {"validation"}

    monkeypatch.setattr(defaults, "Bench", None)  # nothing is left to measure
    again = list(defaults.run(tmp_path, ["quick"], [0], Store(path, "code", "c0ffee"), quiet))
    assert again == cells
    write_cells(cells, tmp_path / "table.csv", "one command", "code")
    assert read_cells(tmp_path / "table.csv") == cells
    assert (tmp_path / "table.csv").read_text().startswith("# one command; commit ")


def test_the_samples_of_a_choice_reach_the_solve(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def tailored(base: Any, tuned: Any, new: Any, recipe: Recipe, retain_batches: Any) -> Any:
        seen.append((len(new[0]["input_ids"]), len(retain_batches or ())))
        assert recipe.percdamp == 0.5
        return SimpleNamespace(model=SimpleNamespace(state_dict=dict))

    monkeypatch.setattr(defaults, "tailor_model", tailored)

    found: Any = SimpleNamespace(
        base=None,
        tuned=None,
        old_tasks=("what", "parity"),
        new_task="next",
        family=PROTOCOLS["hard-next"].family,
    )
    choice = Choice("x", {"percdamp": 0.5}, samples=5)
    for retain in (False, True):
        defaults._tailored(found, choice, retain, 0)
    assert seen == [(5, 0), (5, 2)]
