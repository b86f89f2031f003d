"""The file of predictions: it grows, is gone on with, and is never of two things at once."""

from __future__ import annotations

import errno
import fcntl
import json
from pathlib import Path

import pytest

from tailor_fast._core.errors import InputError, OutputError, UsageError
from tailor_fast.evaluation.predictions import PredictionFile

FACTS = {"model": "1234", "data": "5678", "max_new_tokens": 5}


def filled(path: Path) -> bytes:
    with PredictionFile(path, FACTS) as file:
        file.add({0: "yes", 2: "ünï\n"})
        file.add({1: ""})
    return path.read_bytes()


def test_what_was_said_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    content = filled(path)
    assert json.loads(content.splitlines()[0])["facts"] == FACTS
    with PredictionFile(path, FACTS) as file:
        assert file.said == {0: "yes", 2: "ünï\n", 1: ""}
    assert path.read_bytes() == content


def test_any_cut_is_gone_on_from(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    content = filled(path)
    expected = {0: "yes", 2: "ünï\n", 1: ""}
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with PredictionFile(path, FACTS) as file:
            done = dict(file.said)
            assert len(done) == max(0, content[:size].count(b"\n") - 1)
            file.add({place: text for place, text in expected.items() if place not in done})
        assert path.read_bytes() == content


def test_other_facts_are_refused_or_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    content = filled(path)
    other = {**FACTS, "max_new_tokens": 6}
    with pytest.raises(UsageError, match=r"another max new tokens \(5, now 6\)"):
        PredictionFile(path, other)
    assert path.read_bytes() == content
    with PredictionFile(path, other, overwrite=True) as file:
        assert file.said == {}
    assert path.read_bytes() != content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no json\n", "line 1: is not JSON"),
        (b"[1]\n", "line 1: is no JSON object"),
        (b'{"format": "other"}\n', "format is 'other'; expected 'tailor-predictions/1'"),
        (b"words without an end", "holds no predictions"),
    ],
)
def test_another_file_is_left_alone(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        PredictionFile(path, FACTS)
    assert path.read_bytes() == content


def test_a_line_that_is_no_prediction(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    filled(path)
    with path.open("ab") as file:
        file.write(b'{"sample": "x"}\n')
    with pytest.raises(InputError, match="line 5: is no prediction"):
        PredictionFile(path, FACTS)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with PredictionFile(path, FACTS), pytest.raises(OutputError, match="another run is writing"):
        PredictionFile(path, FACTS)
    with pytest.raises(OutputError, match="cannot be written"):
        PredictionFile(tmp_path / "none" / "a.jsonl", FACTS)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_fd: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OutputError, match="cannot be locked: No locks available; choose a place"):
        PredictionFile(tmp_path / "a.jsonl", FACTS)
