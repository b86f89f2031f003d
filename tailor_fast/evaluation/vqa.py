"""VQA accuracy as the data set's own script computes it, and its way of writing answers alike.

Source: Antol et al., VQA: Visual Question Answering, ICCV 2015, and the evaluation script that is
published with the data (github.com/GT-Vision-Lab/VQA).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_ARTICLES = {"a", "an", "the"}
_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(_WORDS.split())}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_THOUSANDS = re.compile(r"\d,\d")
# The script knows these when one of their apostrophes is missing.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_REPAIRED = {
    word[: match.start()] + word[match.end() :]: word
    for word in _CONTRACTIONS.split()
    for match in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}  # the other way round, as the script has it


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """How well a prediction agrees with the annotators' answers, in [0, 1].

    The mean over all but one annotator, each left out in turn, of ``min(1, matching answers / 3)``.
    As in the script, the prediction is written alike always, the answers lose their punctuation
    where annotators disagree.

    Args:
        prediction: what the model said.
        answers: one of each annotator, ten in the data set; at least two.

    Raises:
        ValueError: fewer than two answers: no other is left to agree with.
    """
    if len(answers) < 2:
        raise ValueError(f"vqa_accuracy: answers must be at least two; got {len(answers)}")
    said = normalised(prediction)
    given = list(answers)
    if len(set(given)) > 1:
        given = [_without_punctuation(answer) for answer in given]
    matching = sum(answer == said for answer in given)
    shares = (min(1.0, (matching - (answer == said)) / 3) for answer in given)
    return sum(shares) / len(given)


def normalised(text: str) -> str:
    """Lower case, no articles, digits for small numbers, apostrophes where they belong."""
    text = _without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_REPAIRED.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    """A mark that touches a space, or any mark beside a number like 1,000, leaves no gap."""
    joined = _THOUSANDS.search(text) is not None
    found = text
    for mark in _PUNCTUATION:
        closes = joined or f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if closes else " ")
    return _PERIOD.sub("", found)
