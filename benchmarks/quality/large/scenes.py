"""Scenes of sixteen handwritten digits, 32x32 pixels; the tasks are those of the small scenes.

Positions count 0 to 15, row by row. The digits, their splits and the answers' words are the same.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality.scenes import LETTERS, OLD_TASKS, Draw, Scenes, Split, digits

GRID = 4
SIDE = 8 * GRID  # pixels
POSITIONS = tuple(f"p{at}" for at in range(GRID * GRID))
NEW_TASKS = ("code", "next")

Labels = NDArray[np.int64]


def draw(task: str, split: Split, count: int, seed: int) -> Scenes:
    """Draw ``count`` scenes, images uint8 ``[count, 32, 32]``; equal arguments give equal scenes.

    Raises:
        ValueError: ``task`` is none of ``OLD_TASKS`` and ``NEW_TASKS``.
    """
    if task not in _QUESTIONS:
        raise ValueError(f"draw: task must be one of {', '.join(_QUESTIONS)}; got {task!r}")
    rng = np.random.default_rng([seed, list(_QUESTIONS).index(task)])
    pool, labels = digits(split)
    chosen = rng.integers(len(labels), size=(count, GRID * GRID))
    if task == "exists":
        # Sixteen digits leave few classes out, so one is chosen first and then taken out.
        asked, present = rng.integers(10, size=count), rng.integers(2, size=count).astype(bool)
        chosen = _with_or_without(labels, chosen, asked, present, rng)
        arguments = [str(digit) for digit in asked]
        answers = ["yes" if there else "no" for there in present]
    else:
        arguments, answers = _QUESTIONS[task](labels[chosen], rng)
    images = pool[chosen].reshape(count, GRID, GRID, 8, 8).swapaxes(2, 3)
    images = images.reshape(count, SIDE, SIDE)
    if task == "code":
        images = 255 - images  # the new task's domain: ink is black on white
    prompts = [f"{task} {argument}" for argument in arguments]
    return Scenes(task, np.ascontiguousarray(images), prompts, answers)


def _with_or_without(
    labels: Labels,
    chosen: Labels,
    asked: Labels,
    present: NDArray[np.bool_],
    rng: np.random.Generator,
) -> Labels:
    """Return ``chosen`` with the asked digit once at least where ``present``, else nowhere."""
    chosen = chosen.copy()
    for row, (digit, there) in enumerate(zip(asked, present, strict=True)):
        is_it = labels[chosen[row]] == digit
        if there and not is_it.any():
            chosen[row, rng.integers(GRID * GRID)] = rng.choice(np.flatnonzero(labels == digit))
        elif not there:
            others = np.flatnonzero(labels != digit)
            chosen[row, is_it] = rng.choice(others, size=int(is_it.sum()))
    return chosen


def _at_position(answer: Callable[[int], str]) -> Callable[..., Draw]:
    def question(labels: Labels, rng: np.random.Generator) -> Draw:
        at = rng.integers(GRID * GRID, size=len(labels))
        asked = labels[np.arange(len(labels)), at]
        return [POSITIONS[place] for place in at], [answer(int(digit)) for digit in asked]

    return question


def _larger(labels: Labels, rng: np.random.Generator) -> Draw:
    """The left or the right end of a row."""
    rows = rng.integers(GRID, size=len(labels))
    row = labels.reshape(-1, GRID, GRID)[np.arange(len(labels)), rows]
    words = ("same", "left", "right")  # by the sign of left - right: 0, 1, -1
    return [str(at) for at in rows], [words[sign] for sign in np.sign(row[:, 0] - row[:, -1])]


def _list(labels: Labels, _rng: np.random.Generator) -> Draw:
    return ["all"] * len(labels), [" ".join(map(str, row)) for row in labels]


def _decided_before(_labels: Labels, _rng: np.random.Generator) -> Draw:
    return [], []


_QUESTIONS: dict[str, Callable[[Labels, np.random.Generator], Draw]] = dict(
    zip(
        (*OLD_TASKS, *NEW_TASKS),
        (
            _at_position(str),
            _at_position(lambda digit: ("even", "odd")[digit % 2]),
            _larger,
            _list,
            _decided_before,
            _at_position(lambda digit: LETTERS[digit]),
            _at_position(lambda digit: str((digit + 3) % 10)),
        ),
        strict=True,
    )
)
