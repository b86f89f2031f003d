"""Tasks in turn: each arm goes on from its own last model, and the figures are the literature's."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.quality import sequence
from benchmarks.quality.sequence import ARMS, Accuracy
from benchmarks.quality.training import Pair
from tests.benchmarks.quality.conftest import INSTANT


def test_average_and_transfer() -> None:
    table = {
        "what": (90.0, 80.0, 60.0, 50.0),
        "code": (0.0, 88.0, 70.0, 68.0),
        "next": (1.0, 2.0, 96.0, 90.0),
        "twice": (0.0, 0.0, 0.0, 94.0),
    }
    found = [
        Accuracy(ARMS[0], 3, stage, task, value)
        for task, values in table.items()
        for stage, value in enumerate(values)
    ]
    other = Accuracy(ARMS[1], 3, 0, "what", 1.0)
    figures = sequence.figures([*found, other], ARMS[0], 3)
    assert figures["old"] == 50.0
    assert figures["average"] == pytest.approx((68 + 90 + 94) / 3)
    assert figures["transfer"] == pytest.approx(((68 - 88) + (90 - 96)) / 2)


def test_both_ways_start_alike_and_go_on_from_their_own(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequence, "PROMPTS", {"test": 20})
    monkeypatch.setattr(sequence, "NEW_SAMPLES", 8)
    monkeypatch.setattr(sequence, "OLD_SAMPLES_PER_TASK", 4)
    kept: list[tuple[str, tuple[str, ...]]] = []
    original = sequence._repaired

    def recorded(before, tuned, task, known, folder):
        kept.append((before.folder.name, tuple(known)))
        return original(before, tuned, task, known, folder)

    monkeypatch.setattr(sequence, "_repaired", recorded)
    stages = [replace(INSTANT.finetuning, task=task) for task in ("code", "next")]
    found = sequence.run(tmp_path, pair.base, stages, 0, lambda _line: None)
    first = [[a.percent for a in found if (a.arm, a.stage) == (arm, 0)] for arm in ARMS]
    assert first[0] == first[1]
    assert len(found) == 2 * 3 * 7
    assert kept[0] == ("base", sequence.OLD_TASKS)
    assert kept[1] == ("sequence-0-1-1-repaired", (*sequence.OLD_TASKS, "code"))
    sequence.save(found, tmp_path / "found.csv")
    again = sequence.load(tmp_path / "found.csv")
    assert [a[:4] for a in again] == [a[:4] for a in found]
