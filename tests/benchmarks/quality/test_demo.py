"""The demo chooses on validation scenes and runs the command as a user would."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import demo
from benchmarks.demo import Demo
from benchmarks.quality import tinyllava
from benchmarks.quality.training import Pair
from tests.benchmarks.quality.conftest import QUICK

# Stands in for the console script: writes what it was called with, then copies TUNED to OUT.
PROGRAM = """#!/bin/sh
echo "$@" > "$(dirname "$0")/called"
[ "$1" = verify ] || cp -r "$3" "$5"
"""


@pytest.fixture
def ran(pair: Pair, work: Path) -> Demo:
    return Demo(work, QUICK, density=0.1, prompts=100)


def _program(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    path = folder / "tailor-fast"
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))


def test_a_row_is_the_best_candidate_on_validation(ran: Demo) -> None:
    broken = tinyllava.new_model(seed=9)
    candidates = {"broken": broken, "tuned": ran.tuned, "base": ran.base}
    best = ran.row({name: partial(candidates.get, name) for name in candidates})
    assert best is ran.tuned
    ran.row({"broken": lambda: broken})  # no choice
    ran.add("fine-tuned", ran.tuned, 0.0)
    assert [row.name for row in ran.rows] == ["tuned", "broken", "fine-tuned"]
    assert ran.rows[0].scores == ran.rows[2].scores
    assert ran.rows[0].changed == 1


def test_the_command_is_a_users(
    ran: Demo, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _program(tmp_path, monkeypatch, PROGRAM)
    ran.work = tmp_path
    model = ran.tailor("out", "--retain", "old.jsonl")
    called = (tmp_path / "called").read_text(encoding="utf-8").split()
    assert called == [
        *("patch", str(work / "base"), str(work / "tuned"), "-o", str(tmp_path / "out")),
        *("--calibration", str(work / "new.jsonl"), "--density", "0.1"),
        *("--retain", "old.jsonl", "--batch-size", "64", "--overwrite"),
    ]
    tuned = ran.tuned.state_dict()
    assert all(torch.equal(weight, tuned[name]) for name, weight in model.state_dict().items())


def test_a_failing_command_ends_the_demo(
    ran: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _program(tmp_path, monkeypatch, "#!/bin/sh\necho 'no such tensor' >&2\nexit 65\n")
    ran.work = tmp_path
    with pytest.raises(SystemExit, match="tailor-fast ended with 65: no such tensor"):
        ran.tailor("out")


def test_every_row_is_there(
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    pair: Pair,
) -> None:
    _program(tmp_path, monkeypatch, PROGRAM)
    monkeypatch.setattr(demo, "VALIDATION_PROMPTS", 20)
    ran = Demo(work, QUICK, density=0.1, prompts=50)
    ran.work = tmp_path
    ran.run()
    names = [row.name for row in ran.rows]
    assert names[:3] == ["base", "fine-tuned", "magnitude 10%"]
    starts = (
        "DARE 10%, seed ",
        "WiSE-FT 0.",
        "Model Tailor 10%, OBS",
        "tailor_fast 10%",
    )
    assert all(name.startswith(start) for name, start in zip(names[3:], starts, strict=True))
    changed = [row.changed for row in ran.rows]
    assert changed[:2] == [0.0, 1.0]
    assert changed[2] == pytest.approx(0.1, abs=1e-3)
    assert changed[3] == pytest.approx(0.1, abs=0.01)
    assert changed[4] > 0.99
    assert [row.ours for row in ran.rows] == [False] * 6 + [True]
    called = (tmp_path / "called").read_text(encoding="utf-8").split()
    assert called == ["verify", str(tmp_path / "tailored")]
    assert "12 PNG files through AutoProcessor: the same answers" in capsys.readouterr().out


def test_the_table_is_the_last_thing_said(
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    pair: Pair,
    set_num_threads: Callable[[int], None],  # puts back what the demo sets
) -> None:
    arguments = ["--work", str(work), "--density", "0.2", "--task", "next", "--prompts", "10"]
    monkeypatch.setattr(sys, "argv", ["demo", *arguments])
    monkeypatch.setattr(demo.training, "DEMO", QUICK)
    monkeypatch.setitem(demo.training.FINETUNING, "next", QUICK.finetuning)
    monkeypatch.setattr(Demo, "run", _two_rows)
    demo.main()
    title, header, base, tuned = capsys.readouterr().out.splitlines()[-4:]
    assert title == "Accuracy in percent; new task: next"
    assert header.split()[:3] == ["model", "what", "parity"]
    assert base.startswith("base ")
    assert tuned.startswith("fine-tuned ")
    assert (work / "results.csv").exists()


def _two_rows(ran: Demo) -> None:
    assert (ran.density, ran.prompts) == (0.2, 10)
    ran.add("base", ran.base, 0.0)
    ran.add("fine-tuned", ran.tuned, 0.0)


@pytest.mark.parametrize("density", ["0", "1.5", "-1"])
def test_a_density_outside_its_range_is_refused(
    density: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["demo", f"--density={density}"])
    with pytest.raises(SystemExit):
        demo.main()
    assert f"must be in (0, 1]; got {density}" in capsys.readouterr().err
