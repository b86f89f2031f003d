"""Several fine-tunes in one model: published rules by hand, choices, and one real run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.quality import (
    stitching,
    stitching_rows,
    stitching_rules,
    stitching_table,
    training,
)
from benchmarks.quality.scenes import OLD_TASKS
from benchmarks.quality.stitching import Line
from benchmarks.quality.stitching_rows import GROUPS, ROWS, Bench
from tests.benchmarks.quality.conftest import INSTANT

TASKS = ("code", "next")


def _state(*values: float) -> dict[str, torch.Tensor]:
    return {"a": torch.tensor(values[:-2]), "b": torch.tensor(values[-2:]), "c": torch.ones(2)}


ZERO = _state(0, 0, 0, 0)
ONE = _state(4, -1, 2, 0)
TWO = _state(2, 3, -1, 0)


def _values(state: dict[str, torch.Tensor]) -> list[float]:
    assert state["c"] is ZERO["c"]
    return torch.cat([state["a"], state["b"]]).tolist()


def test_dense_rules() -> None:
    assert _values(stitching_rules.task_arithmetic(ZERO, [ONE, TWO], 0.5)) == [3, 1, 0.5, 0]
    assert _values(stitching_rules.magmax(ZERO, [ONE, TWO], 0.5)) == [2, 1.5, 1, 0]
    base = _state(1, 1, 1, 1)
    moved = [{name: state[name] + base[name] for name in "ab"} for state in (ONE, TWO)]
    merged = stitching_rules.magmax(base, [{**one, "c": base["c"]} for one in moved], 1.0)
    assert merged["a"].tolist() == [5, 4]
    assert _values(stitching_rules.magmax(ZERO, [ONE, _state(-5, 0, 0, 1)], 1.0)) == [-5, -1, 2, 1]


def test_ties_trims_elects_and_averages_what_agrees() -> None:
    # All kept: the signs of the sums are + + + 0; only those that agree are averaged.
    assert _values(stitching_rules.ties(ZERO, [ONE, TWO], 1.0, 1.0)) == [3, 3, 2, 0]
    # Half kept: 4 . 2 . and 2 3 . .
    assert _values(stitching_rules.ties(ZERO, [ONE, TWO], 0.5, 2.0)) == [6, 6, 4, 0]
    # A quarter kept: 4 and 3.
    assert _values(stitching_rules.ties(ZERO, [ONE, TWO], 0.25, 1.0)) == [4, 3, 0, 0]


def test_dare_ties_drops_apart_and_rescales() -> None:
    base = {"a": torch.zeros(4000)}
    tuned = [{"a": torch.ones(4000)}, {"a": torch.full((4000,), 2.0)}]
    merged = stitching_rules.dare_ties(base, tuned, 0.25, 1.0, 0)["a"]
    shares = {value: (merged == value).double().mean().item() for value in (0.0, 4.0, 8.0, 6.0)}
    expected = {0.0: 9 / 16, 4.0: 3 / 16, 8.0: 3 / 16, 6.0: 1 / 16}
    assert sum(shares.values()) == pytest.approx(1.0)
    for value, share in expected.items():
        assert abs(shares[value] - share) < 5 * (share * (1 - share) / 4000) ** 0.5
    everything = stitching_rules.dare_ties(ZERO, [ONE, TWO], 1.0, 1.0, 0)
    assert _values(everything) == _values(stitching_rules.ties(ZERO, [ONE, TWO], 1.0, 1.0))
    assert not torch.equal(merged, stitching_rules.dare_ties(base, tuned, 0.25, 1.0, 1)["a"])


@pytest.mark.parametrize("density", [0.5, 0.75, 1.0])
def test_pcb_by_hand(density: float) -> None:
    def within(size: float, largest: float) -> float:
        return float(torch.tensor(2 * (size / largest) ** 2).exp())

    def scores(own: list[float], total: list[float]) -> list[float]:
        largest = max(abs(value) for value in own)
        pairs = zip(own, total, strict=True)
        return [within(abs(x), largest) * float(torch.tensor(x * y).tanh()) for x, y in pairs]

    one, two = [0.4, -0.1, 0.2, 0.0], [0.2, 0.3, -0.1, 0.0]
    total = [x + y for x, y in zip(one, two, strict=True)]
    weights = []
    for own in (one, two):
        score = scores(own, total)
        least = sorted(score)[-int(4 * density)]  # what is below counts nothing
        weights.append([(max(s, least) - least) / (max(score) - least) for s in score])
    expected = []
    for x, y, a, b in zip(one, two, *weights, strict=True):
        expected.append((a * x + b * y) / (a + b) if a + b else 0.0)
    merged = stitching_rules.pcb(ZERO, [_state(*one), _state(*two)], density, 1.0)
    assert _values(merged) == pytest.approx(expected, rel=1e-5)
    assert sum(value != 0 for value in expected) >= 1


def _scores(old: float, one: float, two: float) -> dict[str, float]:
    return dict.fromkeys(OLD_TASKS, old) | dict(zip(TASKS, (one, two), strict=True))


def test_figures() -> None:
    found = stitching.figures(_scores(60, 20, 60), _scores(80, 0, 0))
    assert found["old"] == 60
    assert found["new"] == 40
    assert found["kept"] == 75
    assert found["mean"] == pytest.approx((5 * 60 + 80) / 7)
    assert found["h_mean"] == pytest.approx(48)
    assert stitching.figures(_scores(0, 0, 0), _scores(80, 0, 0))["h_mean"] == 0


def test_each_choice_takes_its_own() -> None:
    base = _scores(100, 0, 0)
    found = [_scores(99, 10, 10), _scores(97, 30, 20), _scores(96.9, 90, 80), _scores(98, 30, 20)]
    assert stitching.best(found, base, "held") == 1
    assert stitching.best(found, base, "h_mean") == 2
    lopsided = [_scores(10, 100, 100), _scores(90, 60, 60)]
    assert stitching.best(lopsided, base, "h_mean") == 1
    assert stitching.best([_scores(50, 90, 90), _scores(60, 1, 1)], base, "held") == 1


def test_rows_run_on_checkpoints_and_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stitching_rows, "PROMPTS", {"validation": 10, "test": 10})
    monkeypatch.setattr(stitching_rows, "NEW_SAMPLES", 8)
    monkeypatch.setattr(stitching_rows, "OLD_SAMPLES_PER_TASK", 4)

    def quiet(_line: str) -> None:
        pass

    base = training.make_base(tmp_path / "base", INSTANT.pretraining, quiet)
    tuned = {
        task: training.make_tuned(
            base, tmp_path / task, replace(INSTANT.finetuning, task=task), quiet
        )
        for task in TASKS
    }
    bench = Bench(base, tuned, 0, tmp_path)
    names = ("base", "tuned-next", "patches-sum", "surrogate", "joint-union", "refit-best-retain")
    rows = {name: replace(ROWS[name], grid=ROWS[name].grid[:1]) for name in names}
    lines = list(stitching.measure(bench, rows, 0, quiet))
    assert len(lines) == 2 * (2 + 2 * 4)  # two choices; dense rows, and sparse ones at one density
    shares = {(line.row, line.density): line.changed for line in lines}
    assert shares["base", 0.0] == 0
    assert shares["tuned-next", 0.0] > 0.9
    assert 0.04 < shares["refit-best-retain", 0.05] <= 0.05
    assert 0.05 < shares["joint-union", 0.05] <= 0.1
    assert shares["surrogate", 0.05] == pytest.approx(shares["patches-sum", 0.05], abs=2e-3)
    states = {name: row.make(bench, row.grid[0]) for name, row in rows.items()}
    changed = [
        name for name in bench.base if bool((states["surrogate"][name] != bench.base[name]).any())
    ]
    weight = changed[0]
    assert not torch.equal(states["surrogate"][weight], states["patches-sum"][weight])

    path = tmp_path / "found.csv"
    stitching.save([line._replace(seed=seed) for line in lines for seed in (0, 1)], path, "one")
    more = [line._replace(seed=1, setting="{}") for line in lines]
    stitching.save(more, path, "two")
    again = stitching.load(path)
    assert again[::2] == [_rounded(line) for line in lines]
    assert again[1::2] == [_rounded(line) for line in more]
    remarks = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert [remark.split(";")[0] for remark in remarks] == ["# one", "# two"]
    spread = stitching.spreads(again, "tuned-next", 0.0, "held")
    assert spread["changed"].mean == pytest.approx(100 * shares["tuned-next", 0.0], abs=1e-3)


def test_four_fine_tunes_are_four_tasks_and_none_of_the_others_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stitching_rows, "PROMPTS", {"validation": 5, "test": 5})
    instant = {
        name: tuple(replace(one, pretraining=INSTANT.pretraining) for one in group)
        for name, group in GROUPS.items()
    }
    short = {
        name: tuple(replace(one, finetuning=replace(one.finetuning, steps=2)) for one in group)
        for name, group in instant.items()
    }
    monkeypatch.setattr(stitching, "GROUPS", short)

    def quiet(_line: str) -> None:
        pass

    rows = ("base", "tuned-next", "tuned-mirror")
    four = list(stitching.run(tmp_path, "four", 0, rows, quiet))
    assert [line.row for line in four[::2]] == list(rows)
    assert stitching.new_tasks(four[0].scores) == ["code", "next", "twice", "mirror"]
    two = list(stitching.run(tmp_path, "two", 0, rows, quiet))
    assert [line.row for line in two[::2]] == list(rows[:2])
    found = stitching.figures(four[0].scores, four[0].scores)
    assert found["mean"] == pytest.approx(sum(four[0].scores.values()) / 9)


def _rounded(line: Line) -> Line:
    scores = {task: round(value, 2) for task, value in line.scores.items()}
    return line._replace(changed=round(line.changed, 6), scores=scores)


def test_every_method_has_a_name_on_the_page() -> None:
    assert set(stitching_table.NAMES) == set(ROWS)
