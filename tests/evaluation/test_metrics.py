"""Exact match, captions and the table of scores."""

from __future__ import annotations

import math

import pytest

from tailor_fast._core.errors import InputError, UsageError
from tailor_fast.evaluation import captions
from tailor_fast.evaluation.captions import bleu, cider_d, words
from tailor_fast.evaluation.metrics import METRICS, check_metric, exact_match, vqa
from tailor_fast.evaluation.table import ModelScores, table_csv, table_rows

PREDICTIONS = [
    "a cat sits on a mat",
    "a dog runs",
    "two men play football on a green field",
    "a bird",
]
REFERENCES = [
    ["a cat sits on the mat", "the cat is on a mat"],
    ["a dog runs in the park", "a brown dog is running", "dog running"],
    ["two men play football on a field"],
    ["an aeroplane in the sky"],
]
# By CiderScorer of pycocoevalcap 1.2 on the same words.
AUTHORS = [4.717027, 2.171272, 7.544904, 0.0]


def test_exact_match_forgives_white_space_only() -> None:
    references = [["yes"], ["a b", "c"], ["3"], ["no"]]
    assert exact_match([" yes\n", "c", "4", "No"], references) == 50.0
    assert exact_match(["yes", "a  b", "3", "no"], references) == 100.0


def test_vqa_names_a_sample_with_one_answer() -> None:
    assert vqa(["yes", "no"], [["yes"] * 10, ["yes"] * 10]) == 50.0
    with pytest.raises(InputError, match=r"sample 2 has one answer; .* use the metric exact"):
        vqa(["yes", "no"], [["yes"] * 10, ["no"]])


def test_words_have_no_punctuation() -> None:
    assert words("A man's T-shirt, (red).") == ["a", "man's", "t-shirt", "red"]


def test_cider_is_that_of_its_authors() -> None:
    assert cider_d(PREDICTIONS, REFERENCES) == pytest.approx(AUTHORS, abs=1e-6)
    assert METRICS["cider"](PREDICTIONS, REFERENCES) == pytest.approx(25 * sum(AUTHORS), abs=0.01)


def test_cider_by_hand() -> None:
    """One word each, that one of two images has: tf-idf log 2 on both sides, cosine 1, three empty
    orders, ten times the mean."""
    assert cider_d(["cat", "bird"], [["cat"], ["dog"]]) == pytest.approx([2.5, 0.0])


def test_cider_punishes_another_length() -> None:
    short, long = (
        cider_d(["a b c", "x"], [["a b c"], ["y"]]),
        cider_d(["a b c a b c a b c", "x"], [["a b c"], ["y"]]),
    )
    assert short[0] == pytest.approx(7.5)
    assert long[0] < short[0] * math.exp(-(6**2) / (2 * 6**2)) * 1.001


def test_bleu_is_sacrebleus() -> None:
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed (extra `evaluate`)")
    assert bleu(["A cat sits."], [["a cat sits.", "x y z"]]) == pytest.approx(100.0)
    assert bleu(PREDICTIONS, REFERENCES) == pytest.approx(65.6774, abs=1e-3)


def test_without_sacrebleu_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(UsageError, match=r"pip install 'tailor_fast\[evaluate\]'"):
        captions.bleu(["a"], [["a"]])


def test_metrics_have_names() -> None:
    with pytest.raises(UsageError, match="metric must be one of exact, vqa, cider, bleu; got 'f1'"):
        check_metric("f1")


def test_the_table_names_both_averages() -> None:
    models = {
        "base": ModelScores({"a": 90.0, "b": 70.0, "c": 80.0}, {"n": 10.0}),
        "tuned": ModelScores({"a": 30.0, "b": 10.0, "c": 20.0}, {"n": 60.0}),
        "ours": ModelScores({"a": 88.0, "b": 70.0, "c": 76.0}, {"n": 48.0}),
    }
    *_, row = table_rows(models, base="base", tuned="tuned")
    assert row == {
        "model": "ours",
        **models["ours"].old,
        "old mean": 78.0,
        "n": 48.0,
        "new mean": 48.0,
        "old kept": pytest.approx(97.5),
        "new kept": 80.0,
        "H-mean": pytest.approx(2 * 78 * 48 / 126),
        "mean over tasks": 70.5,
        "mean of old and new": 63.0,
    }
    lines = table_csv(table_rows(models)).splitlines()
    assert lines[0].startswith("model,a,b,c,old mean,n,new mean,old kept")
    assert lines[3].startswith("ours,88.0,70.0,76.0,78.0,48.0,48.0,,,")


def test_a_table_without_new_tasks() -> None:
    (row,) = table_rows({"m": ModelScores({"a": 50.0}, {})}, base="m")
    assert (row["old kept"], row["new mean"], row["H-mean"]) == (100.0, None, None)
    assert (row["mean over tasks"], row["mean of old and new"]) == (50.0, None)
