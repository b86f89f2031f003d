"""Captions: CIDEr-D, and BLEU by sacrebleu.

Source of CIDEr-D: Vedantam et al., CIDEr: Consensus-based Image Description Evaluation, CVPR 2015.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tailor_fast._core.errors import UsageError

_ORDERS = 4
_SIGMA = 6.0  # of the Gaussian over the difference in length
_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")

Counts = Counter[tuple[str, ...]]


def words(text: str) -> list[str]:
    """Words in lower case, without punctuation between them."""
    return _WORD.findall(text.lower())


def cider_d(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each prediction; their mean, times 100, is what papers report.

    Document frequencies are those of the references given, as in the authors' script, so a score is
    of use beside others on the same set only. Captions are split by ``words``, not by the Stanford
    tokenizer, which needs Java.

    Args:
        predictions: one caption an image.
        references: the captions of each image, at least one.
    """
    cooked = [[_counts(words(text)) for text in texts] for texts in references]
    frequency: Counts = Counter()
    for counts in cooked:
        frequency.update({gram for count in counts for gram in count})
    size = math.log(max(1, len(references)))

    def weigh(counts: Counts) -> list[dict[tuple[str, ...], float]]:
        vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(_ORDERS)]
        for gram, count in counts.items():
            rarity = size - math.log(max(1, frequency[gram]))
            vectors[len(gram) - 1][gram] = count * rarity
        return vectors

    scores = []
    for text, counts in zip(predictions, cooked, strict=True):
        said = _counts(words(text))
        ours, length = weigh(said), _pairs(said)
        total = 0.0
        for count in counts:
            penalty = math.exp(-((length - _pairs(count)) ** 2) / (2 * _SIGMA**2))
            total += penalty * sum(map(_clipped_cosine, ours, weigh(count)))
        scores.append(10.0 * total / _ORDERS / len(counts))
    return scores


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU-4 of all predictions together, 0 to 100: sacrebleu's, lower case, tokenised by ``13a``.

    Args:
        predictions: one text each.
        references: right texts of each, at least one.

    Raises:
        UsageError: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise UsageError(
            "BLEU needs sacrebleu, which is not installed; pip install 'tailor_fast[evaluate]'"
        ) from None
    most = max(map(len, references))
    # It takes one list for the first reference of each, one for the second, and so on.
    columns: Any = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
    score: float = BLEU(lowercase=True).corpus_score(list(predictions), columns).score
    return score


def _counts(text: Sequence[str]) -> Counts:
    return Counter(
        tuple(text[begin : begin + order])
        for order in range(1, _ORDERS + 1)
        for begin in range(len(text) - order + 1)
    )


def _pairs(counts: Counts) -> int:
    """Number of neighbouring words: what the authors' script takes for the length."""
    return sum(count for gram, count in counts.items() if len(gram) == 2)


def _clipped_cosine(
    ours: dict[tuple[str, ...], float], theirs: dict[tuple[str, ...], float]
) -> float:
    shared = ((value, theirs[gram]) for gram, value in ours.items() if gram in theirs)
    product = sum(min(value, other) * other for value, other in shared)
    norms = math.sqrt(sum(v * v for v in ours.values()) * sum(v * v for v in theirs.values()))
    return product / norms if norms else 0.0
