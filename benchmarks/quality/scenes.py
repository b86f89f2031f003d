"""Scenes of four handwritten digits, questions about them, and their answers.

A scene is a 2x2 grid of 8x8 images of scikit-learn's ``load_digits`` (1,797 real scans that come
with the package). Positions count 0 to 3, row by row. The old tasks are what the base model is
trained on; a new task is what it is fine-tuned on. The digits are split once: a test scene shows
only test digits, a validation scene only digits held out of the training ones.
"""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "validation", "test"]
Draw = tuple[list[str], list[str]]  # one argument and one answer per scene

SIDE = 16  # pixels of a scene's side
OLD_TASKS = ("what", "parity", "larger", "list", "exists")
NEW_TASKS = ("code", "next")
LATER_TASKS = ("twice", "mirror")  # learned after those two, where tasks follow one another
LETTERS = "hcjaegbdif"  # what ``code`` answers for the digits 0 to 9
IMAGE_TAG = "<image>"

_SPLIT_SEED = 1234
_SIZES: dict[Split, slice] = {
    "train": slice(0, 1097),
    "validation": slice(1097, 1297),
    "test": slice(1297, 1797),
}


@dataclass(frozen=True)
class Scenes:
    """Scenes of one task.

    Attributes:
        task: task's name.
        images: uint8 [n, 16, 16], 0 is black.
        prompts: n questions without the image tag, two words each, such as ``what 3``.
        answers: n answers, words separated by one space.
    """

    task: str
    images: NDArray[np.uint8]
    prompts: list[str]
    answers: list[str]

    def __len__(self) -> int:
        return len(self.prompts)


@functools.cache
def digits(split: Split) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the images, uint8 [n, 8, 8] of 0 to 255, and the labels, int64 [n], of one split."""
    from sklearn.datasets import load_digits  # here: only this function needs it

    data = load_digits()
    chosen = np.random.RandomState(_SPLIT_SEED).permutation(len(data.target))[_SIZES[split]]
    images = np.rint(data.images[chosen] * (255 / 16)).astype(np.uint8)
    return images, data.target[chosen].astype(np.int64)


def draw(task: str, split: Split, count: int, seed: int) -> Scenes:
    """Draw ``count`` scenes; the same arguments give the same scenes.

    Raises:
        ValueError: ``task`` is none of ``OLD_TASKS``, ``NEW_TASKS`` and ``LATER_TASKS``.
    """
    if task not in _QUESTIONS:
        raise ValueError(f"draw: task must be one of {', '.join(_QUESTIONS)}; got {task!r}")
    rng = np.random.default_rng([seed, list(_QUESTIONS).index(task)])
    pool, labels = digits(split)
    chosen = rng.integers(len(labels), size=(count, 4))
    tiles = pool[chosen].reshape(count, 2, 2, 8, 8)
    images = tiles.swapaxes(2, 3).reshape(count, SIDE, SIDE)
    if task == "code":
        images = 255 - images  # the new task's domain: ink is black on white
    if task == "mirror":
        images = images[:, :, ::-1]
    arguments, answers = _QUESTIONS[task](labels[chosen], rng)
    prompts = [f"{task} {argument}" for argument in arguments]
    return Scenes(task, np.ascontiguousarray(images), prompts, answers)


def write(scenes: Sequence[Scenes], path: Path) -> None:
    """Write calibration data: one JSON object a line, the images as PNG files beside it.

    A line is ``{"prompt": "<image> what 3", "answer": "5", "images": ["img/new-00000.png"]}``;
    image paths are relative to the file. Tasks take turns, so that any head of the file has all.
    """
    from PIL import Image  # here: drawing scenes does not need it

    folder = path.parent / "img"
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    order = [(row, part) for row in range(max(map(len, scenes))) for part in scenes]
    for row, part in order:
        if row < len(part):
            name = f"{path.stem}-{len(lines):05d}.png"
            Image.fromarray(part.images[row]).save(folder / name)
            line = {
                "prompt": f"{IMAGE_TAG} {part.prompts[row]}",
                "answer": part.answers[row],
                "images": [f"img/{name}"],
            }
            lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def _at_position(answer: Callable[[int], str]) -> Callable[..., Draw]:
    def question(labels: NDArray[np.int64], rng: np.random.Generator) -> Draw:
        positions = rng.integers(4, size=len(labels))
        asked = labels[np.arange(len(labels)), positions]
        return [str(at) for at in positions], [answer(int(digit)) for digit in asked]

    return question


def _larger(labels: NDArray[np.int64], rng: np.random.Generator) -> Draw:
    rows = rng.integers(2, size=len(labels))
    pairs = labels.reshape(-1, 2, 2)[np.arange(len(labels)), rows]
    words = ("same", "left", "right")  # by the sign of left - right: 0, 1, -1
    return [str(row) for row in rows], [words[sign] for sign in np.sign(pairs[:, 0] - pairs[:, 1])]


def _list(labels: NDArray[np.int64], _rng: np.random.Generator) -> Draw:
    return ["all"] * len(labels), [" ".join(map(str, row)) for row in labels]


def _exists(labels: NDArray[np.int64], rng: np.random.Generator) -> Draw:
    present = rng.integers(2, size=len(labels)).astype(bool)
    asked = []
    for row, there in zip(labels, present, strict=True):
        choices = row if there else np.setdiff1d(np.arange(10), row)
        asked.append(str(rng.choice(choices)))
    return asked, ["yes" if there else "no" for there in present]


_QUESTIONS: dict[str, Callable[[NDArray[np.int64], np.random.Generator], Draw]] = {
    "what": _at_position(str),
    "parity": _at_position(lambda digit: ("even", "odd")[digit % 2]),
    "larger": _larger,
    "list": _list,
    "exists": _exists,
    "code": _at_position(lambda digit: LETTERS[digit]),
    "next": _at_position(lambda digit: str((digit + 3) % 10)),
    "twice": _at_position(lambda digit: str(digit * 2 % 10)),
    "mirror": _at_position(lambda digit: LETTERS[9 - digit]),
}
