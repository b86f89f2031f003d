"""VQA accuracy: the data set's own rules, case by case."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailor_fast.evaluation.vqa import normalised, vqa_accuracy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Yes\n", "yes"),
        ("The cat on a mat", "cat on mat"),
        ("two", "2"),
        ("None", "0"),
        ("ten dogs", "10 dogs"),
        ("dont know", "don't know"),
        ("youd've", "you'd've"),
        ("you'dve", "you'd've"),
        ("somebody'd", "somebodyd"),
        ("twas", "'twas"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("T-shirt", "t shirt"),
        ("yes, no", "yes no"),
        ("yes,no", "yes no"),
        ("1,000-2,000", "10002000"),
        ("3.5", "3.5"),
        ("U.S.A.", "usa"),
        ("what's up?", "what's up"),
        ("what?", "what"),
        ("10:30", "10:30"),
    ],
)
def test_answers_are_written_alike(text: str, expected: str) -> None:
    assert normalised(text) == expected


@pytest.mark.parametrize(
    ("matching", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_three_who_agree_are_enough(matching: int, expected: float) -> None:
    """Leaving out one of the k who agree leaves k - 1: 0.3 for one, 0.6 for two, 0.9 for three."""
    answers = ["2"] * matching + [f"other {i}" for i in range(10 - matching)]
    assert vqa_accuracy("Two", answers) == pytest.approx(expected)


def test_answers_lose_their_punctuation_where_annotators_disagree() -> None:
    assert vqa_accuracy("usa", ["usa"] * 5 + ["usa."] * 5) == 1.0
    assert vqa_accuracy("usa", ["usa."] * 10) == 0.0


def test_one_annotator_is_refused() -> None:
    with pytest.raises(ValueError, match="answers must be at least two; got 1"):
        vqa_accuracy("yes", ["yes"])


@given(st.text(max_size=20), st.lists(st.sampled_from(["yes", "no", "2"]), min_size=2, max_size=10))
def test_it_is_the_mean_over_annotators_left_out(text: str, answers: list[str]) -> None:
    said = normalised(text)
    shares = []
    for left_out in range(len(answers)):
        others = answers[:left_out] + answers[left_out + 1 :]
        shares.append(min(1, sum(answer == said for answer in others) / 3))
    assert vqa_accuracy(text, answers) == pytest.approx(sum(shares) / len(shares))
